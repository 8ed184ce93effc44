"""Scattered rows of files read into memory: many reads at once, past the page cache, and the interpreter left alone.

What is Python here is done once per some thousand rows: planning the reads in numpy held the interpreter for half a
millisecond each time, and the trainer's thread waited for it (docs/notes-paging.md).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from jasper_store.memory.library import library
from jasper_store.memory.residency import PAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["IN_MEMORY", "RowReader", "RowsOf", "UnreadableError"]

_GAP: Final = 3
"""Pages between two rows that are read along: a read costs as much as 12 KiB more of one."""
IN_MEMORY: Final = -1
_NO_MEMORY: Final = -1
_ABSENT, _UNREADABLE = 1, 2

_idle: list[tuple[int, int]] = []
"""Queues, with what they have read into, for the next who needs one, and the process that they are of. To give one back
to the system waits 36 ms for all processors (an RCU grace period), and a pass over a small dataset takes ten times that."""
_MOST_IDLE: Final = 4


def _opened() -> int:
    """A queue of this process; a forked child's are not its parent's."""
    while True:
        try:
            process, reader = _idle.pop()
        except IndexError:
            break
        if process == os.getpid():
            return reader
    made: int | None = library().jasper_open_reader()
    if made is None:
        raise MemoryError("no memory for a reader of rows")
    return made


class RowsOf(NamedTuple):
    """Where the rows of a tensor lie.

    Attributes:
        file: a descriptor opened with O_DIRECT; -1 if they are in memory.
        base: of row 0: its offset in the file, or its address.
        stride: bytes from one row to the next.
        n_rows: how many there are.
        end: byte of the file after the last row.
    """

    file: int
    base: int
    stride: int
    n_rows: int
    end: int = 0


class UnreadableError(OSError):
    """A file could not be read as far as a row.

    Attributes:
        tensor: number of the tensor.
    """

    def __init__(self, tensor: int) -> None:
        super().__init__(f"a row of tensor {tensor} could not be read")
        self.tensor = tensor


class RowReader:
    """Reads rows of some tensors. For one thread at a time; the library has to be there.

    Close it, so that the next one finds its queue.

    Args:
        tensors: where their rows lie.
        row_nbytes: bytes of a row, of each of them.
    """

    def __init__(self, tensors: Sequence[RowsOf], row_nbytes: int) -> None:
        self._tensors = np.array(tensors, np.int64).reshape(-1, len(RowsOf._fields))
        self._row_nbytes = row_nbytes
        self._reader: int | None = _opened()

    def read(self, which: np.ndarray, rows: np.ndarray, zeros: int, target: int) -> np.ndarray:
        """Have rows in memory.

        Args:
            which: tensor number of each, int64 [n]; less than 0 is the row at address ``zeros``.
            rows: row of each, int64 [n].
            zeros: address of a row.
            target: address of room for those rows that are in files.

        Returns:
            Address of each row, int64 [n].

        Raises:
            IndexError: a row that its tensor does not have.
            UnreadableError: a file could not be read.
            MemoryError: no room for what is read.
        """
        if self._reader is None:
            raise ValueError("the reader is closed")
        which, rows = np.ascontiguousarray(which, np.int64), np.ascontiguousarray(rows, np.int64)
        addresses = np.empty(len(rows), np.int64)
        failed = library().jasper_read_rows(
            *(self._reader, _address(self._tensors), len(self._tensors), self._row_nbytes, _GAP * PAGE),
            *(_address(which), _address(rows), len(rows), zeros, target, _address(addresses)),
        )
        if failed == _NO_MEMORY:
            raise MemoryError(f"no memory to read {len(rows)} rows by")
        tensor, kind = divmod(failed, 3)
        if kind == _ABSENT:
            raise IndexError(
                f"a row that tensor {tensor} does not have; its rows are 0 to {self._tensors[tensor, 3] - 1}"
            )
        if kind == _UNREADABLE:
            raise UnreadableError(tensor)
        return addresses

    def close(self) -> None:
        """Give the queue back; may be called twice."""
        reader, self._reader = self._reader, None
        if reader is None:
            return
        if len(_idle) < _MOST_IDLE:
            _idle.append((os.getpid(), reader))
        else:
            library().jasper_close_reader(reader)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
