"""This library: one class a format, one engine behind them."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import torch

from tools.bench.readers.base import Reader
from tools.bench.row_files import PARTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


PREFETCHED_ROWS = 256


class OursSafetensors(Reader):
    """``take`` with the rows of some batches ahead prefetched, several small batches at once, as ``create_loader`` does it."""

    key = "ours"
    label = "**jasper_store**, safetensors"
    how = "use_mmap=True; 1,024 rows ahead prefetched"
    module = "jasper_store"
    dist = "jasper-store"
    asset = "rows.safetensors"
    ours = True

    def open(self, path: Path) -> None:  # noqa: D102
        self.store = self.lib.open(path, use_mmap=True)
        (self.name,) = self.store
        self.data = self.store[self.name]

    def take(self, rows: NDArray[np.int64]) -> torch.Tensor:  # noqa: D102
        taken: torch.Tensor = self.data.take(torch.from_numpy(rows))
        return taken

    def batches(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[torch.Tensor]:  # noqa: D102
        indices = [torch.from_numpy(rows) for rows in batches]
        at_once = max(1, PREFETCHED_ROWS // len(indices[0]))
        ahead = max(1, self.lookahead // len(indices[0]))
        groups = [torch.cat(indices[first : first + at_once]) for first in range(0, len(indices), at_once)]
        later = iter(groups)
        for rows in islice(later, ahead // at_once):
            self.data.prefetch(rows)
        for number, rows in enumerate(indices):
            if number % at_once == 0 and (coming := next(later, None)) is not None:
                self.data.prefetch(coming)
            yield self.data.take(rows)


class OursNpy(OursSafetensors):
    """The same over ``.npy``."""

    key = "ours-npy"
    label = "**jasper_store**, npy"
    asset = "rows.npy"


class OursParts(OursSafetensors):
    """The same over many files of ``.npy``, which are one tensor."""

    key = "ours-parts"
    label = f"**jasper_store**, {PARTS} files of npy"
    asset = "rows.parts"


class OursArrow(OursSafetensors):
    """The same over an Arrow stream, where it lies."""

    key = "ours-arrow"
    label = "**jasper_store**, Arrow in place"
    asset = "rows.arrow"


class OursPt(OursSafetensors):
    """The same over ``.pt``."""

    key = "ours-pt"
    label = "**jasper_store**, pt"
    asset = "rows.pt"


class OursHdf5(OursSafetensors):
    """The same over contiguous HDF5."""

    key = "ours-hdf5"
    label = "**jasper_store**, contiguous HDF5"
    asset = "rows.h5"
