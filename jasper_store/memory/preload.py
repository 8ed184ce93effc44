"""Reading bytes of a file into memory at the speed of memory, or of the disk when it is not cached.

Measured on 2 cores (docs/performance.md has the run): what costs is the page faults of a fresh buffer, so the
buffer asks for huge pages; two threads with blocks of 4 MiB reach the copy bandwidth from the page cache and
the disk's sequential rate without it, and more of either gains nothing.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from jasper_store.errors import (
    CorruptFileError,
    DatasetNotFoundError,
    IncompatibleOptionsError,
    InsufficientMemoryError,
)
from jasper_store.memory import residency
from jasper_store.memory.mapping import memory_limits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from typing_extensions import Self

__all__ = ["BLOCK", "RangeReader", "default_threads", "empty", "read_converted", "read_into"]

BLOCK = 4 << 20
"""Bytes per read."""

_CONVERT_BLOCK = 1 << 20  # Stays in the second-level cache between the read and the conversion.
_HUGE_PAGE = 2 << 20
_MAX_THREADS = 4


def default_threads() -> int:
    """Threads that read: one per core this process may run on, at most 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MAX_THREADS, cores))


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised host tensor whose memory is page-aligned and asks for huge pages.

    Forked children share its pages until they write to them. Small tensors, and all of them where the system
    has no such advice, are ordinary ``torch.empty``.

    Raises:
        InsufficientMemoryError: the system refused the memory; the message names the limits.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    try:
        if nbytes < _HUGE_PAGE or sys.platform != "linux":
            return torch.empty(tuple(shape), dtype=dtype)
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # EINVAL: a kernel built without huge pages; small ones serve too.
                raise
        return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))
    except (OSError, MemoryError, RuntimeError, OverflowError) as exc:
        msg = (
            f"expected {nbytes:,} bytes of memory for a tensor {dtype} {tuple(shape)}, and the system refused "
            f"({exc}). Limits that can be the cause: {memory_limits()}. Map the dataset instead (use_mmap=True), "
            "or set memory_limit"
        )
        raise InsufficientMemoryError(msg, needed=nbytes) from exc


def read_into(
    path: str | os.PathLike[str],
    offset: int,
    out: torch.Tensor,
    *,
    threads: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
    drop_behind: bool = False,
) -> None:
    """Fill ``out`` with the bytes of a file from ``offset`` on.

    Args:
        path: the file.
        offset: byte offset of the first element.
        out: contiguous host tensor of the stored dtype; any shape.
        threads: threads that read; :func:`default_threads` by default.
        on_bytes: called in the calling thread with the number of bytes just finished; an exception stops the read.
        drop_behind: give back the page cache's copy of what this call brought in; blocks that were in the
            cache before stay there.

    Raises:
        CorruptFileError: the file ends before ``out`` is full.
        DatasetNotFoundError: there is no such file, or it cannot be read.
        IncompatibleOptionsError: ``out`` is not a contiguous host tensor.
    """
    nbytes = out.numel() * out.element_size()
    with RangeReader(path, offset, nbytes, threads=threads, drop_behind=drop_behind) as reader:
        reader.read(0, out, on_bytes)


