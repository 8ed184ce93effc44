"""System calls through the C library. Each function returns an error number instead of raising.

Nothing is loaded at import. A call that this system does not have returns ``ENOSYS``, as with an old kernel or a
seccomp filter, so callers handle all of these cases in one way.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import platform
import sys

__all__ = ["cachestat", "fallocate", "madvise", "mincore", "pidfd_open", "process_madvise"]

# System calls added since Linux 5.1 have one number on every architecture but alpha and mips.
_PIDFD_OPEN = 434
_PROCESS_MADVISE = 440
_CACHESTAT = 451
_UNIFIED = frozenset({"x86_64", "amd64", "aarch64", "arm64", "ppc64", "ppc64le", "s390x", "riscv64", "loongarch64"})


class _CacheRange(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class _CacheStat(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")]


@functools.cache
def libc() -> ctypes.CDLL | None:
    """The C library of this process; None on Windows."""
    if sys.platform == "win32":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.madvise.restype = ctypes.c_int
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    library.mincore.restype = ctypes.c_int
    if hasattr(library, "syscall"):
        library.syscall.restype = ctypes.c_long
    return library


@functools.cache
def _has_numbers() -> bool:
    # 64-bit processes only: callers lay out struct iovec as two 8-byte numbers.
    wide = ctypes.sizeof(ctypes.c_void_p) == 8
    return sys.platform == "linux" and wide and platform.machine().lower() in _UNIFIED


def madvise(address: int, nbytes: int, advice: int) -> int:
    """Call madvise; 0 or an error number."""
    library = libc()
    if library is None:
        return errno.ENOSYS
    return 0 if library.madvise(address, nbytes, advice) == 0 else ctypes.get_errno()


def mincore(address: int, nbytes: int, vector: int) -> int:
    """Call mincore into one byte per page at address ``vector``; 0 or an error number."""
    library = libc()
    if library is None:
        return errno.ENOSYS
    return 0 if library.mincore(address, nbytes, vector) == 0 else ctypes.get_errno()


def fallocate(fd: int, nbytes: int) -> int:
    """Call fallocate for a file's first bytes, which grows it to them; 0 or an error number.

    Where the file system has no such call, ``posix_fallocate`` writes a byte to each block instead; this one says so.
    """
    call = getattr(libc(), "fallocate", None)
    if call is None or ctypes.sizeof(ctypes.c_void_p) != 8:
        return errno.ENOSYS
    while call(ctypes.c_int(fd), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(nbytes)) != 0:
        if ctypes.get_errno() != errno.EINTR:
            return ctypes.get_errno()
    return 0


def _syscall(number: int, *arguments: ctypes.c_long | ctypes.c_void_p | ctypes.c_ulong) -> tuple[int, int]:
    library = libc()
    if library is None or not _has_numbers():
        return -1, errno.ENOSYS
    result = int(library.syscall(ctypes.c_long(number), *arguments))
    return result, 0 if result >= 0 else ctypes.get_errno()


def pidfd_open(pid: int) -> tuple[int, int]:
    """Call pidfd_open; (file descriptor, 0) or (-1, error number)."""
    return _syscall(_PIDFD_OPEN, ctypes.c_long(pid), ctypes.c_ulong(0))


def process_madvise(pidfd: int, iovec: int, count: int, advice: int) -> tuple[int, int]:
    """Call process_madvise for ``count`` (address, bytes) pairs at address ``iovec``.

    Returns:
        (bytes advised, which may be fewer than asked for; 0), or (-1, error number).
    """
    return _syscall(
        _PROCESS_MADVISE,
        ctypes.c_long(pidfd),
        ctypes.c_void_p(iovec),
        ctypes.c_ulong(count),
        ctypes.c_long(advice),
        ctypes.c_ulong(0),
    )


def cachestat(fd: int, offset: int, nbytes: int) -> tuple[int, int]:
    """Call cachestat; (pages of the file's range that are in the page cache, 0) or (-1, error number)."""
    asked, found = _CacheRange(offset, nbytes), _CacheStat()
    result, error = _syscall(
        _CACHESTAT,
        ctypes.c_long(fd),
        ctypes.c_void_p(ctypes.addressof(asked)),
        ctypes.c_void_p(ctypes.addressof(found)),
        ctypes.c_ulong(0),
    )
    return (-1, error) if result < 0 else (int(found.cached), 0)
