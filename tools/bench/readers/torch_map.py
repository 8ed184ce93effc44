"""``torch.load(mmap=True)``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tools.bench.readers.base import Reader

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


class TorchMap(Reader):
    """Rows by indexing the mapped tensor."""

    key = "torch"
    label = "`torch.load(mmap=True)[rows]`"
    how = "weights_only=True"
    module = "torch"
    dist = "torch"
    asset = "rows.pt"

    def open(self, path: Path) -> None:  # noqa: D102
        self.data: torch.Tensor = torch.load(path, mmap=True, weights_only=True)

    def take(self, rows: NDArray[np.int64]) -> torch.Tensor:  # noqa: D102
        return self.data[torch.from_numpy(rows)]
