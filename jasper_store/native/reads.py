"""Scattered rows of files, read into memory by the compiled library: many reads in flight, past the page cache.

Python code runs once per some thousand rows, and no Python thread is involved: planning the reads in numpy held the
interpreter lock for half a millisecond each time, and the trainer's thread waited for it (docs/notes-paging.md).
"""

from __future__ import annotations

import atexit
import os
from mmap import PAGESIZE
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from jasper_store.native.library import library

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["IN_MEMORY", "READER_NBYTES", "AsyncRowReader", "AsyncRunReader", "RowLayout", "UnreadableError"]

_MAX_GAP_PAGES: Final = 3
"""Rows at most this many pages apart are read together: a separate read costs as much as 12 KiB more of one."""
READER_NBYTES: Final = 4 << 20
"""Bytes of a reader's buffer, whatever it reads: up to 32 reads in flight, of up to 128 KiB each."""
IN_MEMORY: Final = -1
# As the enums in reads.c. Errors of a tensor are tensor << 16 | number of the system's error << 2 | kind.
_NO_MEMORY, _FORKED = -1, -2
_ROW_MISSING = 1

_idle: list[tuple[int, int]] = []
"""(process id, reader of the library) of closed readers, for the next :class:`AsyncRowReader` of the same process.
Destroying a queue waits 36 ms for an RCU grace period, and a pass over a small dataset takes only ten times that."""
_MAX_IDLE: Final = 4


def _acquire_reader() -> int:
    """A reader of the library, an idle one if there is one. Queues of a parent process do not work in a forked child."""
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


class RowLayout(NamedTuple):
    """Where the rows of a tensor lie.

    Attributes:
        file: a descriptor opened with O_DIRECT; -1 if the rows are in memory.
        base: of row 0: its offset in the file, or its address.
        stride: bytes from one row to the next.
        n_rows: number of rows.
        end: offset in the file of the byte after the last row.
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
        errno: what the system said; 0 if it said nothing, because the file ends before the row.
    """

    def __init__(self, tensor: int, code: int = 0) -> None:
        super().__init__(code, os.strerror(code) if code else "the file ends before a row of it")
        self.tensor = tensor


class _Reader:
    """A reader of the library, and the request that it works at. For one thread at a time."""

    def __init__(self) -> None:
        self._reader: int | None = _acquire_reader()
        self._process = os.getpid()
        # Of begin(); the library reads these arrays until the request is finished. Empty: nothing is begun.
        self._arguments: tuple[Any, ...] = ()

    def _require_idle(self) -> None:
        if self._reader is None or self._arguments:
            raise ValueError("the reader has something to finish" if self._arguments else "the reader is closed")

    def _begun(self, *arguments: Any) -> None:
        self._arguments, self._process = arguments, os.getpid()
        _unfinished.add(self)

    def _wait(self) -> int:
        error: int = library().jasper_finish_read(self._reader) if self._reader is not None else 0
        self._arguments = ()
        _unfinished.discard(self)
        return error

    def close(self) -> None:
        """Wait for an unfinished request, then give the queue back. May be called twice."""
        if self._reader is None:
            return
        self._wait()
        reader, self._reader = self._reader, None
        if self._process != os.getpid():
            return  # its queue is the parent's
        if len(_idle) < _MAX_IDLE:
            _idle.append((self._process, reader))
        else:
            library().jasper_close_reader(reader)


