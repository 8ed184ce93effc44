"""Loading bytes of a file into memory at the speed of memory, or of the disk when they are not cached.

The page faults of a new buffer cost the most, so the buffer uses huge pages: reading a cached file goes from 2.5 to
11 GB/s per thread (measured in docs/notes-paging.md).
"""

from __future__ import annotations

import errno
import math
import mmap
import sys
from typing import TYPE_CHECKING

import torch

from jasper_store.errors import InsufficientMemoryError
from jasper_store.paging.huge import HUGE_PAGE, HugePages
from jasper_store.paging.mapping import memory_limits
from jasper_store.paging.reader import BLOCK, RangeReader, as_bytes, default_threads

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

__all__ = ["BLOCK", "RangeReader", "anonymous", "default_threads", "empty", "read_converted", "read_into"]

_CONVERT_BLOCK = 1 << 20  # Stays in the second-level cache between the read and the conversion.
_LARGE = 64 << 20  # Smaller buffers take little time, whatever their pages are.
_HUGE_PAGES = HugePages()


def anonymous(nbytes: int) -> mmap.mmap:
    """Private zeroed memory, in huge pages if that is fast; Linux only.

    Raises:
        OSError: the system refused it.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes < _LARGE:  # larger buffers get huge pages while they are filled: see read_into
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # EINVAL: a kernel without huge pages; small ones work too.
                raise
    return memory


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised host tensor with page-aligned memory, in huge pages where allocating them is fast.

    Forked children share its pages until they write to them. Small tensors, and all tensors on systems other than
    Linux, come from ``torch.empty``.

    Raises:
        InsufficientMemoryError: the system refused the memory; the message names the limits.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    try:
        if nbytes < HUGE_PAGE or sys.platform != "linux":
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.frombuffer(anonymous(nbytes), dtype=dtype).view(tuple(shape))
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
        drop_behind: drop the pages that this call brought into the page cache; blocks that were cached before stay.

    Raises:
        CorruptFileError: the file ends before ``out`` is full.
        DatasetNotFoundError: there is no such file, or it cannot be read.
        IncompatibleOptionsError: ``out`` is not a contiguous host tensor.
    """
    nbytes = out.numel() * out.element_size()

    def allocate(first: int, last: int) -> None:
        _HUGE_PAGES.allocate(out.data_ptr(), nbytes, first, last)

    with RangeReader(path, offset, nbytes, threads=threads, drop_behind=drop_behind) as reader:
        reader.read(0, out, on_bytes, before=allocate if nbytes >= _LARGE else None)


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
    """Fill ``out`` from values stored in another dtype, converted as by ``tensor.to(out.dtype)``.

    Uses one block of 1 MiB per thread in addition to ``out``. Arguments and errors are those of :func:`read_into`;
    ``on_bytes`` counts stored bytes.
    """
    if stored_dtype == out.dtype:
        read_into(path, offset, out, threads=threads, on_bytes=on_bytes, drop_behind=drop_behind)
        return
    as_bytes(out)
    flat = out.view(-1)
    size = stored_dtype.itemsize
    with RangeReader(path, offset, flat.numel() * size, threads=threads, drop_behind=drop_behind) as reader:

        def fill(start: int, stop: int) -> None:
            scratch = reader.scratch(stop - start)
            reader.read_block(start, as_bytes(scratch))
            flat[start // size : stop // size].copy_(scratch.view(stored_dtype))

        reader.run(0, reader.nbytes, fill, _CONVERT_BLOCK, on_bytes)
