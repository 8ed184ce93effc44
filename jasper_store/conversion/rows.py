"""The values of any tensor, block of rows by block of rows, in bounded memory and without maps.

Read calls instead of maps: a file that is cut while it is being read gives an error, where a map would end the
process with SIGBUS.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from typing import TYPE_CHECKING, Protocol

import torch

from jasper_store.conversion.writeback import WINDOW_NBYTES, drop_pages
from jasper_store.errors import CorruptFileError, InsufficientMemoryError
from jasper_store.formats.base import Chunked, Encoded, Extent, Inline, Parts, Streamed, TensorSpec
from jasper_store.formats.files import system_refusals
from jasper_store.formats.parts import parts_of
from jasper_store.formats.streams import ByteStream
from jasper_store.paging import mapping
from jasper_store.store.tensors import block_rows

if TYPE_CHECKING:
    from collections.abc import Generator
    from io import FileIO
    from pathlib import Path

__all__ = ["BLOCK_NBYTES", "BlockReader", "open_rows", "read_blocks"]

# Measured with blocks of 512 KiB to 16 MiB, cached and not: small enough that the blocks in flight stay in the
# processor's caches and the disk is asked ahead while one is written, large enough that the hand-over costs nothing.
BLOCK_NBYTES = 1 << 20
CHUNKED_NBYTES = 4 << 20  # compressed chunks are read by several threads, each of which wants a few
SCRATCH_NBYTES = 8 << 20  # the widest span of a strided block that is read as one piece
_AHEAD = 4  # blocks in flight: one being read, two waiting, one being written


class BlockReader(Protocol):
    """Blocks of rows of one tensor. Not safe for concurrent use.

    Attributes:
        needs_buffer: whether ``read`` writes into ``out``; False for a reader that keeps the values itself.
    """

    needs_buffer: bool

    def read(self, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Rows ``start`` to ``stop``, in ``out`` (C-ordered, of their shape) or in memory that the reader keeps."""

    def close(self) -> None:
        """Release handles."""


def open_rows(spec: TensorSpec, *, drop: bool = False) -> BlockReader:
    """A reader of blocks from the place where the tensor lies.

    Args:
        spec: the tensor.
        drop: whether to drop pages from the page cache once they are read; pages that are mapped stay.

    Raises:
        CorruptFileError: the file cannot be opened or is too short.
    """
    location = spec.location
    assert not isinstance(location, Encoded), "strings are read from front to end, by read_blocks"
    if isinstance(location, Inline):
        return _InlineRows(location.values)
    if isinstance(location, Chunked):
        return _ChunkedRows(spec, drop=drop)
    if isinstance(location, Parts):
        return _PartRows(spec, drop=drop)
    if isinstance(location, Streamed):
        return _StreamedRows(spec)
    if spec.contiguous and spec.row_nbytes > 16 * BLOCK_NBYTES and mapping.mappable(location.offset, spec.dtype):
        return _HugeRows(spec, location)
    return _ExtentRows(spec, location, drop=drop)


