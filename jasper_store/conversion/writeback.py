"""Flushing, dropping and proving a file while it is still being written.

A writer that is much faster than the disk fills memory with dirty pages and pays for it all in the final fsync.
Here a thread follows the writer: it asks the kernel to write each window out at once, waits for the window two
behind, drops its pages where the file is large, and reads it back to hash what the disk holds. So the proof costs
little time of its own, and the page cache keeps what other programs had there.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import queue
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

import xxhash

from jasper_store.errors import InsufficientMemoryError
from jasper_store.formats.files import system_refusals

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["WriteBehind", "drop_pages"]

WINDOW_NBYTES = 32 << 20
_BEHIND = 2  # windows the disk may be writing while the next one is being filled
_READ_NBYTES = 4 << 20
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4  # SYNC_FILE_RANGE_*


def drop_pages(fd: int, offset: int = 0, nbytes: int = 0) -> None:
    """Ask the kernel to drop clean pages of a file that are not mapped; ``nbytes`` 0 means to the end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


class WriteBehind:
    """Follows one file that is being written front to back; one thread of its own.

    Args:
        path: the file, which exists.
        start: byte offset at which the values begin, if they are written in order from there as they are:
            then :meth:`finish` returns the checksum of what was read back. ``None`` flushes and drops only.
        drop: whether to drop the pages of what has reached the disk, so that it is read back from there.
    """

    def __init__(self, path: Path, *, start: int | None, drop: bool) -> None:
        self._start = start
        self._drop = drop
        self._marked = 0
        self._windows: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._pending: deque[tuple[int, int]] = deque()
        self._digest = xxhash.xxh3_128()
        self._buffer = bytearray(_READ_NBYTES if start is not None else 0)
        self._read = 0
        self._error: BaseException | None = None
        self._abandoned = False
        self._file = path.open("rb", buffering=0)
        self._thread = threading.Thread(target=self._run, name=f"write behind {path.name}")
        try:
            with system_refusals(path):
                self._thread.start()
        except InsufficientMemoryError:
            self._file.close()
            raise

    def written(self, nbytes: int) -> None:
        """Tell how many bytes of values have been handed to the system so far."""
        if nbytes - self._marked >= WINDOW_NBYTES:
            self._windows.put((self._marked, nbytes - self._marked))
            self._marked = nbytes

    def finish(self, nbytes: int) -> str | None:
        """Flush the rest and wait for it.

        Where nothing is dropped and nothing read back here, the rest is only begun to be written: the disk works on it
        while the values are proven, and publishing the file waits for it.

        Returns:
            xxh3-128 of the ``nbytes`` of values as read back from the file, in hex; ``None`` where ``start`` was
            ``None`` or the file is shorter.

        Raises:
            OSError: the disk could not take the data.
        """
        if self._start is None and not self._drop:
            _sync_range(self._file.fileno(), 0, 0, _WRITE)
            self.close()
            if self._error is not None:
                raise self._error
            return None
        if nbytes > self._marked:
            self._windows.put((self._marked, nbytes - self._marked))
        self._windows.put(None)
        self._thread.join()
        self._file.close()
        if self._error is not None:
            raise self._error
        return str(self._digest.hexdigest()) if self._start is not None and self._read == nbytes else None

    def close(self) -> None:
        """Stop the thread without flushing or reading what is left; does nothing after :meth:`finish`."""
        if not self._file.closed:
            self._abandoned = True
            self._windows.put(None)
            self._thread.join()
            self._file.close()

    def _run(self) -> None:
        fd = self._file.fileno()
        try:
            while (window := self._windows.get()) is not None and not self._abandoned:
                _sync_range(fd, *self._range(window), _WRITE)
                self._pending.append(window)
                if len(self._pending) > _BEHIND:
                    self._settle(self._pending.popleft())
            if self._abandoned:
                return
            os.fsync(fd)
            while self._pending:
                self._settle(self._pending.popleft())
        except BaseException as exc:  # noqa: BLE001 - raised by finish(), in the thread that writes
            self._error = exc

    def _range(self, window: tuple[int, int]) -> tuple[int, int]:
        """Bytes of the file that a window covers; where the layout is not known, all of it (0, 0)."""
        return (0, 0) if self._start is None else (self._start + window[0], window[1])

    def _settle(self, window: tuple[int, int]) -> None:
        """Wait until a window is on the disk, then drop it and read it back."""
        fd = self._file.fileno()
        offset, nbytes = self._range(window)
        _sync_range(fd, offset, nbytes, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
        if self._drop:
            drop_pages(fd, offset, nbytes)
        if self._start is None:
            return
        self._file.seek(offset)
        view = memoryview(self._buffer)
        while nbytes and (got := self._file.readinto(view[: min(nbytes, len(view))])):
            self._digest.update(view[:got])
            self._read += got
            nbytes -= got
        if self._drop:
            drop_pages(fd, offset, window[1])


@functools.cache
def _load_sync_range() -> Any:
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def _sync_range(fd: int, offset: int, nbytes: int, flags: int) -> None:
    """sync_file_range(2); where there is none, the fsync at the end does the work."""
    function = _load_sync_range()
    if function is not None and function(fd, offset, nbytes, flags) != 0:
        code = ctypes.get_errno()
        if code not in {errno.ENOSYS, errno.ESPIPE, errno.EINVAL}:
            raise OSError(code, os.strerror(code))
