"""safetensors: ``safe_open(...).get_tensor(name)[rows]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tools.bench.readers.base import Reader
from tools.bench.row_files import NAME

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


class SafetensorsMap(Reader):
    """``get_tensor`` is a view of its map; ``get_slice`` takes ranges only, a row at a time, and is slower."""

    key = "safetensors"
    label = "safetensors `get_tensor()[rows]`"
    how = "safe_open(framework='pt'), the view of its map indexed"
    module = "safetensors"
    dist = "safetensors"
    asset = "rows.safetensors"

    def open(self, path: Path) -> None:  # noqa: D102
        self.file = self.lib.safe_open(str(path), framework="pt")
        self.data: torch.Tensor = self.file.get_tensor(NAME)

    def take(self, rows: NDArray[np.int64]) -> torch.Tensor:  # noqa: D102
        return self.data[torch.from_numpy(rows)]
