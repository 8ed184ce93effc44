"""Columns of strings, read block by block; like numbers, they lie in the file as they would lie in memory."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from jasper_store.errors import IntegrityError
from jasper_store.formats.arrow.columns import buffer_of, check_node, further_buffers
from jasper_store.formats.arrow.flatbuffer import FlatbufferError
from jasper_store.formats.arrow.messages import batches_of, open_messages
from jasper_store.formats.files import read_at
from jasper_store.formats.texts import BLOCK_NBYTES, Texts, check_utf8

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

    from jasper_store.formats.arrow.messages import Batch
    from jasper_store.formats.arrow.schema import Column
    from jasper_store.formats.texts import Block

__all__ = ["texts_of"]

_BLOCK_ROWS = 1 << 16


def texts_of(
    path: Path,
    columns: Sequence[Column],
    rows: int,
    opened: Callable[[Path], AbstractContextManager[tuple[BinaryIO, int]]],
) -> list[Texts]:
    """The columns of strings among some columns.

    Args:
        path: the file.
        columns: columns of it.
        rows: rows of all its record batches.
        opened: opens the file, and names it in errors of what it holds.
    """
    return [
        Texts(column.name, (path,), rows, partial(_blocks, path, column, opened))
        for column in columns
        if column.text_width
    ]


def _blocks(
    path: Path, column: Column, opened: Callable[[Path], AbstractContextManager[tuple[BinaryIO, int]]]
) -> Iterator[Block]:
    with opened(path) as (file, size):
        done = 0
        for batch in batches_of(file, size, open_messages(file, size)):
            for values, lengths in _batch_blocks(file, column, batch, done):
                check_utf8(column.name, values, lengths, done)
                done += len(lengths)
                yield values, lengths


def _batch_blocks(file: BinaryIO, column: Column, batch: Batch, done: int) -> Iterator[Block]:
    """The strings of one record batch; ``done`` rows came before it."""
    if not batch.length:
        return
    if batch.compressed:
        raise _not_kept(column, "is compressed; write it again without compression, or as Parquet")
    _require_no_nulls(column, batch, done)
    buffer = column.buffer + further_buffers(batch, column.views)[column.views]
    at, nbytes = buffer_of(batch, buffer + 1)
    values_at, values_nbytes = buffer_of(batch, buffer + 2)
    if (batch.length + 1) * column.text_width > nbytes:
        raise FlatbufferError(
            f"column {column.name!r:.100} needs {batch.length + 1} offsets, in a buffer of {nbytes} bytes"
        )
    for first in range(0, batch.length, _BLOCK_ROWS):
        count = min(_BLOCK_ROWS, batch.length - first)
        raw = _read(file, at + first * column.text_width, (count + 1) * column.text_width)
        offsets = raw.view(f"<i{column.text_width}").astype(np.int64)
        lengths = np.diff(offsets)
        if offsets[0] < 0 or (lengths < 0).any() or offsets[-1] > values_nbytes:
            raise FlatbufferError(f"column {column.name!r:.100} has strings outside of their {values_nbytes} bytes")
        yield from _runs(file, values_at, offsets, lengths)


def _runs(file: BinaryIO, values_at: int, offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> Iterator[Block]:
    """Strings some megabytes at a time; one that is longer comes alone."""
    first = 0
    while first < len(lengths):
        last = int(np.searchsorted(offsets, offsets[first] + BLOCK_NBYTES, side="right")) - 1
        last = min(max(last, first + 1), len(lengths))
        yield (
            _read(file, values_at + int(offsets[first]), int(offsets[last] - offsets[first])),
            lengths[first:last],
        )
        first = last


def _require_no_nulls(column: Column, batch: Batch, done: int) -> None:
    nulls = check_node(column, batch, column.node, batch.length, exact=True)
    if nulls:
        raise _not_kept(
            column,
            f"has {nulls} nulls in {batch.length} rows from row {done} on; fill them (pyarrow.compute.fill_null) and write "
            "the table again",
        )


def _read(file: BinaryIO, at: int, nbytes: int) -> NDArray[np.uint8]:
    raw = read_at(file, at, nbytes)
    if len(raw) < nbytes:
        raise FlatbufferError("its file was cut while it was read")
    return np.frombuffer(raw, np.uint8)


def _not_kept(column: Column, found: str) -> IntegrityError:
    return IntegrityError(f"the column {found}", tensor=column.name)
