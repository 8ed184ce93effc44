"""A subset that stays fast: its indices are an array, and a batch of it is one indexing operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from jasper_store.samples.batch import Batch

__all__ = ["ArraySubset"]


class ArraySubset(Subset[dict[str, torch.Tensor]]):
    """``torch.utils.data.Subset`` over an int64 array, which forked workers share instead of copying.

    Attributes:
        indices: positions in the dataset, a numpy array; iterating gives integers.
    """

    def __init__(self, dataset: Dataset[dict[str, torch.Tensor]], indices: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        super().__init__(dataset, indices)  # type: ignore[arg-type]  # an array is a sequence of ints in all but name
        self._array = indices

    def __getitems__(self, indices: Sequence[int] | torch.Tensor) -> Batch:  # type: ignore[override]
        """The samples at these positions of the subset, gathered at once."""
        batch: Batch = self.dataset.__getitems__(self._array[np.asarray(indices)])  # type: ignore[attr-defined]
        return batch
