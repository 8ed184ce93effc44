"""Columns of an Arrow schema: what each is, and which nodes and buffers of a record batch are its own.

A record batch lists the nodes (length, nulls) and the buffers (offset, bytes) of all columns, each column before its
children. So where a column's own begin follows from all columns before it, of whatever type.

Source: https://arrow.apache.org/docs/format/Columnar.html, and Schema.fbs beside it.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from jasper_store.formats.arrow.flatbuffer import FlatbufferError

if TYPE_CHECKING:
    from jasper_store.formats.arrow.flatbuffer import Table

__all__ = ["Column", "Level", "columns_of"]

# Numbers of the union Type in Schema.fbs.
_NULL, _INT, _FLOAT, _BOOL, _LIST, _STRUCT, _UNION, _FIXED_LIST, _MAP, _LARGE_LIST, _RUN_END = (
    *(1, 2, 3, 6, 12, 13, 14, 16, 17, 21, 22),
)
_VIEWS = (23, 24)
_LIST_VIEWS = (25, 26)
_TYPE_NAMES = {
    _NULL: "nulls",
    4: "bytes",
    5: "strings",
    _BOOL: "bools, which Arrow packs as bits (cast it to int8 to have it)",
    7: "decimals",
    8: "dates",
    9: "times",
    10: "timestamps",
    11: "intervals",
    _STRUCT: "structs (flatten it to have its fields)",
    _UNION: "unions",
    15: "bytes of one width",
    _MAP: "maps",
    18: "durations",
    19: "bytes",
    20: "strings",
    _RUN_END: "runs (decode it to have it)",
    23: "bytes",
    24: "strings",
    25: "list views (cast it to list to have it)",
    26: "list views (cast it to list to have it)",
}
_BUFFERS = {_NULL: 0, _STRUCT: 1, _FIXED_LIST: 1, _RUN_END: 0, 4: 3, 5: 3, 19: 3, 20: 3, 25: 3, 26: 3}
_LAST_TYPE = 26
_TEXT_WIDTHS = {5: 4, 20: 8}
_INTEGERS = {
    (8, True): torch.int8,
    (16, True): torch.int16,
    (32, True): torch.int32,
    (64, True): torch.int64,
    (8, False): torch.uint8,
    (16, False): torch.uint16,
    (32, False): torch.uint32,
    (64, False): torch.uint64,
}
_FLOATS = {0: torch.float16, 1: torch.float32, 2: torch.float64}
# Arrow itself reads 64. Hostile metadata can name one child many times, so fields are counted, too.
_MAX_DEPTH = 64
_MAX_FIELDS = 100_000
_MAX_NAME = 4096
_MAX_NAMES = 16 << 20
_MAX_PAIRS = 64
_V4 = 3
_TENSOR = "arrow.fixed_shape_tensor"


@dataclass(frozen=True, slots=True)
class Level:
    """One dimension of a column of lists.

    Attributes:
        size: items of each list; ``None`` where offsets say it.
        width: bytes of an offset; 0 where the size is fixed.
    """

    size: int | None
    width: int


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        name: its name.
        dtype: of its numbers; ``None`` for a column that is skipped.
        levels: its dimensions after the rows, outermost first.
        row_shape: the shape that an extension type says its rows have; else ``None``.
        reason: why it is skipped.
        refused: what it holds that makes numbers unreadable where they lie; else ``""``.
        node: number of its first node.
        buffer: number of its first buffer, without those of ``views``.
        views: columns of views before it, which have as many more buffers as each record batch says.
        text_width: bytes of an offset, of a column of strings; 0 of any other.
    """

    name: str
    dtype: torch.dtype | None
    levels: tuple[Level, ...]
    row_shape: tuple[int, ...] | None
    reason: str
    refused: str
    node: int
    buffer: int
    views: int
    text_width: int = 0


def columns_of(schema: Table, version: int) -> list[Column]:
    """The columns of a schema.

    Args:
        schema: the table ``Schema``.
        version: of the metadata, as ``MetadataVersion`` numbers them.

    Raises:
        FlatbufferError: it is damaged, nested too deeply, or has a type that is not known.
    """
    walk = _Walk(version)
    return [walk.column(field) for field in schema.tables(1)]


