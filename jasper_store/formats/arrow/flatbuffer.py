"""Tables of a flatbuffer, read where they lie: what Arrow's metadata is written in.

A table is a signed distance back to its vtable, then its fields; the vtable says at which byte of the table each field is, 0
for one that has its default. Tables, vectors and strings are reached by a distance forward. Every distance is checked, so that
nothing outside of the bytes is read; :class:`FlatbufferError` ends the rest.

Source: https://flatbuffers.dev/internals/.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FlatbufferError", "Table"]

_UINT16 = struct.Struct("<H")
_INT32 = struct.Struct("<i")
_UINT32 = struct.Struct("<I")
_SCALARS = {1: struct.Struct("<B"), 2: struct.Struct("<h"), 4: _INT32, 8: struct.Struct("<q")}


class FlatbufferError(Exception):
    """The bytes are no sound flatbuffer."""


class Table:
    """One table. Fields are counted from 0, as the schema lists them; a union takes two: its type, and its value."""

    __slots__ = ("_at", "_data", "_vtable", "_vtable_end")

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at
        try:
            self._vtable = at - _INT32.unpack_from(data, at)[0]
            # A negative position would count from the end.
            if self._vtable < 0:
                raise FlatbufferError("a table without description")
            self._vtable_end = self._vtable + _UINT16.unpack_from(data, self._vtable)[0]
        except struct.error as exc:
            raise FlatbufferError("a table outside of its bytes") from exc
        if self._vtable_end > len(data):
            raise FlatbufferError("a description of a table that is cut")

    @classmethod
    def root(cls, data: bytes) -> Table:
        """The table that a buffer holds."""
        return cls(data, _distance(data, 0))

    def _field(self, number: int) -> int:
        """Position of a field; 0 if it has its default."""
        entry = self._vtable + 4 + 2 * number
        if entry + 2 > self._vtable_end:
            return 0
        step: int = _UINT16.unpack_from(self._data, entry)[0]
        return self._at + step if step else 0

    def integer(self, number: int, width: int, default: int = 0) -> int:
        """A signed integer of 2, 4 or 8 bytes, an unsigned one of 1 byte."""
        at = self._field(number)
        if not at:
            return default
        try:
            value: int = _SCALARS[width].unpack_from(self._data, at)[0]
        except struct.error as exc:
            raise FlatbufferError("a number outside of its bytes") from exc
        return value

    def table(self, number: int) -> Table | None:
        """A table; ``None`` if there is none."""
        at = self._field(number)
        return Table(self._data, at + _distance(self._data, at)) if at else None

    def vector(self, number: int, itemsize: int) -> tuple[int, int]:
        """Position of the first item of a vector, and how many there are; all of them lie inside the buffer."""
        at = self._field(number)
        if not at:
            return 0, 0
        at += _distance(self._data, at)
        count = _distance(self._data, at)
        if at + 4 + count * itemsize > len(self._data):
            raise FlatbufferError(f"a list of {count} items that is cut")
        return at + 4, count

    def tables(self, number: int) -> Iterator[Table]:
        """A vector of tables, made one at a time: hostile vectors name one table many times."""
        start, count = self.vector(number, 4)
        for at in range(start, start + 4 * count, 4):
            yield Table(self._data, at + _distance(self._data, at))

    def text(self, number: int, longest: int) -> str:
        """A string of at most ``longest`` bytes; empty if there is none."""
        start, count = self.vector(number, 1)
        if count > longest:
            raise FlatbufferError(f"a text of {count} bytes, where at most {longest} are read")
        try:
            return self._data[start : start + count].decode("utf-8")
        except UnicodeDecodeError as exc:
            raise FlatbufferError(f"a text that is not UTF-8: {exc!s:.100}") from exc


def _distance(data: bytes, at: int) -> int:
    try:
        value: int = _UINT32.unpack_from(data, at)[0]
    except struct.error as exc:
        raise FlatbufferError("a reference outside of its bytes") from exc
    return value
