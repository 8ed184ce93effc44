"""Arrow IPC files and streams: columns of numbers, and of lists of them, lie there as they would lie in memory.

The metadata is read here and not by pyarrow, since pyarrow gives addresses in a map and no places in a file, its map ends
the process when the file is cut, and an extra would be needed to open what :mod:`datasets` has written.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, NoReturn

import numpy as np

from jasper_store.errors import CorruptFileError
from jasper_store.formats.arrow.columns import ColumnError, Columns
from jasper_store.formats.arrow.flatbuffer import FlatbufferError
from jasper_store.formats.arrow.messages import batches_of, open_messages
from jasper_store.formats.arrow.ragged import ragged_of, why_not_ragged
from jasper_store.formats.arrow.schema import columns_of
from jasper_store.formats.arrow.texts import texts_of
from jasper_store.formats.base import Extent, Parts, Skipped, TensorSpec
from jasper_store.formats.files import check_shape, open_for_reading
from jasper_store.formats.texts import SkippedMemo

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from jasper_store.formats.arrow.columns import ColumnParts
    from jasper_store.formats.base import FormatName, Schema
    from jasper_store.formats.texts import Texts

__all__ = ["ArrowFormat"]

_MEMO = SkippedMemo()


class ArrowFormat:
    """Reads uncompressed Arrow IPC files (Feather version 2) and streams; each record batch is a part."""

    name: FormatName = "arrow"
    suffixes: tuple[str, ...] = (".arrow", ".feather")
    one_file: str | None = None

    def locate(self, path: Path, schema: Schema) -> list[TensorSpec]:  # noqa: ARG002 - names need no schema
        """See :meth:`jasper_store.formats.protocols.ReadFormat.locate`. Tensors are named by their columns.

        Of a column of lists with offsets, the offsets are read. If they prove that all lists have one length, it is one
        tensor. Else it is a ragged one, whose offsets are kept in memory.
        """
        key = _MEMO.key(path)
        found, skipped = _read(path)
        _MEMO.put(key, skipped)
        return found

    def skipped(self, path: Path, schema: Schema) -> list[Skipped]:  # noqa: ARG002
        """See :class:`jasper_store.formats.protocols.SupportsSkipped`: columns of no numbers, and lists that are no rows."""
        key = _MEMO.key(path)
        known = _MEMO.get(key)
        return _MEMO.put(key, _read(path)[1]) if known is None else known

    def texts(self, path: Path, schema: Schema) -> list[Texts]:  # noqa: ARG002
        """See :class:`jasper_store.formats.texts.SupportsTexts`: columns of strings."""
        with _opened(path) as (file, size):
            messages = open_messages(file, size)
            columns = columns_of(messages.schema, messages.version)
            rows = sum(batch.length for batch in batches_of(file, size, messages))
        return texts_of(path, columns, rows, _opened)


def _read(path: Path) -> tuple[list[TensorSpec], list[Skipped]]:
    """Columns as tensors, and those that are passed over."""
    with _opened(path) as (file, size):
        messages = open_messages(file, size)
        if messages.schema.integer(0, 2) != 0:
            _refuse(
                path, "its numbers are big-endian", "open it with pyarrow on a little-endian machine and write it again"
            )
        found = columns_of(messages.schema, messages.version)
        skipped = [Skipped(c.name, path, f"a column of {c.reason}") for c in found if c.dtype is None]
        columns = Columns(file, size, [c for c in found if c.dtype is not None])
        for batch in batches_of(file, size, messages):
            columns.add(batch)
        specs = [_spec(path, parts) for parts in columns.parts]
        for column, lengths in columns.unequal:
            ragged: list[TensorSpec] = []
            why = why_not_ragged(column)
            if why:
                why = f"{why}, of different lengths ({lengths})"
            else:
                ragged, why = ragged_of(path, file, size, messages, column)
            specs += ragged
            if why:
                skipped.append(Skipped(column.name, path, f"a column of {why}"))
        name, times = Counter(spec.name for spec in specs).most_common(1)[0] if specs else ("", 0)
        if times > 1:
            _refuse(path, f"{times} columns are called {name!r:.100}", "rename them")
        return specs, skipped


def _spec(path: Path, parts: ColumnParts) -> TensorSpec:
    column, dtype = parts.column, parts.column.dtype
    assert dtype is not None
    rows = parts.shape if column.row_shape is None else column.row_shape
    shape, _ = check_shape((sum(parts.rows), *rows), dtype.itemsize, path=path, tensor=column.name)
    if len(parts.rows) <= 1:
        return TensorSpec(column.name, dtype, shape, Extent(path, parts.offsets[0] if parts.offsets else 0))
    starts = np.zeros(len(parts.rows) + 1, np.int64)
    np.cumsum(parts.rows, out=starts[1:])
    offsets = np.array(parts.offsets, np.int64)
    return TensorSpec(column.name, dtype, shape, Parts((path,), np.zeros(len(offsets), np.int64), offsets, starts))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file and its size; what is wrong with its content is said of it."""
    try:
        with open_for_reading(path) as opened:
            yield opened
    except FlatbufferError as exc:
        msg = f"{path}: not an Arrow file or stream that can be read: {exc}. Write it again with pyarrow or datasets."
        raise CorruptFileError(msg, path=path) from exc
    except ColumnError as exc:
        msg = f"{path}: column {exc.column!r:.100} cannot be read in place: it {exc}; {exc.remedy}."
        raise CorruptFileError(msg, path=path, tensor=exc.column) from exc


def _refuse(path: Path, found: str, remedy: str) -> NoReturn:
    msg = f"{path}: expected an Arrow file whose columns can be read in place, found that {found}; {remedy}."
    raise CorruptFileError(msg, path=path)
