"""Hugging Face datasets over a local arrow file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from tools.bench.readers.base import Reader
from tools.bench.row_files import NAME

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


class HfDatasets(Reader):
    """The arrow format, its quickest: rows stay arrow until one flat copy."""

    key = "datasets"
    label = "HF datasets, arrow format"
    how = "Dataset.from_file, with_format('arrow')"
    module = "datasets"
    dist = "datasets"
    asset = "rows.arrow"

    def prepare(self) -> None:  # noqa: D102
        os.environ["HF_HUB_OFFLINE"] = "1"
        super().prepare()

    def open(self, path: Path) -> None:  # noqa: D102
        self.data = self.lib.Dataset.from_file(str(path)).with_format("arrow")

    def take(self, rows: NDArray[np.int64]) -> torch.Tensor:  # noqa: D102
        column = self.data[rows.tolist()].column(NAME).combine_chunks()
        return torch.tensor(column.flatten().to_numpy(zero_copy_only=True)).view(-1, self.dim)