class _Walk:
    """Counts nodes and buffers on the way through the fields."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.nodes = self.buffers = self.views = self.fields = self.named = 0

    def column(self, field: Table) -> Column:
        name = field.text(0, _MAX_NAME)
        self.named += len(name)
        if self.named > _MAX_NAMES:
            raise FlatbufferError(f"names of columns of over {_MAX_NAMES} characters in all")
        node, buffer, views = self.nodes, self.buffers, self.views
        self.count(field, 0)
        levels: list[Level] = []
        refused = ""
        inner = field
        while not inner.table(4) and (level := _level(inner)) is not None:
            levels.append(level)
            inner = _only_child(inner)
        dtype, reason = _number(inner)
        if dtype is not None and inner.table(4):
            refused = "is encoded by a dictionary"
        if levels and dtype is None:
            reason = f"lists of {reason}"
        shape = _tensor_shape(field) if len(levels) == 1 and levels[0].size is not None else None
        if shape is not None and math.prod(shape) != levels[0].size:
            shape = None
        width = 0 if levels or field.table(4) else _TEXT_WIDTHS.get(field.integer(2, 1), 0)
        return Column(name, dtype, tuple(levels), shape, reason, refused, node, buffer, views, width)

    def count(self, field: Table, depth: int) -> None:
        """Add what a field and its children take of a record batch."""
        self.fields += 1
        if depth > _MAX_DEPTH or self.fields > _MAX_FIELDS:
            raise FlatbufferError(f"over {_MAX_FIELDS} columns, or columns nested over {_MAX_DEPTH} deep")
        self.nodes += 1
        if field.table(4):  # a dictionary's numbers lie here, its values in messages of their own
            self.buffers += 2
            return
        kind = field.integer(2, 1)
        if not 1 <= kind <= _LAST_TYPE:
            raise FlatbufferError(f"a column of the unknown type {kind}")
        if kind == _UNION:
            detail = field.table(3)
            dense = detail is not None and detail.integer(0, 2) == 1
            self.buffers += 1 + dense + (self.version <= _V4)
        else:
            self.buffers += _BUFFERS.get(kind, 2)
        self.views += kind in _VIEWS
        for child in field.tables(5):
            self.count(child, depth + 1)


def _level(field: Table) -> Level | None:
    kind = field.integer(2, 1)
    if kind == _FIXED_LIST:
        detail = field.table(3)
        size = 0 if detail is None else detail.integer(0, 4)
        if size < 0:
            raise FlatbufferError(f"lists of {size} items")
        return Level(size, 0)
    return Level(None, 8 if kind == _LARGE_LIST else 4) if kind in (_LIST, _LARGE_LIST) else None


def _only_child(field: Table) -> Table:
    _, count = field.vector(5, 4)
    if count != 1:
        raise FlatbufferError(f"a list of {count} kinds of items")
    return next(field.tables(5))


def _number(field: Table) -> tuple[torch.dtype | None, str]:
    """The dtype of a column of numbers; ``None``, and what it is, for another."""
    kind, detail = field.integer(2, 1), field.table(3)
    if kind == _INT and detail is not None:
        bits, signed = detail.integer(0, 4), bool(detail.integer(1, 1))
        if (bits, signed) not in _INTEGERS:
            raise FlatbufferError(f"integers of {bits} bits")
        return _INTEGERS[bits, signed], ""
    if kind == _FLOAT and detail is not None:
        precision = detail.integer(0, 2)
        if precision not in _FLOATS:
            raise FlatbufferError(f"floats of the unknown precision {precision}")
        return _FLOATS[precision], ""
    return None, _TYPE_NAMES.get(kind, f"the type {kind}")


def _key(pair: Table) -> str:
    return pair.text(0, _MAX_NAME) if pair.vector(0, 1)[1] <= _MAX_NAME else ""


def _tensor_shape(field: Table) -> tuple[int, ...] | None:
    """Row shape of the extension type ``arrow.fixed_shape_tensor``, where its rows are in C order."""
    pairs = {_key(pair): pair for pair in itertools.islice(field.tables(6), _MAX_PAIRS)}
    kind, detail = pairs.get("ARROW:extension:name"), pairs.get("ARROW:extension:metadata")
    if kind is None or detail is None or kind.vector(1, 1)[1] > _MAX_NAME or kind.text(1, _MAX_NAME) != _TENSOR:
        return None
    try:
        found = json.loads(detail.text(1, _MAX_NAME))
        shape, order = found["shape"], found.get("permutation")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise FlatbufferError("a fixed_shape_tensor without a shape") from exc
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape) or len(shape) > 63:
        raise FlatbufferError("a fixed_shape_tensor without a shape")
    return tuple(shape) if order in (None, list(range(len(shape)))) else None
