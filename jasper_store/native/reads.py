"""Scattered rows of files read into memory: many reads at once, past the page cache, and the interpreter left alone.

What is Python here is done once per some thousand rows, and no thread of Python's does it: to plan the reads in numpy
held the interpreter for half a millisecond each time, and the trainer's thread waited for it (docs/notes-paging.md).
"""

from __future__ import annotations

import atexit
import os
from mmap import PAGESIZE
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from jasper_store.native.library import library

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["IN_MEMORY", "READER_NBYTES", "RowReader", "RowsOf", "UnreadableError"]

_GAP: Final = 3
"""Pages between two rows that are read along: a read costs as much as 12 KiB more of one."""
READER_NBYTES: Final = 4 << 20
"""Memory that a reader reads into, whatever it reads: 32 reads at a time, of 128 KiB each at most."""
IN_MEMORY: Final = -1
_NO_MEMORY, _ANOTHER_PROCESS = -1, -2
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
    """Reads rows of some tensors while other work goes on. For one thread at a time; the library has to be there.

    Close it, so that the next one finds its queue.

    Args:
        tensors: where their rows lie.
        row_nbytes: bytes of a row, of each of them.
    """

    def __init__(self, tensors: Sequence[RowsOf], row_nbytes: int) -> None:
        self._tensors = np.array(tensors, np.int64).reshape(-1, len(RowsOf._fields))
        self._row_nbytes = row_nbytes
        self._reader: int | None = _opened()
        self._process = os.getpid()
        self._needed: tuple[object, ...] = ()
        self._addresses = np.empty(0, np.int64)

    def begin(self, which: np.ndarray, rows: np.ndarray, zeros: int, target: int) -> None:
        """Begin to have rows in memory; :meth:`finish` it before the next, and before the memory named here goes.

        Args:
            which: tensor number of each, int64 [n]; less than 0 is the row at address ``zeros``.
            rows: row of each, int64 [n].
            zeros: address of a row.
            target: address of room for those rows that are in files.

        Raises:
            ValueError: the reader is closed, or has begun something already.
            MemoryError: no room for what is read.
        """
        if self._reader is None or self._needed:
            raise ValueError("the reader has something to finish" if self._needed else "the reader is closed")
        which, rows = np.ascontiguousarray(which, np.int64), np.ascontiguousarray(rows, np.int64)
        self._addresses = np.empty(len(rows), np.int64)
        begun = library().jasper_begin_read(
            *(self._reader, _address(self._tensors), len(self._tensors), self._row_nbytes, _GAP * PAGESIZE),
            *(_address(which), _address(rows), len(rows), zeros, target, _address(self._addresses)),
        )
        if not begun:
            raise MemoryError(f"no memory to read {len(rows)} rows by")
        self._needed = (which, rows)
        _busy.add(self)

    def finish(self) -> np.ndarray:
        """Wait for what was begun.

        Returns:
            Address of each row, int64 [n].

        Raises:
            IndexError: a row that its tensor does not have.
            UnreadableError: a file could not be read.
            MemoryError: no room for what is read.
            RuntimeError: the process that began it was forked, and this is the child.
        """
        failed = self._wait()
        if failed == _NO_MEMORY:
            raise MemoryError(f"no memory to read {len(self._addresses)} rows by")
        if failed == _ANOTHER_PROCESS:
            raise RuntimeError("rows that were being read when the process was forked are not there in the child")
        tensor, kind = divmod(failed, 3)
        if kind == _ABSENT:
            raise IndexError(
                f"a row that tensor {tensor} does not have; its rows are 0 to {self._tensors[tensor, 3] - 1}"
            )
        if kind == _UNREADABLE:
            raise UnreadableError(tensor)
        return self._addresses

    def _wait(self) -> int:
        failed: int = library().jasper_finish_read(self._reader) if self._reader is not None else 0
        self._needed = ()
        _busy.discard(self)
        return failed

    def close(self) -> None:
        """Give the queue back, when what was begun is over; may be called twice."""
        if self._reader is None:
            return
        self._wait()
        reader, self._reader = self._reader, None
        if self._process != os.getpid():
            return  # its queue is the parent's
        if len(_idle) < _MOST_IDLE:
            _idle.append((self._process, reader))
        else:
            library().jasper_close_reader(reader)


_busy: set[RowReader] = set()


def _finish_all() -> None:
    for reader in tuple(_busy):
        reader._wait()  # noqa: SLF001 - of this module


# A helper may be copying into memory that goes with the interpreter.
atexit.register(_finish_all)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