def read_blocks(
    spec: TensorSpec, nbytes: int | None = None, *, drop: bool = False
) -> Generator[torch.Tensor, None, None]:
    """Yield the tensor's values as blocks [n, ...] in order (a scalar: one block of shape []), read ahead by a thread.

    A block is valid until the next one is asked for; its memory is used again. A tensor of zero rows yields
    nothing. Closing the generator ends the thread.

    Raises:
        CorruptFileError: the file is shorter than its header says, or damaged.
    """
    if isinstance(spec.location, Encoded):
        yield from spec.location.blocks()
        return
    rows = spec.n_rows
    suits = CHUNKED_NBYTES if isinstance(spec.location, Chunked) else BLOCK_NBYTES
    step = block_rows(spec, suits if nbytes is None else nbytes)
    if not rows or not spec.nbytes:
        if rows:
            yield torch.empty(spec.shape, dtype=spec.dtype)
        return
    pool: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
    filled: queue.SimpleQueue[tuple[torch.Tensor, torch.Tensor] | BaseException | None] = queue.SimpleQueue()
    reader = open_rows(spec, drop=drop)
    size = min(step, rows) * math.prod(spec.shape[1:]) if reader.needs_buffer else 0
    for _ in range(min(_AHEAD, -(-rows // step))):
        pool.put(torch.empty(size, dtype=spec.dtype))
    thread = threading.Thread(target=_fill, args=(spec, reader, step, pool, filled), name=f"read {spec.name}")
    try:
        with system_refusals(spec.path):
            thread.start()
    except InsufficientMemoryError:
        reader.close()
        raise
    try:
        while (item := filled.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            buffer, block = item
            yield block
            pool.put(buffer)
    finally:
        pool.put(None)
        thread.join()
        reader.close()


def _fill(
    spec: TensorSpec,
    reader: BlockReader,
    step: int,
    pool: queue.SimpleQueue[torch.Tensor | None],
    filled: queue.SimpleQueue[tuple[torch.Tensor, torch.Tensor] | BaseException | None],
) -> None:
    """Body of the reading thread: fill buffers in turn until the tensor ends or the consumer stops."""
    try:
        for start in range(0, spec.n_rows, step):
            buffer = pool.get()
            if buffer is None:
                return
            stop = min(start + step, spec.n_rows)
            shape = (stop - start, *spec.shape[1:]) if spec.shape else ()
            out = buffer[: math.prod(shape)].view(shape) if reader.needs_buffer else buffer
            filled.put((buffer, reader.read(start, stop, out)))
        filled.put(None)
    except BaseException as exc:  # noqa: BLE001 - passed to the thread that asked, which raises it
        filled.put(exc)


class _InlineRows:
    """Values that came with the header."""

    needs_buffer = False

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def read(self, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - BlockReader's signature
        return self._values[start:stop] if self._values.ndim else self._values

    def close(self) -> None:
        pass


class _ChunkedRows:
    """Chunked or compressed HDF5, through the reader of its format."""

    needs_buffer = True

    def __init__(self, spec: TensorSpec, *, drop: bool) -> None:
        from jasper_store.formats.hdf5.chunks import ChunkedReader

        self._reader = ChunkedReader(spec)
        self._file = _open(spec.path) if drop else None
        self._read = 0

    def read(self, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        self._reader.read_block(start, stop, out)
        self._read += out.nbytes
        if self._file is not None and self._read >= WINDOW_NBYTES:
            # Where a chunk lies in the file is known to the reader alone, so all pages of the file are dropped.
            drop_pages(self._file.fileno())
            self._read = 0
        return out

    def close(self) -> None:
        self._reader.close()
        if self._file is not None:
            self._file.close()


class _StreamedRows:
    """Values that can only be read in order, which is how blocks are asked for."""

    needs_buffer = True

    def __init__(self, spec: TensorSpec) -> None:
        self._stream = ByteStream(spec)

    def read(self, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - the next rows are these
        self._stream.fill(out)
        return out

    def close(self) -> None:
        self._stream.close()


class _ExtentRows:
    """Bytes of a file, in C order or with strides."""

    needs_buffer = True

    def __init__(self, spec: TensorSpec, location: Extent, *, drop: bool) -> None:
        self._spec = spec
        self._location = location
        # Strided blocks come back to the same pages.
        self._drop = drop and spec.contiguous
        self._strides = None if spec.contiguous else location.strides
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._file = _open(location.path)

    def read(self, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - out has their shape
        if self._strides is None:
            self._fill(self._location.offset + start * self._spec.row_nbytes, out.view(-1).view(torch.uint8))
        else:
            skipped = start * self._strides[0] if self._strides else 0
            self._gather(self._location.offset + skipped * self._spec.dtype.itemsize, self._strides, out)
        return out

    def _gather(self, offset: int, strides: tuple[int, ...], out: torch.Tensor) -> None:
        """Read the span that a strided block lies in, where it fits the scratch memory; else slice by slice.

        Slices are taken along the largest stride, so a Fortran-ordered block becomes one run per column.
        """
        itemsize = self._spec.dtype.itemsize
        count = 1 + sum((n - 1) * s for n, s in zip(out.shape, strides, strict=True))
        if count * itemsize <= SCRATCH_NBYTES:
            if not len(self._scratch):
                self._scratch = torch.empty(SCRATCH_NBYTES, dtype=torch.uint8)
            span = self._scratch[: count * itemsize]
            self._fill(offset, span)
            out.copy_(span.view(self._spec.dtype).as_strided(out.shape, strides))
            return
        dim = max(range(out.ndim), key=lambda d: strides[d] if out.shape[d] > 1 else -1)
        rest = strides[:dim] + strides[dim + 1 :]
        for i in range(out.shape[dim]):
            self._gather(offset + i * strides[dim] * itemsize, rest, out.select(dim, i))

    def _fill(self, offset: int, out: torch.Tensor) -> None:
        view = out.numpy().data
        self._file.seek(offset)
        done = 0
        while done < len(view):
            got = self._file.readinto(view[done:])
            if not got:
                end = offset + len(view)
                found = os.fstat(self._file.fileno()).st_size
                msg = (
                    f"{self._location.path}: tensor {self._spec.name!r} needs bytes up to {end:,}, found the end of the "
                    f"file at {found:,}: it was truncated; restore or convert it again"
                )
                raise CorruptFileError(msg, path=self._location.path, tensor=self._spec.name)
            done += got
        if self._drop:
            drop_pages(self._file.fileno(), offset, len(view))

    def close(self) -> None:
        self._file.close()


class _PartRows:
    """Parts one after another; blocks come in order, so one file is open at a time."""

    needs_buffer = True

    def __init__(self, spec: TensorSpec, *, drop: bool) -> None:
        self._parts = parts_of(spec)
        self._drop = drop
        self._start = self._stop = 0  # rows of the part that is open
        self._reader: _ExtentRows | None = None

    def read(self, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        done = start
        while done < stop:
            while done >= self._stop:
                self._open_next()
            last = min(stop, self._stop)
            assert self._reader is not None
            self._reader.read(done - self._start, last - self._start, out[done - start : last - start])
            done = last
        return out

    def _open_next(self) -> None:
        self.close()
        part = next(self._parts)
        assert isinstance(part.location, Extent)
        self._reader = _ExtentRows(part, part.location, drop=self._drop)
        self._start, self._stop = self._stop, self._stop + part.n_rows

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()


class _HugeRows:
    """Rows larger than any buffer that fits the memory bound: views of a map, whose pages are not our memory."""

    needs_buffer = False

    def __init__(self, spec: TensorSpec, location: Extent) -> None:
        self._map = mapping.FileMap(location.path)
        self._values = mapping.view(self._map, location.offset, spec.dtype, spec.shape)

    def read(self, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - BlockReader's signature
        return self._values[start:stop]

    def close(self) -> None:
        self._map.close()


def _open(path: Path) -> FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as exc:
        msg = f"{path}: expected a file that can be read, found: {exc.strerror or exc}; check the path and its permissions"
        raise CorruptFileError(msg, path=path) from exc
