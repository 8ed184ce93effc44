"""Pages of mapped files: advice per access mode, announcing rows before they are touched, letting go.

Random rows of a map that is not cached are slow because each page fault waits for the disk alone. Announcing
hands the kernel all pages of a batch at once, so the disk works on them together. Everything here takes address
ranges, so it serves every format that can be mapped; and everything here is a hint: where the system has no such
call nothing happens, and values read are the same with and without.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from jasper_store.paging import residency as _residency, syscalls
from jasper_store.paging.residency import PAGE, drop_cache

if TYPE_CHECKING:
    from jasper_store.paging.residency import FileOrFd

__all__ = [
    "PAGE",
    "Access",
    "Backend",
    "MadviseBatcher",
    "advise",
    "drop",
    "drop_cache",
    "drop_ranges",
    "madvise_batcher",
    "pieces",
    "populate",
    "residency",
    "row_ranges",
    "span",
]

Access: TypeAlias = Literal["normal", "random", "sequential", "hugepage"]
Backend: TypeAlias = Literal["process_madvise", "madvise", "none"]

_ADVICE: dict[str, int] = {"normal": 0, "random": 1, "sequential": 2, "hugepage": 14}
# By number: Python names the newer ones only from 3.13 on, if its build machine's headers had them.
_WILLNEED = 3
_COLD = 20
_PAGEOUT = 21
_POPULATE_READ = 22
_MAX_RANGES = 1024  # UIO_MAXIOV, the most that process_madvise takes.
# Of a longer range the kernel reads no more than the file's read-ahead size, and passes over the rest in silence
# (force_page_cache_ra). 128 KiB is the usual setting.
_MAX_RANGE_NBYTES = 128 << 10
_MAX_REFUSED = 8  # Ranges that are not mapped (any more) before a batch's announcement is given up.


def advise(address: int, nbytes: int, how: Access) -> bool:
    """Tell the kernel how the pages of a range will be touched.

    ``"random"`` stops its read-ahead, ``"sequential"`` doubles it, ``"normal"`` brings it back, ``"hugepage"``
    asks for huge pages. Pages that the range only shares with its neighbours are advised too.

    Returns:
        Whether the system took the advice; False on Windows.
    """
    start, length = _outward(address, nbytes)
    return length > 0 and syscalls.madvise(start, length, _ADVICE[how]) == 0


def populate(address: int, nbytes: int) -> bool:
    """Bring a range into memory and into this process's page table, reading what is missing (Linux 5.14).

    Returns:
        True when every page is there; False where the call does not exist or a page could not be read, and the
        caller reads the range in another way.
    """
    start, length = _outward(address, nbytes)
    return length > 0 and syscalls.madvise(start, length, _POPULATE_READ) == 0


def drop(address: int, nbytes: int, file: FileOrFd | None = None, offset: int = 0) -> bool:
    """Let go of the memory behind a mapped range; private writes made through the map survive.

    ``MADV_DONTNEED`` is cheaper by a quarter and would throw such writes away, so pages go by ``MADV_PAGEOUT``
    (Linux 5.4; 30 ns a page). It acts only on files that the caller owns or may write to, and on pages that no
    other process maps; the rest is marked as first to be reclaimed (``MADV_COLD``). Pages that were announced
    and never touched are known to the file alone, hence ``file``. Pages shared with neighbours stay.

    Args:
        address: start of the range.
        nbytes: its length.
        file: descriptor or path of the mapped file.
        offset: byte of the file that lies at ``address``.

    Returns:
        Whether the system has any such advice; False on Windows and macOS.
    """
    start = -(-address // PAGE) * PAGE
    length = (address + nbytes) // PAGE * PAGE - start
    if length <= 0:
        return False
    taken = syscalls.madvise(start, length, _PAGEOUT) == 0
    taken |= syscalls.madvise(start, length, _COLD) == 0
    if file is not None:
        taken |= drop_cache(file, offset + start - address, length)
    return taken


def drop_ranges(starts: np.ndarray, stops: np.ndarray) -> bool:
    """Let go of the memory behind many ranges in as few system calls as there may be; see :func:`drop`.

    Pages that this process never touched stay in the page cache: they are known to the file alone. So do pages that
    lie in a range only in part.

    Args:
        starts: addresses, int64 [k].
        stops: addresses of the byte after each [k].

    Returns:
        Whether the system has any such advice; False on Windows and macOS.
    """
    first, last = -(-starts // PAGE) * PAGE, stops // PAGE * PAGE
    whole = first < last
    ranges = np.stack([first[whole], (last - first)[whole]], axis=1)
    taken = _BATCHER.advise(ranges, _PAGEOUT)
    return _BATCHER.advise(ranges, _COLD) or taken


def residency(address: int, nbytes: int, file: FileOrFd | None = None, offset: int = 0) -> int:
    """Bytes of a mapped range that are in the page cache; 0 where the system cannot say.

    Args:
        address: start of the range.
        nbytes: its length.
        file: descriptor or path of the mapped file; with it the answer comes from ``cachestat(2)`` where that
            exists, which tells the truth about files of other owners too, or refuses.
        offset: byte of the file that lies at ``address``.
    """
    if nbytes <= 0:
        return 0
    found = (
        _residency.mapped_cached_bytes(address, nbytes)
        if file is None
        else _residency.cached_bytes(file, offset, nbytes)
    )
    return found or 0


def _outward(address: int, nbytes: int) -> tuple[int, int]:
    start = address - address % PAGE
    return start, -(-(address + nbytes) // PAGE) * PAGE - start if nbytes > 0 else 0


def span(address: int, nbytes: int) -> np.ndarray:
    """One contiguous range as :func:`row_ranges` would give it: int64 [1, 2], or [0, 2] if it is empty."""
    start, length = _outward(address, nbytes)
    return np.array([[start, length]] if length else [], dtype=np.int64).reshape(-1, 2)


def row_ranges(address: int, row_stride: int, row_nbytes: int, rows: np.ndarray) -> np.ndarray:
    """Page ranges that cover exactly the pages of some rows.

    Args:
        address: address of row 0.
        row_stride: bytes from one row to the next, 0 or more.
        row_nbytes: bytes of a row that are read, counted from its start.
        rows: row numbers, integers of any order, repeats allowed.

    Returns:
        int64 [k, 2] of (page-aligned address, bytes in whole pages): sorted, no two touching.
        Its memory is an array of ``struct iovec``.
    """
    if len(rows) == 0 or row_nbytes <= 0:
        return np.empty((0, 2), dtype=np.int64)
    begin = np.sort(rows).astype(np.int64, copy=False) * row_stride + address
    first = begin // PAGE
    last = (begin + (row_nbytes - 1)) // PAGE + 1
    # Both rise with the row, so a run ends exactly where the next row's first page is beyond this row's last.
    ends = np.append(np.flatnonzero(first[1:] > last[:-1]), len(first) - 1)
    ranges = np.empty((len(ends), 2), dtype=np.int64)
    ranges[0, 0] = first[0]
    ranges[1:, 0] = first[ends[:-1] + 1]
    ranges[:, 1] = last[ends]
    ranges[:, 1] -= ranges[:, 0]
    ranges *= PAGE
    return ranges


class MadviseBatcher:
    """Hands page ranges to the kernel in as few system calls as this process may use.

    ``process_madvise`` takes 1024 ranges a call straight from the array. It needs Linux 5.13, and before 6.13
    CAP_SYS_NICE too. ``madvise`` takes one range a call and is everywhere but on Windows. The choice is made on
    first use, once per process: a forked child finds out by itself, because the descriptor that it inherits
    still means its parent. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._pid = -1
        self._pidfd = -1
        self._backend: Backend = "none"

    @property
    def backend(self) -> Backend:
        """The system call that is used by this process: ``"process_madvise"``, ``"madvise"`` or ``"none"``."""
        if self._pid != os.getpid():
            self._probe()
        return self._backend

    def _probe(self) -> None:
        if self._pidfd >= 0:  # The parent's, from before a fork.
            os.close(self._pidfd)
            self._pidfd = -1
        backend: Backend = "none"
        pidfd, error = syscalls.pidfd_open(os.getpid())
        if not error:
            # No ranges: the permission is checked all the same, and nothing is done.
            if syscalls.process_madvise(pidfd, 0, 0, _WILLNEED)[1] == 0:
                backend, self._pidfd = "process_madvise", pidfd
            else:
                os.close(pidfd)
        if backend == "none" and syscalls.libc() is not None:
            backend = "madvise"
        self._backend = backend
        self._pid = os.getpid()

    def announce(self, ranges: np.ndarray) -> None:
        """Ask for these pages and return without waiting for them.

        Args:
            ranges: int64 [k, 2] of (page-aligned address, bytes), as :func:`row_ranges` gives it; several
                tensors' ranges may be concatenated. A range that is not mapped is passed over.
        """
        if len(ranges) and self.backend != "none":
            self.advise(pieces(np.ascontiguousarray(ranges, dtype=np.int64)), _WILLNEED)

    def advise(self, ranges: np.ndarray, advice: int) -> bool:
        """Give one piece of advice on many ranges; see madvise(2).

        Args:
            ranges: int64 [k, 2] of (page-aligned address, bytes). A range that is not mapped is passed over.
            advice: number of the advice.

        Returns:
            Whether the system took it for any range.
        """
        if len(ranges) == 0 or self.backend == "none":
            return False
        array = np.ascontiguousarray(ranges, dtype=np.int64)
        taken = False
        if self._backend == "process_madvise":
            array, taken = self._advise_many(array, advice)
        for address, nbytes in array.tolist():
            taken |= syscalls.madvise(address, nbytes, advice) == 0
        return taken

    def _advise_many(self, array: np.ndarray, advice: int) -> tuple[np.ndarray, bool]:
        """Advise by process_madvise; returns the ranges left over because the call is refused from now on."""
        refused, taken = 0, False
        while len(array) and refused <= _MAX_REFUSED:
            group = array[:_MAX_RANGES]
            address = int(group.__array_interface__["data"][0])
            advised, error = syscalls.process_madvise(self._pidfd, address, len(group), advice)
            if error in {errno.EPERM, errno.ENOSYS, errno.EINVAL, errno.ESRCH, errno.EBADF} and self._withdrawn():
                return array, taken
            if error or advised == 0:
                refused += 1  # The first range is not mapped, or has no file behind it.
                array = array[1:]
            else:
                taken = True
                array = _after(array, len(group), advised)
        return array[:0], taken

    def _withdrawn(self) -> bool:
        """Whether the call itself is refused, and not the range it was given; if so, madvise takes over."""
        if syscalls.process_madvise(self._pidfd, 0, 0, _WILLNEED)[1] == 0:
            return False
        self._backend = "madvise"
        return True