def read_converted(
    path: str | os.PathLike[str],
    offset: int,
    stored_dtype: torch.dtype,
    out: torch.Tensor,
    *,
    threads: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
    drop_behind: bool = False,
) -> None:
    """Fill ``out`` from values stored in another dtype, as ``tensor.to(out.dtype)`` would convert them.

    Holds one block of 1 MiB per thread beside ``out``. Arguments and errors are those of :func:`read_into`;
    ``on_bytes`` counts stored bytes.
    """
    if stored_dtype == out.dtype:
        read_into(path, offset, out, threads=threads, on_bytes=on_bytes, drop_behind=drop_behind)
        return
    _as_bytes(out)
    flat = out.view(-1)
    size = stored_dtype.itemsize
    with RangeReader(path, offset, flat.numel() * size, threads=threads, drop_behind=drop_behind) as reader:

        def fill(start: int, stop: int) -> None:
            scratch = torch.empty(stop - start, dtype=torch.uint8, device="cpu")
            reader.read_block(start, _as_bytes(scratch))
            flat[start // size : stop // size].copy_(scratch.view(stored_dtype))

        reader.run(0, reader.nbytes, fill, _CONVERT_BLOCK, on_bytes)


def _as_bytes(out: torch.Tensor) -> memoryview:
    if out.device.type != "cpu" or not out.is_contiguous():
        msg = f"expected a contiguous host tensor to read into, got strides {out.stride()} on {out.device}"
        raise IncompatibleOptionsError(msg)
    return memoryview(out.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class RangeReader:
    """A range of one file, read by several threads, whole or piece after piece (a staging ring).

    Reading in pieces through one reader, rather than through one call of :func:`read_into` each, keeps the threads
    and lets ``drop_behind`` tell pages that were cached before from those that the kernel read ahead on its own.
    Not for concurrent use.

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
        self._reached = 0
        try:
            self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as exc:
            msg = f"{self.path}: cannot be read ({exc.strerror or exc}); check the path and its permissions"
            raise DatasetNotFoundError(msg, path=self.path) from exc
        # Asked before anything is read: the kernel's own read-ahead would make later blocks look cached.
        self._kept = self._cached_blocks() if drop_behind and hasattr(os, "posix_fadvise") else None

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
            # Once more, in long runs: what was read ahead for one block may have arrived after the next one's drop,
            # and a large folio that lies across two blocks stays until both go together.
            self._drop(0, self._reached)
            os.close(self._fd)
            self._fd = -1

    def read(self, start: int, out: torch.Tensor, on_bytes: Callable[[int], None] | None = None) -> None:
        """Fill a contiguous host tensor with the bytes at ``start`` of the range; errors as :func:`read_into`."""
        view = _as_bytes(out)

        def fill(first: int, last: int) -> None:
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

        self._reached = max(self._reached, stop)
        firsts = range(start, stop, block)
        if self._threads == 1 or len(firsts) <= 1:
            for first in firsts:
                done = one(first)
                if on_bytes is not None:
                    on_bytes(done)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="jasper-preload")
        futures: list[Future[int]] = [self._pool.submit(one, first) for first in firsts]
        try:
            for future in as_completed(futures):
                done = future.result()
                if on_bytes is not None:
                    on_bytes(done)
        except BaseException:
            # The threads write into the caller's tensor: none of them may outlive this call.
            for future in futures:
                future.cancel()
            wait(futures)
            raise

    def read_block(self, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes at ``start`` of the range, in the calling thread."""
        done = 0
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

    def _read_at(self, position: int, view: memoryview) -> int:
        try:
            if hasattr(os, "preadv"):
                return os.preadv(self._fd, [view], position)
            with self.path.open("rb", buffering=0) as raw:  # Windows: a position of its own for each thread
                raw.seek(position)
                return raw.readinto(view) or 0
        except OSError as exc:
            msg = f"{self.path}: reading at byte {position:,} failed ({exc.strerror or exc}); check the disk"
            raise CorruptFileError(msg, path=self.path) from exc

    def _cached_blocks(self) -> list[bool]:
        """Of each 4 MiB of the range, whether most of it is in the page cache; unknown counts as cached."""
        blocks = []
        for start in range(0, self.nbytes, BLOCK):
            length = min(BLOCK, self.nbytes - start)
            cached = residency.cached_bytes(self._fd, self.offset + start, length)
            # Where the system cannot say, the pages stay: evicting somebody else's is worse than a second copy.
            blocks.append(cached is None or cached * 2 > length)
        return blocks

    def _drop(self, first: int, last: int) -> None:
        """Give back the cache's copy of what lies between two positions, unless it was cached before."""
        if self._kept is None:
            return
        index, end = first // BLOCK, -(-last // BLOCK)
        while index < end:
            run = index
            while run < end and not self._kept[run]:
                run += 1
            if run > index:
                start, stop = max(first, index * BLOCK), min(last, run * BLOCK)
                # From the start of the page: the kernel lets go of whole pages only, and of a large folio only in
                # one piece, so runs of blocks go together. A neighbour's page that goes too is read once more.
                begin = (self.offset + start) // residency.PAGE * residency.PAGE
                residency.drop_cache(self._fd, begin, self.offset + stop - begin)
            index = run + 1
