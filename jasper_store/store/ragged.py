"""Rows of different lengths: one tensor of all values, one of where each row begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jasper_store.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from jasper_store.store.tensors import StoredTensor

__all__ = ["RaggedTensor"]


class RaggedTensor:
    """A ragged tensor of a store: ``ragged[i]`` is a 1-D tensor of row i's values. Pickles through its store.

    Attributes:
        name: its base name.
        values: the values of all rows, one after the other.
        offsets: int64 [rows + 1]; row i is ``values[offsets[i]:offsets[i + 1]]``.
    """

    def __init__(self, name: str, values: StoredTensor, offsets: StoredTensor) -> None:
        self.name = name
        self.values = values
        self.offsets = offsets
        if len(offsets.shape) != 1 or len(values.shape) != 1 or not offsets.n_rows:
            msg = (
                f"{name}: expected values [n] and offsets [rows + 1], found {list(values.shape)} and "
                f"{list(offsets.shape)} in {offsets.path}; convert the dataset again"
            )
            raise IntegrityError(msg, path=offsets.path, tensor=name)

    def __len__(self) -> int:
        return self.offsets.n_rows - 1

    def __getitem__(self, row: int) -> torch.Tensor:
        """Values of one row, 1-D; negative rows count from the end.

        Raises:
            IndexError: out of range.
            IntegrityError: the offsets do not describe rows of the values.
            ClosedError: the store was closed.
        """
        n = len(self)
        if not -n <= row < n:
            msg = f"{self.name}: row {row} is out of range: it has {n} rows"
            raise IndexError(msg)
        row %= n
        start, stop = self.offsets[row : row + 2].tolist()
        if not 0 <= start <= stop <= self.values.n_rows:
            msg = (
                f"{self.name}: row {row} is said to be values {start} to {stop}, of {self.values.n_rows}; "
                "the file is damaged: convert the dataset again"
            )
            raise IntegrityError(msg, path=self.offsets.path, tensor=self.name)
        return self.values[start:stop]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        return f"RaggedTensor({self.name!r}, {len(self)} rows, {self.values.n_rows} values)"
