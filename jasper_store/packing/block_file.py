"""Blocks written at their places in preallocated files, past the page cache where the file system allows it."""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import torch
import xxhash

from jasper_store.packing.layout import PAGE
from jasper_store.paging.syscalls import fallocate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["BlockFiles"]

_THREADS: Final = 4
_IN_FLIGHT: Final = 12


class BlockFiles:
    """The files of a layout, open for writing. One thread writes; hashing and writing go on beside it.

    Args:
        paths: the files; those that are there keep their content.
        sizes: bytes of each.

    Raises:
        OSError: they cannot be made, or there is no room.
    """

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int]) -> None:
        with ExitStack() as undo:
            self._files = []
            for path, size in zip(paths, sizes, strict=True):
                _allocate(path, size)
                fd = _open(path)
                undo.callback(os.close, fd)
                self._files.append(fd)
            self._threads = ThreadPoolExecutor(_THREADS, "jasper-pack")
            undo.callback(self._threads.shutdown, cancel_futures=True)
            self._waiting: deque[tuple[object, Future[list[str]]]] = deque()
            self._free: list[mmap.mmap] = []
            self.done: list[tuple[object, list[str]]] = []
            self._open = undo.pop_all()

    def buffer(self, nbytes: int) -> tuple[mmap.mmap, torch.Tensor]:
        """Memory to fill and pass to :meth:`write`, of some pages: as such and as a tensor of bytes."""
        size = max(-(-nbytes // PAGE), 1) * PAGE
        while len(self._waiting) >= _IN_FLIGHT:
            self._settle()
        for number, memory in enumerate(self._free):
            if len(memory) >= size:
                del self._free[number]
                break
        else:
            memory = mmap.mmap(-1, size)
        return memory, torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]

    def write(
        self, mark: object, file: int, offset: int, memory: mmap.mmap, nbytes: int, pieces: Sequence[tuple[int, int]]
    ) -> None:
        """Write the first bytes of some memory, which then belongs to this object, and hash pieces of them.

        Args:
            mark: given back with the hashes, in :attr:`done`.
            file: number of the file.
            offset: where, a multiple of a page.
            memory: from :meth:`buffer`.
            nbytes: how many, a multiple of a page.
            pieces: begin and end of each piece.
        """
        job = self._threads.submit(self._write, self._files[file], offset, memory, nbytes, pieces)
        self._waiting.append((mark, job))

    def _write(
        self, fd: int, offset: int, memory: mmap.mmap, nbytes: int, pieces: Sequence[tuple[int, int]]
    ) -> list[str]:
        view = memoryview(memory)
        try:
            found = [xxhash.xxh3_128_hexdigest(view[begin:end]) for begin, end in pieces]
            done = 0
            while done < nbytes:
                done += os.pwrite(fd, view[done:nbytes], offset + done)
        finally:
            view.release()
        self._free.append(memory)
        return found

    def _settle(self) -> None:
        mark, job = self._waiting.popleft()
        self.done.append((mark, job.result()))

    def flush(self) -> list[tuple[object, list[str]]]:
        """Wait until all is on the disk; the marks and hashes since the last time, in the order of the writes."""
        while self._waiting:
            self._settle()
        for fd in self._files:
            os.fdatasync(fd) if hasattr(os, "fdatasync") else os.fsync(fd)
        found, self.done = self.done, []
        return found

    def close(self) -> None:
        """Wait for writes at work, and close the files. May be called twice."""
        self._open.close()


def _open(path: Path) -> int:
    flags = os.O_RDWR | getattr(os, "O_BINARY", 0)
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        try:
            return os.open(path, flags | direct)
        except OSError as exc:
            if exc.errno not in {errno.EINVAL, errno.ENOTSUP}:
                raise
    return os.open(path, flags)


def _allocate(path: Path, size: int) -> None:
    """Give a file its size, and its room on the disk where the system can; what it holds stays."""
    with path.open("ab") as file:
        refused = fallocate(file.fileno(), size) if size else 0
        if refused not in {0, errno.ENOSYS, errno.EOPNOTSUPP}:
            raise OSError(refused, os.strerror(refused), str(path))
        os.ftruncate(file.fileno(), size)
