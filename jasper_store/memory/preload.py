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
from concurrent.futures import ThreadPoolExecutor, as_completed
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

__all__ = ["BLOCK", "default_threads", "empty", "read_converted", "read_into"]

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
    target = _as_bytes(out)
    with _Reader(path, offset, target.numel(), drop_behind=drop_behind) as reader:
        view = memoryview(target.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers from NumPy 2 on

        def read(start: int, stop: int) -> None:
            reader.read(start, view[start:stop])

        reader.run(read, BLOCK, threads, on_bytes)


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
    with _Reader(path, offset, flat.numel() * size, drop_behind=drop_behind) as reader:

        def read(start: int, stop: int) -> None:
            scratch = torch.empty(stop - start, dtype=torch.uint8)
            reader.read(start, memoryview(scratch.numpy()))  # type: ignore[arg-type]
            flat[start // size : stop // size].copy_(scratch.view(stored_dtype))

        reader.run(read, _CONVERT_BLOCK, threads, on_bytes)


def _as_bytes(out: torch.Tensor) -> torch.Tensor:
    if out.device.type != "cpu" or not out.is_contiguous():
        msg = f"expected a contiguous host tensor to read into, got strides {out.stride()} on {out.device}"
        raise IncompatibleOptionsError(msg)
    return out.detach().reshape(-1).view(torch.uint8)


class _Reader:
    """One open file, read in blocks by several threads."""

    def __init__(self, path: str | os.PathLike[str], offset: int, nbytes: int, *, drop_behind: bool) -> None:
        self.path = Path(path)
        self.offset = offset
        self.nbytes = nbytes
        self.drop_behind = drop_behind and hasattr(os, "posix_fadvise")

    def __enter__(self) -> Self:
        try:
            self.fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as exc:
            msg = f"{self.path}: cannot be read ({exc.strerror or exc}); check the path and its permissions"
            raise DatasetNotFoundError(msg, path=self.path) from exc
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)

    def run(
        self,
        read: Callable[[int, int], None],
        block: int,
        threads: int | None,
        on_bytes: Callable[[int], None] | None,
    ) -> None:
        """Call ``read(start, stop)`` for every block of the range, in threads."""
        blocks = [(start, min(start + block, self.nbytes)) for start in range(0, self.nbytes, block)]
        # Asked before anything is read: the kernel's own read-ahead would make later blocks look cached.
        fresh = [self.drop_behind and not self._mostly_cached(start, stop) for start, stop in blocks]

        def one(index: int) -> int:
            start, stop = blocks[index]
            read(start, stop)
            if fresh[index]:
                residency.drop_cache(self.fd, self.offset + start, stop - start)
            return stop - start

        workers = min(default_threads() if threads is None else max(1, threads), len(blocks))
        if workers <= 1:
            for index in range(len(blocks)):
                done = one(index)
                if on_bytes is not None:
                    on_bytes(done)
            return
        with ThreadPoolExecutor(workers, thread_name_prefix="jasper-preload") as pool:
            futures: list[Future[int]] = [pool.submit(one, index) for index in range(len(blocks))]
            try:
                for future in as_completed(futures):
                    done = future.result()
                    if on_bytes is not None:
                        on_bytes(done)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def read(self, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes at ``start`` of the range."""
        done = 0
        while done < len(view):
            got = self._read_at(self.offset + start + done, view[done:])
            if got == 0:
                size = os.fstat(self.fd).st_size
                msg = (
                    f"{self.path}: expected {self.offset + self.nbytes:,} bytes, found {size:,}: the file is "
                    "truncated; copy or convert it again"
                )
                raise CorruptFileError(msg, path=self.path)
            done += got

    def _read_at(self, position: int, view: memoryview) -> int:
        try:
            if hasattr(os, "preadv"):
                return os.preadv(self.fd, [view], position)
            with self.path.open("rb", buffering=0) as raw:  # Windows: a position of its own for each thread
                raw.seek(position)
                return raw.readinto(view) or 0
        except OSError as exc:
            msg = f"{self.path}: reading at byte {position:,} failed ({exc.strerror or exc}); check the disk"
            raise CorruptFileError(msg, path=self.path) from exc

    def _mostly_cached(self, start: int, stop: int) -> bool:
        cached = residency.cached_bytes(self.fd, self.offset + start, stop - start)
        # Where the system cannot say, the pages stay: evicting somebody else's is worse than a second copy.
        return cached is None or cached * 2 > stop - start
