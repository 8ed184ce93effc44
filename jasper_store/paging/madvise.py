"""Pages of mapped files: advice per access pattern, prefetching rows before they are touched, dropping pages.

Random rows of a map that is not cached are slow because each page fault waits for one disk read. Prefetching gives
the kernel all pages of a batch at once, so that the disk serves them in parallel. All functions take address ranges,
so they serve every format that can be mapped. All of them are hints: where the system has no such call they do
nothing, and the values read are the same.
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
    "populate",
    "residency",
    "row_ranges",
    "span",
    "split_ranges",
]

Access: TypeAlias = Literal["normal", "random", "sequential", "hugepage"]
Backend: TypeAlias = Literal["process_madvise", "madvise", "none"]

_ADVICE: dict[str, int] = {"normal": 0, "random": 1, "sequential": 2, "hugepage": 14}
# As numbers: Python names the newer ones only from 3.13 on, and only if its build machine's headers had them.
_WILLNEED = 3
_COLD = 20
_PAGEOUT = 21
_POPULATE_READ = 22
_MAX_RANGES = 1024  # UIO_MAXIOV, the most that process_madvise takes.
# Of a longer range the kernel reads no more than the file's read-ahead size and silently skips the rest
# (force_page_cache_ra). 128 KiB is the usual setting.
_MAX_RANGE_NBYTES = 128 << 10
_MAX_REFUSED = 8  # Ranges that are not mapped (any more) before the rest of a batch is skipped.


def advise(address: int, nbytes: int, how: Access) -> bool:
    """Tell the kernel how the pages of a range will be accessed.

    ``"random"`` stops its read-ahead, ``"sequential"`` doubles it, ``"normal"`` restores it, ``"hugepage"`` asks for
    huge pages. The advice includes pages that the range shares with its neighbours.

    Returns:
        Whether the system took the advice; False on Windows.
    """
    start, length = _whole_pages(address, nbytes)
    return length > 0 and syscalls.madvise(start, length, _ADVICE[how]) == 0


def populate(address: int, nbytes: int) -> bool:
    """Bring a range into memory and into this process's page table, reading missing pages (Linux 5.14).

    Returns:
        True if every page is present; False if the system has no such call or a page could not be read, and the
        caller has to read the range in another way.
    """
    start, length = _whole_pages(address, nbytes)
    return length > 0 and syscalls.madvise(start, length, _POPULATE_READ) == 0


def drop(address: int, nbytes: int, file: FileOrFd | None = None, offset: int = 0) -> bool:
    """Evict the pages of a mapped range; private writes made through the map survive.

    ``MADV_PAGEOUT`` (Linux 5.4; 30 ns a page) evicts them: ``MADV_DONTNEED`` is cheaper by a quarter, but would
    discard such writes. It acts only on files that the caller owns or may write to, and on pages that no other
    process maps; the rest is marked as first to be reclaimed (``MADV_COLD``). Pages that were prefetched and never
    touched are in the page cache but not in the map; dropping them needs ``file``. Pages shared with neighbours stay.

    Args:
        address: start of the range.
        nbytes: its length.
        file: descriptor or path of the mapped file.
        offset: byte of the file that lies at ``address``.

    Returns:
        Whether the system has any such advice; False on Windows and macOS.
    """
    # Inward: only pages that lie in the range as a whole.
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
    """Evict the pages of many ranges in as few system calls as possible; see :func:`drop`.

    Pages that this process never touched stay in the page cache, because they are not in the map. Pages that lie in a
    range only in part stay, too.

    Args:
        starts: address of the first byte of each range, int64 [k].
        stops: address of the byte after each range, int64 [k].

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
        file: descriptor or path of the mapped file. With it the answer comes from ``cachestat(2)`` where that
            exists, which is right for files of other owners too, or refuses.
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


