"""Where the numbers of each column lie, record batch by record batch."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from jasper_store.formats.arrow.flatbuffer import FlatbufferError
from jasper_store.formats.files import read_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jasper_store.formats.arrow.messages import Batch
    from jasper_store.formats.arrow.schema import Column, Level

__all__ = ["ColumnError", "ColumnParts", "Columns", "buffer_of", "check_node", "further_buffers"]

_PAIR = struct.Struct("<qq")
_BLOCK_ROWS = 1 << 18
# Arrow requires buffers at multiples of 8 bytes.
_ALIGNMENT = 8
_DECODE = "decode it (table.set_column with column.combine_chunks().dictionary_decode()) and write the table again"
_COMPRESSED = (
    "write it again without compression: pyarrow.ipc.IpcWriteOptions(compression=None), or "
    "pyarrow.feather.write_feather(table, path, compression='uncompressed')"
)
_NULLS = "fill them (pyarrow.compute.fill_null) or drop their rows, and write the table again"


class ColumnError(Exception):
    """A column of numbers that cannot be read where it lies; its text continues "it"."""

    def __init__(self, column: str, found: str, remedy: str) -> None:
        super().__init__(found)
        self.column = column
        self.remedy = remedy


class _UnequalError(Exception):
    """A column of lists of different lengths."""


@dataclass
class ColumnParts:
    """A column, and its part in each record batch that has rows.

    Attributes:
        column: the column.
        shape: shape of a row; of lists, known with the first row.
        offsets: byte offset of each part in the file.
        rows: rows of each part.
    """

    column: Column
    shape: tuple[int, ...]
    offsets: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


class Columns:
    """Collects the parts of all columns. Reads the offsets of lists through ``file``.

    Attributes:
        parts: one of each column, but for those in ``unequal``.
        unequal: columns of lists of different lengths, each with what was found.
    """

    def __init__(self, file: BinaryIO, size: int, columns: Sequence[Column]) -> None:
        self.parts = [ColumnParts(column, tuple(level.size or 0 for level in column.levels)) for column in columns]
        self.unequal: list[tuple[Column, str]] = []
        self._file = file
        # Hostile buffers lie over each other. Those of a sound file have room in it, so that is how much is read.
        self._readable = size
        self._views = max((column.views for column in columns), default=0)

    def add(self, batch: Batch) -> None:
        """Add a record batch.

        Raises:
            ColumnError: a column cannot be read in place.
            FlatbufferError: the record batch is damaged.
        """
        if not batch.length:
            return
        further = further_buffers(batch, self._views)
        kept = []
        for parts in self.parts:
            try:
                offset, shape = self._place(parts.column, batch, further[parts.column.views])
                if parts.rows and shape != parts.shape:
                    raise _UnequalError(f"shape {list(parts.shape)} and {list(shape)}")  # noqa: TRY301
            except _UnequalError as exc:
                self.unequal.append((parts.column, str(exc)))
                continue
            parts.shape = shape
            parts.offsets.append(offset)
            parts.rows.append(batch.length)
            kept.append(parts)
        self.parts = kept

    def _place(self, column: Column, batch: Batch, further: int) -> tuple[int, tuple[int, ...]]:
        """Byte offset of a column's first number in the file, and the shape of its rows."""
        if column.refused:
            raise ColumnError(column.name, column.refused, _DECODE)
        if batch.compressed:
            raise ColumnError(column.name, "is compressed", _COMPRESSED)
        assert column.dtype is not None
        node, buffer = column.node, column.buffer + further
        first, count = 0, batch.length
        shape = []
        _require_full(column, batch, node, count, exact=True)
        for level in column.levels:
            if level.width:
                first, size = self._prove(column, level, batch, buffer + 1, first, count)
            else:
                size = level.size or 0
                first *= size
            shape.append(size)
            count *= size
            node += 1
            buffer += 2 if level.width else 1
            _require_full(column, batch, node, first + count)
        offset, nbytes = buffer_of(batch, buffer + 1)
        start, itemsize = first * column.dtype.itemsize, column.dtype.itemsize
        if start + count * itemsize > nbytes:
            raise FlatbufferError(
                f"column {column.name!r:.100} needs {start + count * itemsize} bytes of a buffer of {nbytes}"
            )
        return offset + start, tuple(shape)

    def _prove(
        self, column: Column, level: Level, batch: Batch, buffer: int, first: int, count: int
    ) -> tuple[int, int]:
        """First item of lists ``first`` to ``first + count``, and the length that all of them have."""
        offset, nbytes = buffer_of(batch, buffer)
        if (first + count + 1) * level.width > nbytes:
            raise FlatbufferError(
                f"column {column.name!r:.100} needs {first + count + 1} offsets, in a buffer of {nbytes} bytes"
            )
        self._readable -= (count + 1) * level.width
        if self._readable < 0:
            raise FlatbufferError("its columns lie over each other")
        dtype = np.dtype(f"<i{level.width}")
        begin, size = 0, None
        for done in range(0, count, _BLOCK_ROWS):
            block = min(_BLOCK_ROWS, count - done) + 1
            raw = read_at(self._file, offset + (first + done) * level.width, block * level.width)
            if len(raw) < block * level.width:
                raise FlatbufferError("its file was cut while it was read")
            offsets = np.frombuffer(raw, dtype).astype(np.int64)
            if size is None:
                begin, size = int(offsets[0]), int(offsets[1]) - int(offsets[0])
                if begin < 0 or size < 0:
                    raise FlatbufferError(f"column {column.name!r:.100} has lists that end before they begin")
            lengths = np.diff(offsets)
            if (lengths != size).any():
                row = int(np.argmax(lengths != size))
                raise _UnequalError(f"{size} and {int(lengths[row])}")
        return begin, size or 0


