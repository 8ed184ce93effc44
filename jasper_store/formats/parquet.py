"""Parquet: columns of numbers and of lists of one length, which pyarrow decodes one block of rows after another.

Values are encoded and compressed, so they lie nowhere as they would in memory: they are converted, or loaded whole.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from jasper_store.errors import CorruptFileError, IncompatibleOptionsError, IntegrityError, JasperStoreError
from jasper_store.formats.base import Skipped, Streamed, TensorSpec
from jasper_store.formats.files import check_shape, open_for_reading
from jasper_store.formats.texts import Texts, check_utf8

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from jasper_store.formats.base import FormatName, Schema
    from jasper_store.formats.texts import Block

__all__ = ["ParquetFormat", "column_bytes"]

_BLOCK_NBYTES = 1 << 20
_MAX_ROWS = 1 << 16
_TEXT_ROWS = 1 << 13
_TEXTS = {"string", "large_string", "string_view"}
_DTYPES = {
    "bool": torch.bool,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "uint64": torch.uint64,
    "halffloat": torch.float16,
    "float": torch.float32,
    "double": torch.float64,
}


class ParquetFormat:
    """Reads Parquet files through pyarrow (the extra ``arrow``); tensors are named by their columns."""

    name: FormatName = "parquet"
    suffixes: tuple[str, ...] = (".parquet",)
    one_file: str | None = None

    def locate(self, path: Path, schema: Schema) -> list[TensorSpec]:  # noqa: ARG002 - names need no schema
        """See :meth:`jasper_store.formats.protocols.ReadFormat.locate`.

        Of columns of lists the first row is read, which says how long they are. That all are is seen when they are read.

        Raises:
            IncompatibleOptionsError: pyarrow is not installed.
        """
        with _opened(path) as file:
            fields = [field for field in file.schema_arrow if not _no_number(field.type)]
            name, times = Counter(field.name for field in fields).most_common(1)[0] if fields else ("", 0)
            if times > 1:
                _corrupt(path, f"{times} columns are called {name!r:.100}", "rename them")
            return [_spec(path, file, field.name, field.type) for field in fields]

    def skipped(self, path: Path, schema: Schema) -> list[Skipped]:  # noqa: ARG002
        """See :class:`jasper_store.formats.protocols.SupportsSkipped`: columns of no numbers."""
        with _opened(path) as file:
            reasons = {field.name: _no_number(field.type) for field in file.schema_arrow}
        return [Skipped(name, path, f"a column of {reason}") for name, reason in reasons.items() if reason]

    def texts(self, path: Path, schema: Schema) -> list[Texts]:  # noqa: ARG002
        """See :class:`jasper_store.formats.texts.SupportsTexts`: columns of strings."""
        with _opened(path) as file:
            names = [field.name for field in file.schema_arrow if str(field.type) in _TEXTS]
            rows = file.metadata.num_rows
        return [Texts(name, (path,), rows, partial(_text_blocks, path, name, rows)) for name in names]


def column_bytes(path: Path, spec: TensorSpec, column: str) -> Iterator[memoryview]:
    """The values of a column, a block of rows at a time.

    Raises:
        CorruptFileError: it has nulls or lists of another length, or the file is damaged.
        IncompatibleOptionsError: pyarrow is not installed.
    """
    rows = min(max(_BLOCK_NBYTES // max(spec.row_nbytes, 1), 1), _MAX_ROWS)
    with _opened(path) as file:
        done = 0
        for batch in file.iter_batches(batch_size=rows, columns=[column], use_threads=False):
            values, shape = _dense(path, column, batch.column(0), done)
            if shape != spec.shape[1:] and len(batch):
                _corrupt(
                    path,
                    f"column {column!r} has rows of shape {list(spec.shape[1:])}, and {list(shape)} from row {done} on",
                    "pad or split them, and write it again",
                )
            done += len(batch)
            if len(values):
                yield np.ascontiguousarray(values).data.cast("B")


def _text_blocks(path: Path, column: str, rows: int) -> Iterator[Block]:
    import pyarrow as pa

    with _opened(path) as file:
        done = 0
        for batch in file.iter_batches(batch_size=_TEXT_ROWS, columns=[column], use_threads=False):
            array = batch.column(0).cast(pa.large_string())
            if array.null_count:
                msg = (
                    f"the column has {array.null_count} nulls in {len(array)} rows from row {done} on; fill them first"
                )
                raise IntegrityError(msg, path=path, tensor=column)
            _, offsets, values = array.buffers()
            ends = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
            encoded = np.frombuffer(values or b"", np.uint8)[int(ends[0]) : int(ends[-1])]
            check_utf8(column, encoded, np.diff(ends), done)
            done += len(array)
            yield encoded, np.diff(ends)
        if done != rows:
            _corrupt(path, f"column {column!r} has {done} strings in a file of {rows} rows", "write it again")


def _spec(path: Path, file: Any, name: str, kind: Any) -> TensorSpec:
    row: tuple[int, ...] = ()
    while _is_list(kind):
        row = (*row, max(getattr(kind, "list_size", 0), 0))
        kind = kind.value_type
    dtype = _DTYPES[str(kind)]
    batches = file.iter_batches(batch_size=1, columns=[name], use_threads=False)
    first = next(batches, None) if file.metadata.num_rows else None
    if first is not None:
        _, row = _dense(path, name, first.column(0), 0)
    shape, _ = check_shape((file.metadata.num_rows, *row), dtype.itemsize, path=path, tensor=name)
    return TensorSpec(name, dtype, shape, Streamed((path,), "parquet", name))


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _no_number(kind: Any) -> str:
    """What a column holds if it is no numbers and no lists of them; else ``""``."""
    inner = kind
    while _is_list(inner):
        inner = inner.value_type
    return "" if str(inner) in _DTYPES else str(kind)[:200]


def _dense(path: Path, column: str, array: Any, row: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """The numbers of a block as one run, and the shape of its rows."""
    from pyarrow import types

    shape: list[int] = []
    while True:
        if array.null_count:
            _corrupt(
                path,
                f"column {column!r} has {array.null_count} nulls within {len(array)} values from row {row} on",
                "fill them (pyarrow.compute.fill_null) or drop their rows, and write it again",
            )
        if not _is_list(array.type):
            return array.to_numpy(zero_copy_only=False), tuple(shape)
        if types.is_fixed_size_list(array.type):
            shape.append(array.type.list_size)
        else:
            lengths = np.diff(array.offsets.to_numpy())
            shape.append(int(lengths[0]) if len(lengths) else 0)
            if (lengths != shape[-1]).any():
                _corrupt(
                    path,
                    f"column {column!r} has lists of {shape[-1]} and of {int(lengths[lengths != shape[-1]][0])} values",
                    "pad or split them, and write it again",
                )
        array = array.flatten()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, opened by pyarrow; what pyarrow raises is translated."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as exc:
        msg = f"{path}: Parquet is read by pyarrow, which is not installed; run: pip install 'jasper-store[arrow]'"
        raise IncompatibleOptionsError(msg, path=path) from exc
    with open_for_reading(path):  # what is no file, or not there, gives the error that it gives everywhere
        pass
    try:
        # Read in blocks, without a map: a file that is cut meanwhile gives an error.
        with parquet.ParquetFile(path, memory_map=False, pre_buffer=False, buffer_size=_BLOCK_NBYTES) as file:
            yield file
    except JasperStoreError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError) as exc:
        _corrupt(path, f"pyarrow says: {type(exc).__name__}: {exc!s:.200}", "write it again", cause=exc)


def _corrupt(path: Path, found: str, remedy: str, *, cause: BaseException | None = None) -> NoReturn:
    msg = f"{path}: not a Parquet file that can be read: {found}; {remedy}."
    raise CorruptFileError(msg, path=path) from cause
