"""Loading whole tensors from their file into memory, in parallel, in their final dtype and place."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from jasper_store.formats.base import Chunked, Encoded, Extent, Inline, Parts, Streamed
from jasper_store.formats.parts import parts_of
from jasper_store.formats.streams import ByteStream
from jasper_store.paging import preload
from jasper_store.store.tensors import block_rows, span_nbytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from jasper_store.formats.base import TensorSpec

__all__ = ["block_rows", "load", "progress_nbytes"]


def progress_nbytes(spec: TensorSpec) -> int:
    """Bytes that :func:`load` reports as progress in all: those read from an extent, or decompressed from chunks."""
    if isinstance(spec.location, Inline):
        return 0
    return span_nbytes(spec) if isinstance(spec.location, Extent) else spec.nbytes


def load(
    spec: TensorSpec,
    dtype: torch.dtype,
    *,
    out: torch.Tensor | None = None,
    drop_behind: bool = False,
    on_bytes: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """A tensor's values in host memory, C order, converted to ``dtype`` while they are read.

    Memory: the result and a few blocks. Data that is stored in another order (strided ``.pt`` views, Fortran order) is
    read in that order first, so it is held twice for a moment.

    Args:
        spec: the tensor.
        dtype: dtype of the result, converted as by ``Tensor.to``.
        out: where to store them: contiguous, of the tensor's shape and ``dtype``; new memory by default.
        drop_behind: drop the pages that had to be read from disk from the page cache.
        on_bytes: called in the calling thread with the number of bytes just read; :func:`progress_nbytes` in all.

    Raises:
        CorruptFileError: the file is truncated or damaged.
        InsufficientMemoryError: the system refused the memory.
    """
    location = spec.location
    assert not isinstance(location, Encoded), "only a conversion reads strings"
    if isinstance(location, Inline):
        return location.values.to(dtype) if out is None else out.copy_(location.values)
    if out is None:
        out = preload.empty(spec.shape, dtype)
    if isinstance(location, Parts):
        start = 0
        for part in parts_of(spec):
            load(part, dtype, out=out[start : start + part.n_rows], drop_behind=drop_behind, on_bytes=on_bytes)
            start += part.n_rows
    elif isinstance(location, Chunked):
        _unpack(spec, out, on_bytes)
    elif isinstance(location, Streamed):
        _stream(spec, out, on_bytes)
    elif spec.contiguous:
        preload.read_converted(
            location.path, location.offset, spec.dtype, out, drop_behind=drop_behind, on_bytes=on_bytes
        )
    else:
        span = preload.empty((span_nbytes(spec) // spec.dtype.itemsize,), spec.dtype)
        preload.read_into(location.path, location.offset, span, drop_behind=drop_behind, on_bytes=on_bytes)
        out.copy_(span.as_strided(spec.shape, location.strides or ()))
    return out


def _stream(spec: TensorSpec, out: torch.Tensor, on_bytes: Callable[[int], None] | None) -> None:
    """Read values that can only be read in order, in blocks of rows."""
    step = block_rows(spec)
    with contextlib.closing(ByteStream(spec)) as stream:
        for start in range(0, spec.n_rows if spec.nbytes else 0, step):
            target = out[start : start + step] if out.ndim else out.reshape(1)
            block = target if spec.dtype == out.dtype else torch.empty(target.shape, dtype=spec.dtype, device="cpu")
            stream.fill(block)
            if block is not target:
                target.copy_(block)
            if on_bytes is not None:
                on_bytes(block.nbytes)


def _unpack(spec: TensorSpec, out: torch.Tensor, on_bytes: Callable[[int], None] | None) -> None:
    """Read and decompress chunked data in blocks of whole chunks."""
    from jasper_store.formats.hdf5.chunks import ChunkedReader

    step = block_rows(spec)
    reader = ChunkedReader(spec)
    try:
        for start in range(0, spec.n_rows, step):
            stop = min(start + step, spec.n_rows)
            target = out[start:stop] if out.ndim else out.reshape(1)
            if spec.dtype == out.dtype:
                reader.read_block(start, stop, target)
            else:
                block = torch.empty(target.shape, dtype=spec.dtype, device="cpu")
                reader.read_block(start, stop, block)
                target.copy_(block)
            if on_bytes is not None:
                on_bytes((stop - start) * spec.row_nbytes)
    finally:
        reader.close()
