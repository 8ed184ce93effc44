"""Which pages of a file are in the page cache, and dropping them.

``cachestat(2)`` (Linux 6.5) counts the cached pages of a file's range in one call without touching any page. Older
kernels have ``mincore(2)`` on a map, page by page. Where neither exists (Windows), the answer is unknown.
"""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from jasper_store.paging import syscalls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    FileOrFd: TypeAlias = int | str | os.PathLike[str]

__all__ = ["PAGE", "cached_bytes", "drop_cache", "mapped_cached_bytes"]

PAGE = mmap.PAGESIZE
"""Bytes per page of memory."""

_MINCORE_WINDOW = 1 << 30  # One byte of answer per page: 256 KiB at a time.


@contextmanager
def _descriptor(file: FileOrFd) -> Iterator[int]:
    if isinstance(file, int):
        yield file
        return
    fd = os.open(file, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def cached_bytes(file: FileOrFd, offset: int, nbytes: int) -> int | None:
    """Bytes of a file's range that are in the page cache, whichever process read them.

    Args:
        file: an open descriptor (one system call) or a path (two more).
        offset: first byte.
        nbytes: length of the range.

    Returns:
        Bytes, counted in whole pages and at most ``nbytes``; None if the system cannot tell.
    """
    if nbytes <= 0:
        return 0
    with _descriptor(file) as fd:
        pages, error = syscalls.cachestat(fd, offset, nbytes)
        if not error:
            return min(pages * PAGE, nbytes)
        # For files of other owners newer kernels refuse, and with older ones mincore(2) reports every page as cached.
        info = os.fstat(fd)
        if error != errno.ENOSYS or os.name == "nt" or not _owns(info):
            return None
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        stop = min(offset + nbytes, info.st_size)
        if stop <= start:
            return 0
        with mmap.mmap(fd, stop - start, access=mmap.ACCESS_READ, offset=start) as window:
            array = np.frombuffer(window, dtype=np.uint8)
            address = int(array.__array_interface__["data"][0])
            del array
            return mapped_cached_bytes(address + offset - start, stop - offset)


def _owns(info: os.stat_result) -> bool:
    return os.geteuid() in {0, info.st_uid}


def mapped_cached_bytes(address: int, nbytes: int) -> int | None:
    """Bytes of a mapped range whose pages are in memory, by mincore(2); None if the system cannot tell.

    Since Linux 5.2 the answer is right only for files that the caller owns or may write to; for others every page
    counts as present. Addresses beyond the end of the file count as absent.
    """
    start = address - address % PAGE
    stop = address + nbytes
    resident = 0
    while start < stop:
        length = min(stop - start, _MINCORE_WINDOW)
        vector = np.empty(-(-length // PAGE), dtype=np.uint8)
        if syscalls.mincore(start, length, int(vector.__array_interface__["data"][0])):
            return None
        resident += int(np.count_nonzero(vector & 1)) * PAGE
        start += _MINCORE_WINDOW
    return min(resident, nbytes)


def drop_cache(file: FileOrFd, offset: int, nbytes: int) -> bool:
    """Ask the kernel to drop a file's range from the page cache; pages that are dirty or mapped by a process stay.

    Returns:
        Whether the system has such advice.
    """
    if not hasattr(os, "posix_fadvise") or nbytes <= 0:
        return False
    with _descriptor(file) as fd:
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
    return True
