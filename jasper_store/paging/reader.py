"""Reading a range of a file in several threads, through the page cache or past it.

Measured on 2 cores (docs/notes-paging.md has the run): blocks of 4 MiB reach the copy bandwidth from the page cache
with two threads and the disk's sequential rate past it with four; larger blocks gain nothing.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from jasper_store.errors import CorruptFileError, DatasetNotFoundError, IncompatibleOptionsError
from jasper_store.formats.files import system_refusals
from jasper_store.paging import residency

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from typing_extensions import Self

__all__ = ["BLOCK", "RangeReader", "as_bytes", "default_threads"]

BLOCK = 4 << 20
"""Bytes that a thread reads at a time."""
_DIRECT_READ_NBYTES = 1 << 20
"""Bytes per direct read: data copied out of an aligned buffer is then still in the processor's cache."""

_ALIGNMENT = 4096  # Of position, address and length of a direct read; enough for every disk's sectors.
_MIN_DIRECT_NBYTES = 1 << 20  # A shorter range is not read directly.
_MIN_THREADS, _MAX_THREADS = 4, 8


def default_threads() -> int:
    """Number of reading threads: one per core this process may run on, at least 4 to keep a disk busy, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(_MIN_THREADS, min(_MAX_THREADS, cores))


def as_bytes(out: torch.Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, writable."""
    if out.device.type != "cpu" or not out.is_contiguous():
        msg = f"expected a contiguous host tensor to read into, got strides {out.stride()} on {out.device}"
        raise IncompatibleOptionsError(msg)
    return memoryview(out.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class RangeReader:
    """Reads a range of one file in several threads, as a whole or piece by piece (into the buffers of a ring).

    Reading the pieces through one reader, rather than through one call of :func:`read_into` each, reuses the threads
    and lets ``drop_behind`` distinguish pages that were cached before from those that the kernel read ahead. Not for
    concurrent use.

    With ``drop_behind``, data that is not cached is read past the page cache where the file system supports that
    (O_DIRECT): at the speed of the disk with any read-ahead setting and on a busy machine, and nothing has to be
    dropped afterwards.

    Args:
        path: the file.
        offset: first byte of the range.
        nbytes: its length.
        threads: as in :func:`read_into`.
        drop_behind: as in :func:`read_into`.

    Raises:
        DatasetNotFoundError: there is no such file, or it cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        offset: int,
        nbytes: int,
        *,
        threads: int | None = None,
        drop_behind: bool = False,
    ) -> None:
        self.path = Path(path)
        self.offset = offset
        self.nbytes = nbytes
        self._threads = default_threads() if threads is None else max(1, threads)
        self._pool: ThreadPoolExecutor | None = None
        self._read_end = 0
        try:
            self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as exc:
            msg = f"{self.path}: cannot be read ({exc.strerror or exc}); check the path and its permissions"
            raise DatasetNotFoundError(msg, path=self.path) from exc
        # Determined before anything is read: the kernel's read-ahead would make later blocks look cached.
        self._cached = self._cached_blocks() if drop_behind and hasattr(os, "posix_fadvise") else None
        self._direct = self._open_direct() if self._cached is not None and not all(self._cached) else -1
        self._local = threading.local()

    def _open_direct(self) -> int:
        """A descriptor that reads past the page cache; -1 if that is not possible or does not pay."""
        if not hasattr(os, "O_DIRECT") or not hasattr(os, "preadv") or self.nbytes < _MIN_DIRECT_NBYTES:
            return -1
        try:
            return os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        except OSError:  # tmpfs and some network file systems
            return -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and close the file. May be called twice."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        if self._fd >= 0:
            # Drop again, in long runs: pages read ahead for one block may have arrived after the next block was
            # dropped, and a large folio that spans two blocks is evicted only if both are dropped in one call.
            self._drop(0, self._read_end)
            os.close(self._fd)
            self._fd = -1
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1

    def read(
        self,
        start: int,
        out: torch.Tensor,
        on_bytes: Callable[[int], None] | None = None,
        *,
        before: Callable[[int, int], None] | None = None,
    ) -> None:
        """Fill a contiguous host tensor with the bytes at ``start`` of the range; errors as :func:`read_into`.

        The reading threads call ``before(first, last)`` before they fill bytes first to last of ``out``.
        """
        view = as_bytes(out)

        def fill(first: int, last: int) -> None:
            if before is not None:
                before(first - start, last - start)
            self.read_block(first, view[first - start : last - start])

        self.run(start, start + len(view), fill, BLOCK, on_bytes)

    def run(
        self,
        start: int,
        stop: int,
        fill: Callable[[int, int], None],
        block: int,
        on_bytes: Callable[[int], None] | None,
    ) -> None:
        """Call ``fill(first, last)`` in threads for each block of a part of the range."""

        def one(first: int) -> int:
            last = min(first + block, stop)
            fill(first, last)
            self._drop(first, last)
            return last - first

        self._read_end = max(self._read_end, stop)
        firsts = range(start, stop, block)
        if self._threads == 1 or len(firsts) <= 1:
            for first in firsts:
                done = one(first)
                if on_bytes is not None:
                    on_bytes(done)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="jasper-preload")
        with system_refusals("loading in parallel"):
            futures: list[Future[int]] = [self._pool.submit(one, first) for first in firsts]
        try:
            for future in as_completed(futures):
                done = future.result()
                if on_bytes is not None:
                    on_bytes(done)
        except BaseException:
            # The threads write into the caller's tensor, so none of them may outlive this call.
            for future in futures:
                future.cancel()
            wait(futures)
            raise

    def read_block(self, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes at ``start`` of the range, in the calling thread."""
        done = 0
        if self._direct >= 0 and self._cached is not None and not self._cached[start // BLOCK]:
            done = self._read_direct(self.offset + start, view)
        while done < len(view):
            got = self._read_at(self.offset + start + done, view[done:])
            if got == 0:
                size = os.fstat(self._fd).st_size
                msg = (
                    f"{self.path}: expected {self.offset + self.nbytes:,} bytes, found {size:,}: the file is "
                    "truncated; copy or convert it again"
                )
                raise CorruptFileError(msg, path=self.path)
            done += got

    def scratch(self, nbytes: int, use: str = "caller") -> torch.Tensor:
        """This thread's buffer for one use, uint8 [nbytes], aligned for direct reads; reused by the next call."""
        held: torch.Tensor | None = getattr(self._local, use, None)
        if held is None or held.numel() < nbytes:
            held = torch.empty(nbytes + _ALIGNMENT, dtype=torch.uint8, device="cpu")
            held = held[-held.data_ptr() % _ALIGNMENT :]
            setattr(self._local, use, held)
        return held[:nbytes]

    def _read_direct(self, position: int, view: memoryview) -> int:
        """Read past the page cache. Returns the bytes read, fewer than asked for (or 0) if the system refused a part."""
        done = 0
        while done < len(view):
            piece = view[done : done + _DIRECT_READ_NBYTES]
            got = self._read_piece(position + done, piece)
            done += got
            if got < len(piece):
                break
        return done

    def _read_piece(self, position: int, view: memoryview) -> int:
        """One direct read; returns as :meth:`_read_direct`."""
        address = np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]
        try:
            if (position | address | len(view)) % _ALIGNMENT == 0:
                return os.preadv(self._direct, [view], position)
            # Through an aligned buffer that is a little larger at both ends.
            skip = position % _ALIGNMENT
            buffer = as_bytes(self.scratch(-(-(skip + len(view)) // _ALIGNMENT) * _ALIGNMENT, "direct"))
            got = max(min(os.preadv(self._direct, [buffer], position - skip) - skip, len(view)), 0)
        except OSError:  # The file system does not support it; an error of the disk occurs again in the ordinary read.
            return 0
        # numpy releases the interpreter lock while it copies; a memoryview does not, and the threads would wait.
        np.copyto(np.frombuffer(view, np.uint8)[:got], np.frombuffer(buffer, np.uint8)[skip : skip + got])
        return got

    def _read_at(self, position: int, view: memoryview) -> int:
        try:
            if hasattr(os, "preadv"):
                return os.preadv(self._fd, [view], position)
            with self.path.open("rb", buffering=0) as raw:  # Windows: each thread needs its own file position
                raw.seek(position)
                return raw.readinto(view) or 0
        except OSError as exc:
            msg = f"{self.path}: reading at byte {position:,} failed ({exc.strerror or exc}); check the disk"
            raise CorruptFileError(msg, path=self.path) from exc

    def _cached_blocks(self) -> list[bool]:
        """For each block of the range, whether most of it is in the page cache; unknown counts as cached."""
        blocks = []
        for start in range(0, self.nbytes, BLOCK):
            length = min(BLOCK, self.nbytes - start)
            cached = residency.cached_bytes(self._fd, self.offset + start, length)
            # If the system cannot tell, the pages stay: evicting pages of other processes is worse than a second copy.
            blocks.append(cached is None or cached * 2 > length)
        return blocks

    def _drop(self, first: int, last: int) -> None:
        """Drop the pages between two positions from the page cache, except for blocks that were cached before."""
        if self._cached is None:
            return
        index, end = first // BLOCK, -(-last // BLOCK)
        while index < end:
            run = index
            while run < end and not self._cached[run]:
                run += 1
            if run > index:
                start, stop = max(first, index * BLOCK), min(last, run * BLOCK)
                # From the start of the page: the kernel evicts whole pages only, and a large folio only as a whole, so
                # runs of blocks are dropped in one call. A neighbour's page that is dropped too is read again.
                begin = (self.offset + start) // residency.PAGE * residency.PAGE
                residency.drop_cache(self._fd, begin, self.offset + stop - begin)
            index = run + 1