class AsyncRunReader(_Reader):
    """Reads runs of bytes of files to memory in the background, without a copy. Needs the compiled library.

    For one thread at a time. Close it, so that the next reader can reuse its queue.
    """

    def begin(self, runs: np.ndarray) -> None:
        """Begin to read. Call :meth:`finish` before the next, and before the memory is freed.

        Args:
            runs: int64 [n, 5]: a descriptor opened with O_DIRECT, offset and number of bytes, of which as many as the
                fourth number says have to be there, and the address to read to. Offset, number and address are
                multiples of a page.

        Raises:
            ValueError: the reader is closed, or has begun something already.
            MemoryError: no memory for the request.
        """
        self._require_idle()
        runs = np.ascontiguousarray(runs, np.int64)
        if not library().jasper_begin_runs(self._reader, _address(runs), len(runs)):
            raise MemoryError(f"no memory to read {len(runs)} runs by")
        self._begun(runs)

    def finish(self) -> None:
        """Wait for the bytes.

        Raises:
            UnreadableError: a file could not be read; ``tensor`` is the number of the run.
            RuntimeError: this process was forked from the one that began the request.
        """
        error = self._wait()
        if error == _FORKED:
            raise RuntimeError("bytes that were being read when the process was forked are not there in the child")
        if error:
            raise UnreadableError(error >> 16, error >> 2 & 0x3FFF)


class AsyncRowReader(_Reader):
    """Reads rows of several tensors in the background. For one thread at a time; needs the compiled library.

    Close it, so that the next reader can reuse its queue.

    Args:
        tensors: where the rows of each tensor lie.
        row_nbytes: bytes of a row, the same for all tensors.
    """

    def __init__(self, tensors: Sequence[RowLayout], row_nbytes: int) -> None:
        super().__init__()
        self._tensors = np.array(tensors, np.int64).reshape(-1, len(RowLayout._fields))
        self._row_nbytes = row_nbytes
        self._addresses = np.empty(0, np.int64)

    def begin(self, tensor_of: np.ndarray, rows: np.ndarray, zero_row: int, target: int) -> None:
        """Begin to read rows. Call :meth:`finish` before the next, and before the memory named here is freed.

        Args:
            tensor_of: tensor number of each row, int64 [n]; less than 0 names the row at address ``zero_row``.
            rows: row number in its tensor, int64 [n].
            zero_row: address of a row.
            target: address of memory for those rows that are in files.

        Raises:
            ValueError: the reader is closed, or has begun something already.
            MemoryError: no memory for the request.
        """
        self._require_idle()
        tensor_of, rows = np.ascontiguousarray(tensor_of, np.int64), np.ascontiguousarray(rows, np.int64)
        self._addresses = np.empty(len(rows), np.int64)
        self._begin(tensor_of, rows, zero_row, target)

    def _begin(self, tensor_of: np.ndarray, rows: np.ndarray, zero_row: int, target: int) -> None:
        begun = library().jasper_begin_read(
            *(self._reader, _address(self._tensors), len(self._tensors), self._row_nbytes, _MAX_GAP_PAGES * PAGESIZE),
            *(_address(tensor_of), _address(rows), len(rows), zero_row, target, _address(self._addresses)),
        )
        if not begun:
            raise MemoryError(f"no memory to read {len(rows)} rows by")
        self._begun(tensor_of, rows, zero_row, target)

    def finish(self) -> np.ndarray:
        """Wait for the rows. In a process that was forked since :meth:`begin`, they are read again.

        Returns:
            Address of each row, int64 [n].

        Raises:
            IndexError: a row that its tensor does not have.
            UnreadableError: a file could not be read.
            MemoryError: no memory for the request.
        """
        arguments, error = self._arguments, self._wait()
        if error == _FORKED:
            self._begin(*arguments)
            error = self._wait()
        if error == _NO_MEMORY:
            raise MemoryError(f"no memory to read {len(self._addresses)} rows by")
        tensor, kind = error >> 16, error & 3
        if kind == _ROW_MISSING:
            raise IndexError(
                f"a row that tensor {tensor} does not have; its rows are 0 to {self._tensors[tensor, 3] - 1}"
            )
        if kind:
            raise UnreadableError(tensor, error >> 2 & 0x3FFF)
        return self._addresses


_unfinished: set[_Reader] = set()


def _finish_all() -> None:
    for reader in tuple(_unfinished):
        reader._wait()  # noqa: SLF001 - of this module


# A helper thread may be copying into memory that is freed when the interpreter ends.
atexit.register(_finish_all)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
