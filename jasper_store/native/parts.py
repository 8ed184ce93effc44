"""Rows of a tensor in several parts: which part each is in, and its address, by the compiled library or by numpy."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

import numpy as np

from jasper_store.native.library import library

if TYPE_CHECKING:
    import torch

__all__ = ["UNMAPPED", "PartTable", "PlacedParts"]

UNMAPPED: Final = -(2**63)
"""Stands for the address of a part that is not mapped."""
IN_PARTS: Final = -1
"""Given instead of a stride; ``rows.c`` has the same value."""


class _Parts(ctypes.Structure):
    """``struct parts`` of ``parts.c``."""

    _fields_ = (
        ("starts", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("bases", ctypes.c_void_p),
        ("n_parts", ctypes.c_uint64),
        ("shift", ctypes.c_uint64),
        ("row_nbytes", ctypes.c_int64),
    )


class PartTable:
    """Which part a row is in. Memory is in proportion to the parts, not to the rows.

    Args:
        starts: first row of each part, and the number of rows, int64 [parts + 1], ascending from 0, no part empty.
        row_nbytes: bytes of a row, which lie one after another within a part.

    Attributes:
        starts: as given.
        n_parts: number of parts.
        n_rows: number of rows.
    """

    def __init__(self, starts: np.ndarray, row_nbytes: int) -> None:
        self.starts: np.ndarray = np.ascontiguousarray(starts, np.int64)
        self.n_parts, self.n_rows, self.row_nbytes = len(starts) - 1, int(starts[-1]), row_nbytes
        # About two spans to a part.
        self.shift = max(0, (max(self.n_rows // (2 * self.n_parts), 1)).bit_length() - 1)
        firsts = np.arange(0, self.n_rows, 1 << self.shift, dtype=np.int64)
        spans = np.searchsorted(self.starts, firsts, side="right") - 1
        self.spans: np.ndarray = np.append(spans, self.n_parts - 1).astype(np.int64)
        self._unplaced = PlacedParts(self, np.empty(0, np.int64))

    def parts_of(self, rows: np.ndarray) -> np.ndarray:
        """Part number of each row, int64 [n]; all rows are in range."""
        native = library()
        if native is None:
            return np.searchsorted(self.starts, rows, side="right") - 1
        found = np.empty(len(rows), np.int64)
        step = rows.strides[0] // rows.itemsize if len(rows) else 1
        native.jasper_parts_of_rows(self._unplaced.address, rows.ctypes.data, step, len(rows), found.ctypes.data)
        return found


class PlacedParts:
    """Parts, and where they are in memory.

    Args:
        table: the parts.
        bases: of each, the address of its first row less its first row's number times the bytes of a row; or
            :data:`UNMAPPED`. int64 [parts], contiguous; may change meanwhile.

    Attributes:
        bases: as given.
        keep: what has to live as long as the addresses are used.
        address: of the ``struct parts``.
        numbers: as of a :class:`~jasper_store.native.gather.Source`, once all parts are mapped.
    """

    def __init__(self, table: PartTable, bases: np.ndarray) -> None:
        self.bases, self._table = bases, table
        self.keep: object = None
        self._packed = _Parts(
            *(table.starts.ctypes.data, table.spans.ctypes.data, bases.ctypes.data),
            *(table.n_parts, table.shift, table.row_nbytes),
        )
        self.address = ctypes.addressof(self._packed)
        self.numbers = (self.address, table.n_rows, table.row_nbytes, IN_PARTS)

    def locate(self, rows: torch.Tensor, addresses: torch.Tensor) -> int:
        """Find the address of each row.

        Args:
            rows: int64 [n] in host memory.
            addresses: where to put them, int64 [n], contiguous; :data:`UNMAPPED` where the part is.

        Returns:
            -1; -2 if a row is in a part that is not mapped; or the position of the first row that is out of range, and
            then nothing is written.
        """
        native = library()
        if native is not None:
            found: int = native.jasper_locate_rows(
                *(self.address, UNMAPPED, rows.data_ptr(), rows.stride(0), rows.shape[0], addresses.data_ptr())
            )
            return found
        wanted, out = rows.numpy(), addresses.numpy()
        bad = (wanted < 0) | (wanted >= self._table.n_rows)
        if bad.any():
            return int(bad.argmax())
        base = self.bases[self._table.parts_of(wanted)]
        missing = base == UNMAPPED
        np.multiply(wanted, self._table.row_nbytes, out=out)
        out += base
        out[missing] = UNMAPPED
        return -2 if missing.any() else -1
