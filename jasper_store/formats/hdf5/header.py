"""Object headers of an HDF5 file, checked before the library opens what they describe.

The library trusts two things that a file must not decide. A layout may name other files (external storage, virtual
datasets), and the library reads those. And a fill value whose length differs from its datatype's makes the library
write beyond its memory. So the messages that say these things are read here first, from the file's bytes.

Source: HDF5 File Format Specification, sections II "Superblock", IV.A.1 "Data Object Headers", and IV.A.2.d, e, f, h, i
and q for the messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from jasper_store.errors import CorruptFileError
from jasper_store.formats.files import read_at

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Headers", "ObjectHeader"]

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_DATATYPE, _OLD_FILL, _FILL, _EXTERNAL, _LAYOUT, _CONTINUATION = 0x03, 0x04, 0x05, 0x07, 0x08, 0x10
_SHARED = 0x02  # in a message's flags: the message itself lies elsewhere
_VIRTUAL = 3
# Bytes that are read at first; most headers are shorter.
_BLOCK = 512
_UNDEFINED_SIZE = 0xFFFFFFFF
# Headers may be read again through other links. Together they still are a part of the file.
_TIMES = 4


@dataclass(slots=True)
class ObjectHeader:
    """What is used of an object's header.

    Attributes:
        type_nbytes: bytes of an element, ``None`` for a group or where the datatype is an object of its own.
        fill: bytes of the fill value, ``b""`` for zeros.
    """

    type_nbytes: int | None = None
    fill: bytes = b""


class Headers:
    """Reads the object headers of one file, each once. Not safe for concurrent use."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        """Read the superblock.

        Raises:
            CorruptFileError: there is none.
        """
        self._path = path
        self._file = file
        self._size = size
        self._budget = _TIMES * size + (1 << 16)
        self._known: dict[int, ObjectHeader] = {}
        self._base = self._find_superblock()
        start = self._read(self._base, 24)
        version = start[8]
        self._offset_nbytes, self._length_nbytes = (start[13], start[14]) if version < 2 else (start[9], start[10])
        if version > 3 or not {self._offset_nbytes, self._length_nbytes} <= {2, 4, 8}:
            self._corrupt(
                f"the superblock has version {version}, offsets of {self._offset_nbytes} and lengths of "
                f"{self._length_nbytes} bytes"
            )

    def read(self, address: int, key: str) -> ObjectHeader:
        """Check the header at an address, as a link gives it, of the object that is called ``key`` in messages.

        Raises:
            CorruptFileError: it leaves the file, the values lie in other files, or the fill value does not fit.
        """
        found = self._known.get(address)
        if found is None:
            found = self._known[address] = self._parse(address, key)
        return found

    def _parse(self, address: int, key: str) -> ObjectHeader:
        header = ObjectHeader()
        fills: list[bytes] = []
        for kind, flags, data in self._messages(address, key):
            if kind == _DATATYPE:
                header.type_nbytes = None if flags & _SHARED else int.from_bytes(self._part(data, 4, 4, key), "little")
                continue
            if kind not in {_OLD_FILL, _FILL, _EXTERNAL, _LAYOUT}:
                continue
            if flags & _SHARED:
                self._corrupt(
                    f"the header of {key!r:.100} keeps its layout or fill value in a table of shared messages"
                )
            if kind == _EXTERNAL:
                self._elsewhere(key, "external files")
            if kind == _LAYOUT:
                self._check_layout(data, key)
            elif kind == _FILL:
                fills.insert(0, self._fill(data, key))
            else:
                fills.append(self._sized(data, 0, key))
        # The newer message counts, where both are there.
        header.fill = fills[0] if fills else b""
        if any(fill and header.type_nbytes not in {None, len(fill)} for fill in fills):
            self._corrupt(
                f"the fill value of {key!r:.100} should have {header.type_nbytes} bytes, found {list(map(len, fills))}"
            )
        return header

    def _check_layout(self, data: bytes, key: str) -> None:
        version = self._part(data, 0, 1, key)[0]
        if not 1 <= version <= 5:
            self._corrupt(f"the layout of {key!r:.100} has the unknown version {version}")
        if self._part(data, 2 if version < 3 else 1, 1, key)[0] == _VIRTUAL:
            self._elsewhere(key, "a virtual dataset, which maps others")

    def _elsewhere(self, key: str, what: str) -> NoReturn:
        raise CorruptFileError(
            f"{self._path}: the values of {key!r:.100} lie in {what}; only values inside of the file are read. Copy them "
            "into one file.",
            path=self._path,
            tensor=key,
        )

    def _fill(self, data: bytes, key: str) -> bytes:
        version = self._part(data, 0, 1, key)[0]
        if version in {1, 2}:
            return self._sized(data, 4, key) if self._part(data, 3, 1, key)[0] else b""
        if version != 3:
            self._corrupt(f"the fill value of {key!r:.100} has the unknown version {version}")
        return self._sized(data, 2, key) if self._part(data, 1, 1, key)[0] & 0x20 else b""

    def _sized(self, data: bytes, at: int, key: str) -> bytes:
        """Bytes behind their own number; a number of -1 means none."""
        n = int.from_bytes(self._part(data, at, 4, key), "little")
        return b"" if n == _UNDEFINED_SIZE else self._part(data, at + 4, n, key)

    def _messages(self, address: int, key: str) -> Iterator[tuple[int, int, bytes]]:
        """Type, flags and bytes of every message of an object header of version 1 or 2."""
        start = self._base + address
        block = read_at(self._file, start, _BLOCK) if start < self._size else b""
        old = block[:1] == b"\x01"
        if old:
            begin, nbytes = 16, int.from_bytes(self._part(block, 8, 4, key), "little")
            head = 8
        elif block[:5] == b"OHDR\x02":
            flags = self._part(block, 5, 1, key)[0]
            begin = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
            width = 1 << (flags & 3)
            nbytes = int.from_bytes(self._part(block, begin, width, key), "little")
            begin += width
            head = 6 if flags & 0x04 else 4
        else:
            self._corrupt(f"the header of {key!r:.100} at byte {start} begins with {block[:5]!r}")
        chunks = [(start + begin, nbytes)]
        seen = set()
        while chunks:
            at, nbytes = chunks.pop()
            if at in seen:
                self._corrupt(f"the header of {key!r:.100} continues in itself")
            seen.add(at)
            offset = at - start
            known = offset >= 0 and offset + nbytes <= len(block)
            body = block[offset : offset + nbytes] if known else self._read(at, nbytes)
            for kind, flags, data in self._split(body, old, head, key):
                yield kind, flags, data
                if kind == _CONTINUATION:
                    chunks.append(self._continuation(data, old, key))

    def _split(self, body: bytes, old: bool, head: int, key: str) -> Iterator[tuple[int, int, bytes]]:
        at = 0
        # A rest too small for a message's own head is a gap.
        while at + head <= len(body):
            if old:
                kind, nbytes, flags = body[at] | body[at + 1] << 8, body[at + 2] | body[at + 3] << 8, body[at + 4]
            else:
                kind, nbytes, flags = body[at], body[at + 1] | body[at + 2] << 8, body[at + 3]
            yield kind, flags, self._part(body, at + head, nbytes, key)
            at += head + nbytes

    def _continuation(self, data: bytes, old: bool, key: str) -> tuple[int, int]:
        """Where a continuation's messages lie, and their bytes."""
        offset = int.from_bytes(self._part(data, 0, self._offset_nbytes, key), "little")
        nbytes = int.from_bytes(self._part(data, self._offset_nbytes, self._length_nbytes, key), "little")
        # In version 2 a signature is in front and a checksum behind.
        if not old and (nbytes < 8 or self._read(self._base + offset, 4) != b"OCHK"):
            self._corrupt(f"the header of {key!r:.100} continues where no header does")
        return (self._base + offset, nbytes) if old else (self._base + offset + 4, nbytes - 8)

    def _find_superblock(self) -> int:
        at = 0
        while read_at(self._file, at, len(_SIGNATURE)) != _SIGNATURE:
            at = max(512, 2 * at)
            if at >= self._size:
                self._corrupt("it has no superblock (was it truncated?)")
        return at

    def _read(self, at: int, nbytes: int) -> bytes:
        self._budget -= nbytes
        if at + nbytes > self._size or self._budget < 0:
            self._corrupt(f"a header of {nbytes} bytes at byte {at} does not fit the file of {self._size}")
        data = read_at(self._file, at, nbytes)
        if len(data) != nbytes:
            self._corrupt(f"it ends at byte {at + len(data)}, in the middle of a header (was it truncated?)")
        return data

    def _part(self, data: bytes, at: int, nbytes: int, key: str) -> bytes:
        if at + nbytes > len(data):
            self._corrupt(f"a message in the header of {key!r:.100} needs {at + nbytes} bytes, found {len(data)}")
        return data[at : at + nbytes]

    def _corrupt(self, what: str) -> NoReturn:
        raise CorruptFileError(
            f"{self._path}: not an HDF5 file that can be read: {what}. Write or convert it again.", path=self._path
        )
