"""tensordict's ``MemoryMappedTensor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tools.bench.readers.base import Reader

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


class TensordictMap(Reader):
    """Rows by indexing."""

    key = "tensordict"
    label = "tensordict `MemoryMappedTensor[rows]`"
    how = "from_filename"
    module = "tensordict"
    dist = "tensordict"
    asset = "rows.raw"

    def open(self, path: Path) -> None:  # noqa: D102
        shape = torch.Size((self.rows, self.dim))
        self.data = self.lib.MemoryMappedTensor.from_filename(str(path), dtype=torch.float32, shape=shape)

    def take(self, rows: NDArray[np.int64]) -> torch.Tensor:  # noqa: D102
        picked: torch.Tensor = self.data[torch.from_numpy(rows)]
        return picked.as_subclass(torch.Tensor)
