"""The messages of an Arrow IPC file or stream: its schema, and where each record batch lies.

A message is a length, metadata (a flatbuffer) and a body. A stream is messages up to an end mark. A file holds a stream
between two magic numbers, and before the second a footer that lists the record batches.

Source: https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from jasper_store.formats.arrow.flatbuffer import FlatbufferError, Table
from jasper_store.formats.files import read_at

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Batch", "batches_of", "open_messages"]

_MAGIC = b"ARROW1"
_CONTINUATION = 0xFFFFFFFF
_SCHEMA, _RECORD_BATCH = 1, 3
# Most of a large one is what other programs noted in it. Only fields are walked through.
_MAX_METADATA = 64 << 20
# One read takes a message's length and, of most, all of its metadata.
_GUESS = 4096
_BLOCK = np.dtype([("offset", "<i8"), ("metadata", "<i4"), ("padding", "<i4"), ("body", "<i8")])
_LENGTHS = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class Batch:
    """One record batch.

    Attributes:
        data: its metadata.
        length: rows.
        nodes: position in ``data`` of (length, nulls) of each node, int64, and how many.
        buffers: position in ``data`` of (offset, bytes) of each buffer, int64, and how many.
        views: position in ``data`` of the further buffers of each column of views, int64, and how many.
        compressed: whether its buffers are compressed.
        body: byte offset of its body in the file.
        body_nbytes: bytes of its body, all inside the file.
    """

    data: bytes
    length: int
    nodes: tuple[int, int]
    buffers: tuple[int, int]
    views: tuple[int, int]
    compressed: bool
    body: int
    body_nbytes: int


@dataclass(frozen=True, slots=True)
class _Message:
    data: bytes
    kind: int
    header: Table | None
    version: int
    body: int
    end: int


@dataclass(frozen=True, slots=True)
class Messages:
    """What is known before the record batches are.

    Attributes:
        schema: the table ``Schema``.
        version: of the metadata.
        start: where the stream goes on after the schema.
        blocks: (offset, bytes of metadata, bytes of body) of each record batch, of a file; ``None`` of a stream.
    """

    schema: Table
    version: int
    start: int
    blocks: np.ndarray | None


def open_messages(file: BinaryIO, size: int) -> Messages:
    """Read the schema of a file or stream.

    Raises:
        FlatbufferError: it is neither, or damaged.
    """
    head = read_at(file, 0, 8)
    if head.startswith(_MAGIC):
        return _footer(file, size)
    if head.startswith(b"FEA1"):
        raise FlatbufferError("it is Feather version 1; write it again with version 2")
    message = _message(file, size, 0)
    if message is None or message.kind != _SCHEMA or message.header is None:
        raise FlatbufferError(f"an Arrow IPC file or stream was expected, which begins with a schema, found {head!r}")
    return Messages(message.header, message.version, message.end, None)


def batches_of(file: BinaryIO, size: int, messages: Messages) -> Iterator[Batch]:
    """The record batches, in order, read one at a time.

    Raises:
        FlatbufferError: one is damaged or cut, or the end is missing.
    """
    if messages.blocks is not None:
        for offset, metadata, _, body in messages.blocks.tolist():
            message = _message(file, size, offset)
            if message is None or message.body != offset + metadata or message.end != message.body + body:
                raise FlatbufferError(f"its footer and the message at byte {offset} disagree")
            if message.kind != _RECORD_BATCH:
                raise FlatbufferError(f"its footer says that a record batch is at byte {offset}")
            yield _batch(message)
        return
    at = messages.start
    while (message := _message(file, size, at)) is not None:
        if message.kind == _RECORD_BATCH:
            yield _batch(message)
        elif message.kind == _SCHEMA:
            raise FlatbufferError(f"a second schema at byte {at}")
        at = message.end


def _footer(file: BinaryIO, size: int) -> Messages:
    tail = read_at(file, max(size - 10, 0), 10)
    if size < 26 or tail[4:] != _MAGIC:
        raise FlatbufferError("it does not end as an Arrow file does (was it truncated?)")
    length = int.from_bytes(tail[:4], "little")
    start = size - 10 - length
    if start < 8 or length > _MAX_METADATA:
        raise FlatbufferError(f"its footer should have {length} bytes, in a file of {size}")
    data = read_at(file, start, length)
    root = Table.root(data)
    schema = root.table(1)
    if schema is None:
        raise FlatbufferError("a footer without schema")
    at, count = root.vector(3, _BLOCK.itemsize)
    blocks = np.frombuffer(data, _BLOCK, count, at) if count else np.empty(0, _BLOCK)
    # Compared one by one, so that no sum is over 64 bits; in order, so that nothing is read twice.
    end = 8
    for offset, metadata, _, body in blocks.tolist():
        if offset < end or metadata < 8 or body < 0:
            raise FlatbufferError("its footer lists record batches that are not one after another")
        end = offset + metadata + body
        if end > start:
            raise FlatbufferError(f"a record batch that ends at byte {end}, beyond the data")
    return Messages(schema, root.integer(0, 2), 8, blocks)


def _message(file: BinaryIO, size: int, at: int) -> _Message | None:
    """The message that begins at a byte; ``None`` for the end mark."""
    head = read_at(file, at, min(_GUESS, max(size - at, 0)))
    if len(head) < 4:
        raise FlatbufferError(f"a message or the end mark was expected at byte {at} of {size} (was it truncated?)")
    first = int.from_bytes(head[:4], "little")
    # Before Arrow 0.15 the length came alone.
    start, length = (4, first) if first != _CONTINUATION else (8, int.from_bytes(head[4:8], "little"))
    if len(head) < start:
        raise FlatbufferError(f"the end mark at byte {at} is cut")
    if not length:
        return None
    if length > _MAX_METADATA or at + start + length > size:
        raise FlatbufferError(f"a message at byte {at} with {length} bytes of metadata, in a file of {size}")
    data = head[start : start + length]
    if len(data) < length:
        data += read_at(file, at + start + len(data), length - len(data))
    root = Table.root(data)
    body, nbytes = at + start + length, root.integer(3, 8)
    if not 0 <= nbytes <= size - body:
        raise FlatbufferError(f"a message at byte {at} with a body of {nbytes} bytes, in a file of {size} (truncated?)")
    return _Message(data, root.integer(1, 1), root.table(2), root.integer(0, 2), body, body + nbytes)


def _batch(message: _Message) -> Batch:
    header = message.header
    if header is None or header.integer(0, 8) < 0:
        raise FlatbufferError("a record batch without a length")
    return Batch(
        message.data,
        header.integer(0, 8),
        header.vector(1, 16),
        header.vector(2, 16),
        header.vector(4, 8),
        header.table(3) is not None,
        message.body,
        message.end - message.body,
    )
