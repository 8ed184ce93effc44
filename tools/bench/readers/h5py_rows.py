"""h5py, as its users are told to do it: sorted, each row once, then put back in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from tools.bench.readers.base import Reader
from tools.bench.row_files import NAME

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


class H5pyRows(Reader):
    """Fancy selection of sorted unique rows of a contiguous dataset."""

    key = "h5py"
    label = "h5py, sorted unique rows"
    how = "contiguous dataset"
    module = "h5py"
    dist = "h5py"
    asset = "rows.h5"

    def open(self, path: Path) -> None:  # noqa: D102
        self.file = self.lib.File(path, "r")
        self.data = self.file[NAME]

    def take(self, rows: NDArray[np.int64]) -> torch.Tensor:  # noqa: D102
        unique, inverse = np.unique(rows, return_inverse=True)
        return torch.from_numpy(self.data[unique][inverse])
