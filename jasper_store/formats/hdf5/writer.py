"""Writes HDF5: contiguous datasets by plain writes at their offset, gzip in parallel, other filters through h5py."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from jasper_store.errors import IncompatibleOptionsError, UnknownNameError
from jasper_store.formats.files import (
    DATA_START,
    TensorBeingWritten,
    dtype_name,
    require_open,
    tensor_bytes,
    write_at,
)
from jasper_store.formats.hdf5 import deflate

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from numpy.typing import NDArray

    from jasper_store.formats.base import Schema
    from jasper_store.formats.protocols import FileWriter

    _Bytes = NDArray[np.uint8]

__all__ = ["CHUNK_NBYTES", "make_writer"]

CHUNK_NBYTES = 64 * 1024
"""Bytes of one compressed chunk. Measured on MiniLM embeddings: 128 KiB saves 0.1 % more and serves 0.6 times the
random rows, 32 KiB costs 0.1 % and is no faster."""

# Neighbouring chunks that are compressed together, so that finding out how is done once for them.
_BATCH_NBYTES = 16 * CHUNK_NBYTES

_PLUGINS = {"blosc": "Blosc", "zstd": "Zstd", "lz4": "LZ4"}
_DTYPES = {
    torch.bool: "?",
    torch.uint8: "|u1",
    torch.int8: "|i1",
    torch.uint16: "<u2",
    torch.int16: "<i2",
    torch.uint32: "<u4",
    torch.int32: "<i4",
    torch.uint64: "<u8",
    torch.int64: "<i8",
    torch.float16: "<f2",
    torch.bfloat16: "<u2",  # its bits, named by an attribute
    torch.float32: "<f4",
    torch.float64: "<f8",
}
# Readable by HDF5 1.10 of 2016 and later. The older form has no checksums in its metadata, so a flipped bit
# could crash the library instead of being noticed, and no mark that tells a file whose writer was killed.
_LIBVER = ("v110", "v110")


def make_writer(path: Path, schema: Schema, compression: str | None) -> FileWriter:
    """See :meth:`jasper_store.formats.hdf5.format.Hdf5Format.writer`."""
    return Hdf5Writer(path, schema, _filter_options(path, compression))


def _filter_options(path: Path, compression: str | None) -> dict[str, Any] | None:
    """Keywords for ``create_dataset``, or ``None`` for a contiguous layout."""
    if compression is None:
        return None
    if compression == "gzip":
        return {"compression": "gzip", "shuffle": True}
    if compression == "lzf":
        return {"compression": "lzf", "shuffle": True}
    if compression not in _PLUGINS:
        known = ", ".join(map(repr, ("gzip", "lzf", *_PLUGINS)))
        raise UnknownNameError(f"HDF5: unknown compression {compression!r}; use None, {known}.", path=path)
    try:
        import hdf5plugin
    except ImportError as exc:
        raise IncompatibleOptionsError(
            f"compression={compression!r} needs the package hdf5plugin; "
            "install it (pip install 'jasper-store[hdf5plugin]') or use compression='gzip'.",
            path=path,
        ) from exc
    return {**getattr(hdf5plugin, _PLUGINS[compression])(), "shuffle": compression != "blosc"}


class Hdf5Writer:
    """Writes any number of tensors, one after another; see :class:`jasper_store.formats.protocols.FileWriter`."""

    def __init__(self, path: Path, schema: Schema, filters: dict[str, Any] | None) -> None:
        import h5py

        self._path = path
        self._schema = schema
        self._filters = filters
        self._pipeline = deflate.Pipeline()
        self._sink: _Sink | None = None
        self._tensor: TensorBeingWritten | None = None
        # Only mapped data gains from alignment; chunks would waste half a page each.
        aligned = {"alignment_threshold": 1, "alignment_interval": DATA_START} if filters is None else {}
        self._h5: Any = h5py.File(path, "x", libver=_LIBVER, locking="best-effort", **aligned)
        self._raw: BinaryIO = path.open("rb+", buffering=0)
        # Nothing that opens may be left if this process is killed, so the mark of an open file must be on disk.
        self._h5.flush()

    def begin(self, name: str, dtype: torch.dtype, row_shape: tuple[int, ...] | None, rows: int | None) -> None:
        """See :class:`jasper_store.formats.protocols.FileWriter`.

        Raises:
            IncompatibleOptionsError: ``rows`` is unknown, or HDF5 cannot hold the dtype.
        """
        require_open(self._h5 is not None, self._path)
        if self._tensor is not None:
            raise IncompatibleOptionsError(
                f"{self._path}: {self._tensor.name!r} must end before {name!r} begins.", path=self._path, tensor=name
            )
        if row_shape is not None and rows is None:
            raise IncompatibleOptionsError(
                f"{self._path}: HDF5 needs the number of rows of {name!r} beforehand; "
                "write safetensors and convert it, or pass the number.",
                path=self._path,
                tensor=name,
            )
        if dtype not in _DTYPES:
            raise IncompatibleOptionsError(
                f"HDF5 cannot hold {dtype_name(dtype)} (tensor {name!r}); use format='safetensors'.", tensor=name
            )
        tensor = TensorBeingWritten(name, dtype, row_shape, rows)
        self._sink = self._make_sink(tensor)
        self._tensor = tensor

    def _make_sink(self, tensor: TensorBeingWritten) -> _Sink:
        key = self._schema.hdf5_path(tensor.name)
        if key in self._h5:
            raise IncompatibleOptionsError(
                f"{self._path}: {key!r} is written already.", path=self._path, tensor=tensor.name
            )
        shape, filters = tensor.promised_shape, self._filters
        options: dict[str, Any] = {"shape": shape, "dtype": np.dtype(_DTYPES[tensor.dtype])}
        numel = math.prod(shape)
        chunked = filters is not None and numel > 0 and len(shape) > 0
        if chunked:
            options |= {"chunks": _chunk_shape(tensor, shape), **(filters or {})}
        dataset = self._h5.create_dataset(key, dcpl=_early() if numel and shape and not chunked else None, **options)
        if tensor.dtype == torch.bfloat16:
            # Of fixed length, so that it lies within the dataset's own header, under its checksum.
            dataset.attrs["torch_dtype"] = np.bytes_("bfloat16")
        if not shape:
            return _ScalarSink(dataset)
        if not chunked:
            # Empty datasets have no place in the file, and no bytes will come.
            return _ContiguousSink(self._raw, dataset.id.get_offset() if numel else 0)
        if options["compression"] == "gzip":
            return _GzipSink(dataset, self._pipeline)
        return _LibrarySink(dataset)

    def append(self, rows: torch.Tensor) -> None:
        """See :class:`jasper_store.formats.protocols.FileWriter`."""
        tensor, sink = self._current()
        sink.write(tensor_bytes(tensor.take(rows)))

    def end(self) -> None:
        """See :class:`jasper_store.formats.protocols.FileWriter`."""
        tensor, sink = self._current()
        tensor.finish()
        sink.finish()
        self._tensor = self._sink = None

    def close(self) -> None:
        """See :class:`jasper_store.formats.protocols.FileWriter`."""
        if self._h5 is None:
            return
        if self._tensor is not None:
            raise IncompatibleOptionsError(
                f"{self._path}: {self._tensor.name!r} was begun and not ended; use abort() to give up.", path=self._path
            )
        try:
            self._pipeline.finish()
        except BaseException:
            self.abort()
            raise
        try:
            self._h5.close()
        except BaseException:
            self._discard()
            raise
        self._h5 = None
        self._raw.close()

    def abort(self) -> None:
        """See :class:`jasper_store.formats.protocols.FileWriter`."""
        if self._h5 is None:
            return
        self._pipeline.abort()
        try:
            self._h5.close()
        except (RuntimeError, OSError):
            # A full disk refuses the last of the metadata too. The error that led here is the one to be seen, and
            # what could not be written is thrown away in any case.
            pass
        finally:
            self._discard()

    def _discard(self) -> None:
        # Closing made the file look whole; an empty one opens nowhere.
        self._h5 = self._sink = self._tensor = None
        self._raw.truncate(0)
        self._raw.close()

    def _current(self) -> tuple[TensorBeingWritten, _Sink]:
        require_open(self._h5 is not None, self._path)
        if self._tensor is None or self._sink is None:
            raise IncompatibleOptionsError(
                f"{self._path}: no tensor is begun; the order is begin, append..., end, close.", path=self._path
            )
        return self._tensor, self._sink


def _early() -> Any:
    """Properties of a dataset that gets its place in the file at once and is never filled by the library."""
    import h5py

    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return plist


def _chunk_shape(tensor: TensorBeingWritten, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Whole rows, as many as make ``CHUNK_NBYTES``, at least one, at most all."""
    row_nbytes = math.prod(shape[1:]) * tensor.dtype.itemsize
    if row_nbytes >= 2**32:
        raise IncompatibleOptionsError(
            f"HDF5 cannot compress rows of 4 GiB or more (tensor {tensor.name!r}: {row_nbytes} bytes); "
            "use compression=None.",
            tensor=tensor.name,
        )
    return (min(shape[0], max(1, CHUNK_NBYTES // row_nbytes)), *shape[1:])


class _Sink(Protocol):
    """Where the bytes of one tensor go, in C order."""

    def write(self, data: _Bytes) -> None: ...

    def finish(self) -> None: ...


class _ContiguousSink:
    """Plain writes into the place that the library has set aside."""

    def __init__(self, raw: BinaryIO, offset: int) -> None:
        self.raw = raw
        self.end = offset

    def write(self, data: _Bytes) -> None:
        write_at(self.raw, self.end, data.data)
        self.end += data.nbytes

    def finish(self) -> None:
        pass


class _ScalarSink:
    """A single value, through the library."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def write(self, data: _Bytes) -> None:
        self.dataset[()] = data.view(self.dataset.dtype)[0]

    def finish(self) -> None:
        pass


class _ChunkSink(ABC):
    """Cuts the stream of bytes into batches of whole chunks; the last one is padded, as HDF5 stores it."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.rows = dataset.chunks[0]
        self.itemsize = dataset.dtype.itemsize
        self.nbytes = math.prod(dataset.chunks) * self.itemsize
        self.per_batch = min(max(_BATCH_NBYTES // self.nbytes, 1), -(-dataset.shape[0] // self.rows))
        self.buffer = np.empty(0, dtype=np.uint8)
        self.filled = 0
        self.done = 0

    def write(self, data: _Bytes) -> None:
        while len(data):
            if not self.filled:
                self.buffer = self.memory()
            n = min(len(data), len(self.buffer) - self.filled)
            self.buffer[self.filled : self.filled + n] = data[:n]
            self.filled += n
            data = data[n:]
            if self.filled == len(self.buffer):
                self.flush()

    def flush(self) -> None:
        """Hand on what the buffer holds."""
        count = -(-self.filled // self.nbytes)
        self.buffer[self.filled : count * self.nbytes] = 0
        self.batch(self.done * self.rows, count)
        self.done += count
        self.filled = 0

    def finish(self) -> None:
        if self.filled:
            self.flush()

    @abstractmethod
    def memory(self) -> _Bytes:
        """For ``per_batch`` chunks; that of a batch which was handed on may still be in use."""

    @abstractmethod
    def batch(self, row: int, count: int) -> None:
        """Store the first chunks in the buffer, which begin with this row."""


class _LibrarySink(_ChunkSink):
    """Chunks through the library's own filters."""

    def memory(self) -> _Bytes:
        return self.buffer if len(self.buffer) else np.empty(self.per_batch * self.nbytes, dtype=np.uint8)

    def batch(self, row: int, count: int) -> None:
        data = self.buffer[: count * self.nbytes]
        rows = data.view(self.dataset.dtype).reshape(-1, *self.dataset.shape[1:])
        stop = min(row + len(rows), self.dataset.shape[0])
        self.dataset[row:stop] = rows[: stop - row]


class _GzipSink(_ChunkSink):
    """Chunks compressed by the threads of a pipeline."""

    def __init__(self, dataset: Any, pipeline: deflate.Pipeline) -> None:
        self.pipeline = pipeline
        # Asking h5py for the rank of a dataset costs 20 us, as much as compressing a fifth of a chunk.
        self.low_level, self.corner = dataset.id, (0,) * (dataset.ndim - 1)
        self.work = deflate.Workspace()
        super().__init__(dataset)

    def memory(self) -> _Bytes:
        self.work = self.pipeline.workspace()
        self.work.fit(self.per_batch, self.nbytes, self.itemsize)
        return self.work.data[: self.per_batch * self.nbytes]

    def batch(self, row: int, count: int) -> None:
        def write(streams: list[memoryview]) -> None:
            for i, stream in enumerate(streams):
                self.low_level.write_direct_chunk((row + i * self.rows, *self.corner), stream)

        self.pipeline.submit(self.work, (count, self.nbytes, self.itemsize), write)