def pieces(ranges: np.ndarray) -> np.ndarray:
    """The same pages in ranges of 128 KiB at most, which the kernel announces whole."""
    if int(ranges[:, 1].max()) <= _MAX_RANGE_NBYTES:
        return ranges
    counts = -(-ranges[:, 1] // _MAX_RANGE_NBYTES)
    skipped = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces = np.repeat(ranges, counts, axis=0)
    pieces[:, 0] += skipped * _MAX_RANGE_NBYTES
    pieces[:, 1] = np.minimum(pieces[:, 1] - skipped * _MAX_RANGE_NBYTES, _MAX_RANGE_NBYTES)
    return pieces


def _after(array: np.ndarray, count: int, advised: int) -> np.ndarray:
    """What is left of ``array`` once ``advised`` bytes of its first ``count`` ranges are done."""
    total = np.cumsum(array[:count, 1])
    if advised >= total[-1]:
        return array[count:]
    index = int(np.searchsorted(total, advised, side="right"))
    rest: np.ndarray = array[index:].copy()
    done = advised - (int(total[index - 1]) if index else 0)
    rest[0] += (done, -done)
    return rest


_BATCHER = MadviseBatcher()


def madvise_batcher() -> MadviseBatcher:
    """The announcer of this process."""
    return _BATCHER