def _whole_pages(address: int, nbytes: int) -> tuple[int, int]:
    """(Address, bytes) of the pages that a range touches."""
    start = address - address % PAGE
    return start, -(-(address + nbytes) // PAGE) * PAGE - start if nbytes > 0 else 0


def span(address: int, nbytes: int) -> np.ndarray:
    """One contiguous range in the form of :func:`row_ranges`: int64 [1, 2], or [0, 2] if it is empty."""
    start, length = _whole_pages(address, nbytes)
    return np.array([[start, length]] if length else [], dtype=np.int64).reshape(-1, 2)


def row_ranges(address: int, row_stride: int, row_nbytes: int, rows: np.ndarray) -> np.ndarray:
    """The page ranges that cover exactly the pages of the given rows.

    Args:
        address: address of row 0.
        row_stride: bytes from one row to the next, 0 or more.
        row_nbytes: bytes of a row that are read, counted from its start.
        rows: row numbers, integers in any order, repeats allowed.

    Returns:
        int64 [k, 2] of (page-aligned address, bytes in whole pages): sorted, no two touching.
        Its memory is an array of ``struct iovec``.
    """
    if len(rows) == 0 or row_nbytes <= 0:
        return np.empty((0, 2), dtype=np.int64)
    begin = np.sort(rows).astype(np.int64, copy=False) * row_stride + address
    first = begin // PAGE
    last = (begin + (row_nbytes - 1)) // PAGE + 1
    # Both increase with the row, so a range ends exactly where the next row's first page is beyond this row's last.
    ends = np.append(np.flatnonzero(first[1:] > last[:-1]), len(first) - 1)
    ranges = np.empty((len(ends), 2), dtype=np.int64)
    ranges[0, 0] = first[0]
    ranges[1:, 0] = first[ends[:-1] + 1]
    ranges[:, 1] = last[ends]
    ranges[:, 1] -= ranges[:, 0]
    ranges *= PAGE
    return ranges


class MadviseBatcher:
    """Passes page ranges to the kernel in as few system calls as this process may use.

    ``process_madvise`` takes 1024 ranges per call directly from the array. It needs Linux 5.13, and before 6.13
    CAP_SYS_NICE too. ``madvise`` takes one range per call and exists everywhere but on Windows. The choice is made on
    first use, once per process: a forked child repeats it, because the process descriptor that it inherits refers to
    its parent. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._pid = -1
        self._pidfd = -1
        self._backend: Backend = "none"

    @property
    def backend(self) -> Backend:
        """The system call that this process uses: ``"process_madvise"``, ``"madvise"`` or ``"none"``."""
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
            # Without ranges the kernel checks the permission and does nothing.
            if syscalls.process_madvise(pidfd, 0, 0, _WILLNEED)[1] == 0:
                backend, self._pidfd = "process_madvise", pidfd
            else:
                os.close(pidfd)
        if backend == "none" and syscalls.libc() is not None:
            backend = "madvise"
        self._backend = backend
        self._pid = os.getpid()

    def prefetch(self, ranges: np.ndarray) -> None:
        """Ask for these pages and return without waiting for them.

        Args:
            ranges: int64 [k, 2] of (page-aligned address, bytes), as :func:`row_ranges` returns them; ranges of
                several tensors may be concatenated. A range that is not mapped is skipped.
        """
        if len(ranges) and self.backend != "none":
            self.advise(split_ranges(np.ascontiguousarray(ranges, dtype=np.int64)), _WILLNEED)

    def advise(self, ranges: np.ndarray, advice: int) -> bool:
        """Give the same advice on many ranges; see madvise(2).

        Args:
            ranges: int64 [k, 2] of (page-aligned address, bytes). A range that is not mapped is skipped.
            advice: number of the advice.

        Returns:
            Whether the system accepted it for any range.
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
        """Advise by process_madvise.

        Returns:
            The ranges that remain if the system refuses the call from now on, and whether it accepted any range.
        """
        refused, taken = 0, False
        while len(array) and refused <= _MAX_REFUSED:
            group = array[:_MAX_RANGES]
            address = int(group.__array_interface__["data"][0])
            advised, error = syscalls.process_madvise(self._pidfd, address, len(group), advice)
            if error in {errno.EPERM, errno.ENOSYS, errno.EINVAL, errno.ESRCH, errno.EBADF} and self._fell_back():
                return array, taken
            if error or advised == 0:
                refused += 1  # The first range is not mapped, or has no file behind it.
                array = array[1:]
            else:
                taken = True
                array = _remaining(array, len(group), advised)
        return array[:0], taken

    def _fell_back(self) -> bool:
        """Switch to madvise if the system refuses the call itself, rather than the range it was given."""
        if syscalls.process_madvise(self._pidfd, 0, 0, _WILLNEED)[1] == 0:
            return False
        self._backend = "madvise"
        return True


def split_ranges(ranges: np.ndarray) -> np.ndarray:
    """The same pages in ranges of at most 128 KiB, which the kernel prefetches whole."""
    if int(ranges[:, 1].max()) <= _MAX_RANGE_NBYTES:
        return ranges
    counts = -(-ranges[:, 1] // _MAX_RANGE_NBYTES)
    skipped = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    split = np.repeat(ranges, counts, axis=0)
    split[:, 0] += skipped * _MAX_RANGE_NBYTES
    split[:, 1] = np.minimum(split[:, 1] - skipped * _MAX_RANGE_NBYTES, _MAX_RANGE_NBYTES)
    return split


def _remaining(array: np.ndarray, count: int, advised: int) -> np.ndarray:
    """The part of ``array`` that is left once ``advised`` bytes of its first ``count`` ranges are done."""
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
    """The batcher of this process."""
    return _BATCHER
