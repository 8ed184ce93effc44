"""Lance, the best peer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tools.bench.readers.base import Reader
from tools.bench.row_files import NAME

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


class LanceTake(Reader):
    """``take`` by row number: Lance makes its own plan of the reads."""

    key = "lance"
    label = "Lance `take`"
    how = "pylance, its own defaults"
    module = "lance"
    dist = "pylance"
    asset = "rows.lance"

    def open(self, path: Path) -> None:  # noqa: D102
        self.data = self.lib.dataset(str(path))

    def take(self, rows: NDArray[np.int64]) -> torch.Tensor:  # noqa: D102
        column = self.data.take(rows.tolist()).column(NAME).combine_chunks()
        return torch.tensor(column.flatten().to_numpy(zero_copy_only=True)).view(-1, self.dim)
