"""Rows of an input of a build, wherever they lie: in memory as an array or a tensor, or in a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jasper_store.store.tensors import StoredTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Matrix", "unit"]


class Matrix:
    """An input by the name of its argument: shape, dtype, rows on demand as owned tensors in host memory.

    Attributes:
        role: the argument of ``build`` that it came by, for messages.
        shape: sizes.
        dtype: torch dtype of the rows.
    """

    def __init__(self, role: str, source: torch.Tensor | NDArray[Any] | StoredTensor) -> None:
        self.role = role
        self._source = source.detach() if isinstance(source, torch.Tensor) else source
        self.shape = torch.Size(source.shape)
        # numpy has no bfloat16, so each of its dtypes that torch lacks is refused by from_numpy.
        self.dtype: torch.dtype = (
            torch.from_numpy(np.empty(0, source.dtype)).dtype if isinstance(source, np.ndarray) else source.dtype
        )

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return self.shape[1:].numel() * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.shape.numel() * self.dtype.itemsize

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [len(rows), ...] by number (int64), owned, in host memory.

        Raises:
            IndexError: a row that does not exist.
        """
        if isinstance(self._source, StoredTensor):
            return self._source.take(rows).cpu()
        if isinstance(self._source, np.ndarray):
            return torch.from_numpy(self._source[rows.numpy()])
        return self._source[rows.to(self._source.device)].cpu()

    def part(self, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop, in host memory; not to be written to."""
        if isinstance(self._source, np.ndarray):
            # A copy, since torch shares no memory with arrays that are read-only or run backwards.
            return torch.from_numpy(np.array(self._source[start:stop]))
        return self._source[start:stop].cpu().contiguous()

    def blocks(self, rows: int) -> Iterator[torch.Tensor]:
        """All rows in order, so many at a time."""
        for start in range(0, len(self), rows):
            yield self.part(start, start + rows)


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, D] as float64 of length 1; zeros stay zeros.

    In double precision, so that results rounded to the dataset's dtype depend neither on the block that a row came in,
    nor on the number of threads.
    """
    if rows.dtype == torch.float64:
        # The squares of large numbers would overflow; those of narrower dtypes fit.
        rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    wide = rows.double()
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return wide / torch.where(length > 0, length, 1.0)
