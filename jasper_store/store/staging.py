"""Rows of mapped tensors read ahead past the page cache, into memory of their own.

A block order names the rows of a window beforehand, and they lie in runs. Through the page cache such a run costs far
more processor time than disk time: each page is allocated, announced, mapped by a fault and let go again, 5 us a page
where two cores also gather. Here runs are read directly (O_DIRECT), many at a time, without the interpreter; the rows
that are wanted are gathered out of them, and the rest is forgotten: memory for the rows alone.
"""

from __future__ import annotations

import mmap
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from jasper_store.errors import CorruptFileError
from jasper_store.memory.gather import Jobs, Reader, Source, kernel
from jasper_store.memory.paging import pieces, row_ranges
from jasper_store.store.mapped import MappedTensor
from jasper_store.store.resident import empty_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jasper_store.store.tensors import StoredTensor

__all__ = ["Staging", "stagings_of"]

_GAP: Final = 3
"""Pages between two rows that are read along: a read costs as much as 12 KiB more of one."""
_ANYWHERE: Final = 2**63 - 1


def stagings_of(tensors: Sequence[StoredTensor], count: int) -> list[Staging]:
    """Staging for tensors of one row shape and dtype, of which some are mapped and the others in memory.

    Returns:
        One for each of ``count`` threads; none where nothing is mapped, rows are no runs of bytes as they are handed
        out, the kernel was not built, or the file system does not read directly.
    """
    kinds = {(tensor.dtype, tensor.row_shape) for tensor in tensors}
    if kernel() is None or not hasattr(os, "O_DIRECT") or len(kinds) != 1:
        return []
    mapped = [isinstance(tensor, MappedTensor) and tensor.stageable for tensor in tensors]
    if not any(mapped) or not all(m or t.in_memory for m, t in zip(mapped, tensors, strict=True)):
        return []
    made: list[Staging] = []
    try:
        made.extend(Staging(tensors) for _ in range(count))
    except OSError:
        for staging in made:
            staging.close()
        return []
    return made


class _Part:
    """Rows of one tensor, and the runs of its file that they are read by."""

    def __init__(self, file: int, tensor: StoredTensor, rows: np.ndarray, places: np.ndarray) -> None:
        assert isinstance(tensor, MappedTensor)
        self.tensor, self.rows, self.places, self._file = tensor, rows, places, file
        offset, span = tensor.byte_range
        self._starts = offset + rows * tensor.row_stride
        self._end = offset + span
        self._runs = pieces(row_ranges(offset, tensor.row_stride, tensor.row_nbytes, rows, _GAP))
        self._at = np.cumsum(self._runs[:, 1]) - self._runs[:, 1]
        self.nbytes = int(self._runs[:, 1].sum())

    def ranges(self, at: int) -> np.ndarray:
        """What to read into a buffer from ``at`` on, as :class:`~jasper_store.memory.gather.Reader` takes it."""
        begin, nbytes = self._runs[:, 0], self._runs[:, 1]
        needed = np.minimum(nbytes, self._end - begin)
        return np.stack([np.full_like(begin, self._file), begin, nbytes, needed, self._at + at], axis=1)

    def read_to(self, at: int) -> np.ndarray:
        """Where in the buffer each row is then."""
        run = np.searchsorted(self._runs[:, 0], self._starts, side="right") - 1
        found: np.ndarray = at + self._at[run] + self._starts - self._runs[run, 0]
        return found


class Staging:
    """Reads rows of several tensors of one row shape and dtype, as their files have them. For one thread at a time.

    Args:
        tensors: whose rows; see :func:`stagings_of`. Those in memory need not be read.

    Attributes:
        anywhere: memory as a source: rows are named by their address.

    Raises:
        OSError: a file cannot be opened directly.
    """

    def __init__(self, tensors: Sequence[StoredTensor]) -> None:
        self.tensors = tuple(tensors)
        first = tensors[0]
        self.row_shape, self.dtype, self._row_nbytes = tuple(first.row_shape), first.dtype, first.row_nbytes
        self._zeros = torch.zeros(self.row_shape, dtype=self.dtype, device="cpu")
        self.anywhere = Source(self._zeros, self.row_shape, self._row_nbytes, (0, _ANYWHERE, self._row_nbytes, 1))
        self._scratch: mmap.mmap | None = None
        self._files: dict[int, int] = {}
        with ExitStack() as undo:
            for which, tensor in enumerate(tensors):
                if tensor.in_memory is None:
                    self._files[which] = os.open(tensor.path, os.O_RDONLY | os.O_DIRECT)
                    undo.callback(os.close, self._files[which])
            self._reader = Reader()
            undo.callback(self._reader.close)
            self._open = undo.pop_all()

    def read(self, which: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
        """Have rows in memory.

        Args:
            which: tensor number of each, [n]; -1 is a row of zeros.
            rows: row of each, int64 [n]; none twice of one tensor.

        Returns:
            The address of each row, int64 [n], and the memory that has to be kept as long as it is used.

        Raises:
            CorruptFileError: a file cannot be read to the end of a row.
        """
        addresses = np.full(len(rows), self._zeros.data_ptr(), np.int64)
        parts = []
        for number, tensor in enumerate(self.tensors):
            places = np.flatnonzero(which == number)
            if number in self._files and len(places):
                parts.append(_Part(self._files[number], tensor, rows[places], places))
            elif tensor.in_memory is not None:
                address, _, _, stride = tensor.in_memory.numbers
                addresses[places] = address + rows[places] * stride
        count = sum(len(part.rows) for part in parts)
        memory = empty_rows((count, *self.row_shape), self.dtype, count * self._row_nbytes)
        if parts:
            self._fill(parts, memory)
            places = np.concatenate([part.places for part in parts])
            addresses[places] = memory.data_ptr() + np.arange(count, dtype=np.int64) * self._row_nbytes
        return addresses, memory

    def _fill(self, parts: Sequence[_Part], out: torch.Tensor) -> None:
        """Rows into their memory, by way of what lies between them."""
        nbytes = np.cumsum([0, *(part.nbytes for part in parts)])
        buffer = self._buffer(int(nbytes[-1]))
        ranges = [part.ranges(int(at)) for part, at in zip(parts, nbytes, strict=False)]
        bad = self._reader.read(np.concatenate(ranges), buffer)
        if bad is not None:
            tensor = parts[int(np.searchsorted(np.cumsum([len(each) for each in ranges]), bad, side="right"))].tensor
            msg = f"{tensor.path}: rows of {tensor.name} could not be read; was the file cut, or is the disk faulty?"
            raise CorruptFileError(msg, path=tensor.path, tensor=tensor.name)
        addresses = [part.read_to(int(at)) for part, at in zip(parts, nbytes, strict=False)]
        jobs = Jobs()
        rows = torch.from_numpy(np.concatenate(addresses) + buffer)
        jobs.add(self.anywhere, rows, out)
        jobs.run()

    def _buffer(self, nbytes: int) -> int:
        """Address of memory to read into, on the boundary of a page."""
        if self._scratch is None or len(self._scratch) < nbytes:
            self._scratch = mmap.mmap(-1, max(nbytes, 1 << 20))
        return int(np.frombuffer(self._scratch, np.uint8).__array_interface__["data"][0])

    def close(self) -> None:
        """Let go of the files; may be called twice."""
        self._open.close()

    def __del__(self) -> None:
        # Without the attribute the constructor failed, and has closed what it had opened.
        if hasattr(self, "_open"):
            self.close()