def check_node(column: Column, batch: Batch, number: int, count: int, *, exact: bool = False) -> int:
    """Check a node's length; returns how many nulls it has."""
    start, there = batch.nodes
    if number >= there:
        raise FlatbufferError(f"a record batch without the column {column.name!r:.100}")
    length, nulls = _PAIR.unpack_from(batch.data, start + 16 * number)
    if length < count or (exact and length != count):
        raise FlatbufferError(f"column {column.name!r:.100} has {length} values, expected {count}")
    return int(nulls)


def _require_full(column: Column, batch: Batch, number: int, count: int, *, exact: bool = False) -> None:
    nulls = check_node(column, batch, number, count, exact=exact)
    if nulls:
        raise ColumnError(column.name, f"has {nulls} nulls in a record batch of {batch.length} rows", _NULLS)


def buffer_of(batch: Batch, number: int) -> tuple[int, int]:
    """Byte offset of a buffer in the file, and its bytes, all inside the body of the record batch."""
    start, there = batch.buffers
    if number >= there:
        raise FlatbufferError(f"a record batch of {there} buffers, expected number {number}")
    offset, nbytes = _PAIR.unpack_from(batch.data, start + 16 * number)
    if offset < 0 or nbytes < 0 or offset + nbytes > batch.body_nbytes:
        raise FlatbufferError(f"a buffer of bytes {offset} to {offset + nbytes}, in a body of {batch.body_nbytes}")
    if nbytes and (batch.body + offset) % _ALIGNMENT:
        raise FlatbufferError(f"a buffer at byte {batch.body + offset}, which is no multiple of {_ALIGNMENT}")
    return batch.body + offset, nbytes


def further_buffers(batch: Batch, views: int) -> list[int]:
    """Buffers that the first 0, 1, ... up to ``views`` columns of views have besides their two."""
    if not views:
        return [0]
    start, there = batch.views
    if views > there:
        raise FlatbufferError("a record batch that does not say how many buffers its views have")
    counts = np.frombuffer(batch.data, "<i8", views, start)
    if ((counts < 0) | (counts > batch.buffers[1])).any():
        raise FlatbufferError("a record batch whose views have more buffers than there are")
    return [0, *np.cumsum(counts).tolist()]
