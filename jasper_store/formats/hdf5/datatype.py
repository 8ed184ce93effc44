"""A check of HDF5's datatypes, as headers describe them, before the library decodes them.

The library (2.0 and before) calls functions that it does not have for a variable-length type which is neither a
sequence nor a text, and decodes types within types by recursion.

Source: HDF5 File Format Specification, section IV.A.2.d "The Datatype Message".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jasper_store.formats.hdf5.raw import RawFile

__all__ = ["check_datatype"]

_MAX_DEPTH = 16
_STRING, _OPAQUE, _COMPOUND, _REFERENCE, _ENUM, _VARIABLE, _ARRAY, _COMPLEX = 3, 5, 6, 7, 8, 9, 10, 11
_NUMBERS = {0, 1, 4}
_MAX_NUMBER = 64
# Bytes of the properties of the classes that hold no other type.
_PROPERTIES = {0: 4, 1: 12, 2: 2, _STRING: 0, 4: 4, _REFERENCE: 0}


def check_datatype(raw: RawFile, data: bytes, at: int, what: str, depth: int = 0) -> int:
    """Check a datatype and the types within it.

    Args:
        raw: the file.
        data: what holds the datatype.
        at: where it begins.
        what: names it in messages.
        depth: types around it.

    Returns:
        Where it ends.

    Raises:
        CorruptFileError: it is of no known class, nested too deeply, or does not end within ``data``.
    """
    head = raw.part(data, at, 8, what)
    kind, version, bits = head[0] & 15, head[0] >> 4, int.from_bytes(head[1:4], "little")
    at += 8
    if depth > _MAX_DEPTH or not 1 <= version <= 5:
        raw.corrupt(f"{what} has a datatype of version {version}, or nested over {_MAX_DEPTH} deep")
    # Room is made for values of the claimed size.
    if kind in _NUMBERS and not 0 < int.from_bytes(head[4:8], "little") <= _MAX_NUMBER:
        raw.corrupt(f"{what} has a datatype of numbers of {int.from_bytes(head[4:8], 'little')} bytes")
    if kind in _PROPERTIES:
        return at + _PROPERTIES[kind]
    if kind == _OPAQUE:
        return at + (bits & 255)
    if kind == _COMPOUND:
        return _compound(raw, data, at, what, depth, version, bits & 0xFFFF, int.from_bytes(head[4:8], "little"))
    if kind == _ENUM:
        nbytes = int.from_bytes(raw.part(data, at + 4, 4, what), "little")
        at = check_datatype(raw, data, at, what, depth + 1)
        for _ in range(bits & 0xFFFF):
            at = _name(raw, data, at, what, version)
        return at + (bits & 0xFFFF) * nbytes
    if kind == _VARIABLE and bits & 15 > 1:
        raw.corrupt(f"{what} has a datatype of variable length that is neither a sequence nor a text ({bits & 15})")
    if kind == _ARRAY:
        dimensions = raw.part(data, at, 1, what)[0]
        at += 1 + 4 * dimensions if version > 2 else 4 + 8 * dimensions
    elif kind not in {_VARIABLE, _COMPLEX}:
        raw.corrupt(f"{what} has a datatype of the unknown class {kind}")
    return check_datatype(raw, data, at, what, depth + 1)


def _compound(
    raw: RawFile, data: bytes, at: int, what: str, depth: int, version: int, members: int, nbytes: int
) -> int:
    # The offset within an element takes as few bytes as there can be, since version 3.
    width = 4 if version < 3 else max(1, -(-nbytes.bit_length() // 8))
    for _ in range(members):
        # Version 1 repeats in each member the dimensions that are an array's now.
        at = _name(raw, data, at, what, version) + width + (28 if version == 1 else 0)
        at = check_datatype(raw, data, at, what, depth + 1)
    return at


def _name(raw: RawFile, data: bytes, at: int, what: str, version: int) -> int:
    """Where the name ends that begins at ``at``; before version 3 it is padded to eight bytes."""
    end = data.find(b"\0", at)
    if end < 0:
        raw.corrupt(f"{what} has a datatype with a name that does not end")
    return end + 1 if version > 2 else at + -(-(end + 1 - at) // 8) * 8
