"""TensorStore over zarr 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tools.bench.readers.base import Reader

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


class TensorstoreZarr(Reader):
    """Index array reads; chunks are read whole, which is what the layout costs."""

    key = "tensorstore"
    label = "TensorStore zarr3, 4096-row chunks"
    how = "uncompressed, no cache pool"
    module = "tensorstore"
    dist = "tensorstore"
    asset = "rows.zarr"

    def open(self, path: Path) -> None:  # noqa: D102
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
        self.data = self.lib.open(spec, read=True).result()

    def take(self, rows: NDArray[np.int64]) -> torch.Tensor:  # noqa: D102
        return torch.from_numpy(self.data[rows].read().result())
