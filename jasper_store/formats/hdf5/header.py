"""Object headers of an HDF5 file, checked before the library opens what they describe.

The library trusts what a file must not decide. A layout may name other files (external storage, virtual datasets), and
the library reads those. A fill value whose length differs from its datatype's makes the library write beyond its
memory. The older indices may lead back to themselves (:mod:`jasper_store.formats.hdf5.tree`), and some datatypes are
called that cannot be (:mod:`jasper_store.formats.hdf5.datatype`). So the messages that say these things are read here
first, from the file's bytes.

Source: HDF5 File Format Specification, sections IV.A.1 "Data Object Headers", and IV.A.2.d, e, f, h, i, m, q and r for
the messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from jasper_store.formats.hdf5.datatype import check_datatype
from jasper_store.formats.hdf5.raw import RawFile
from jasper_store.formats.hdf5.tree import check_chunk_tree, check_group_tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Headers", "ObjectHeader"]

_DATATYPE, _OLD_FILL, _FILL, _EXTERNAL, _LAYOUT, _ATTRIBUTE, _CONTINUATION, _LINKS = 3, 4, 5, 7, 8, 12, 16, 17
_SHARED = 0x02  # in a message's flags: the message itself lies elsewhere
_COMMITTED = 2  # how a shared message says that it is a separate object
_CHUNKED, _VIRTUAL = 2, 3
_VARIABLE = 9  # class of a datatype
# Bytes that are read at first; most headers are shorter.
_BLOCK = 512
_UNDEFINED_SIZE = 0xFFFFFFFF


@dataclass(slots=True)
class ObjectHeader:
    """What is used of an object's header.

    Attributes:
        type_nbytes: bytes of an element, ``None`` for a group.
        fill: bytes of the fill value, ``b""`` for zeros.
    """

    type_nbytes: int | None = None
    fill: bytes = b""


class Headers:
    """Reads the object headers of one file, each once. Not safe for concurrent use.

    Attributes:
        raw: the file.
    """

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        """Read the superblock and check the root group.

        Raises:
            CorruptFileError: as :meth:`read`.
        """
        self.raw = RawFile(path, file, size)
        self._size = size
        self._known: dict[int, ObjectHeader] = {}
        self.read(self.raw.root, "/")

    def read(self, address: int, key: str) -> ObjectHeader:
        """Check the header at an address, as a link gives it, of the object that is called ``key`` in messages.

        Raises:
            CorruptFileError: it leaves the file, the values lie in other files, the fill value does not fit, or an index
                is damaged.
        """
        found = self._known.get(address)
        if found is None:
            found = self._known[address] = ObjectHeader()
            self._parse(found, address, key)
        return found

    def _parse(self, header: ObjectHeader, address: int, key: str) -> None:
        fills: list[bytes] = []
        what = f"the header of {key!r:.100}"
        for kind, flags, data in self._messages(address, key):
            if kind == _DATATYPE:
                header.type_nbytes = self._datatype(data, bool(flags & _SHARED), key)
                continue
            if kind not in {_OLD_FILL, _FILL, _EXTERNAL, _LAYOUT, _ATTRIBUTE, _LINKS}:
                continue
            if flags & _SHARED:
                self.raw.corrupt(f"{what} keeps its messages in a table that others share")
            if kind == _EXTERNAL:
                self.raw.elsewhere(key, "external files")
            if kind == _ATTRIBUTE:
                self._check_attribute(data, key)
            elif kind == _LINKS:
                links = self.raw.offset(data, 0, what), self.raw.offset(data, self.raw.offset_nbytes, what)
                check_group_tree(self.raw, *links, key)
            elif kind == _LAYOUT:
                self._check_layout(data, key)
            elif kind == _FILL:
                fills.insert(0, self._fill(data, key))
            else:
                fills.append(self._sized(data, 0, key))
        # The newer message counts, where both are there.
        header.fill = fills[0] if fills else b""
        if any(fill and header.type_nbytes not in {None, len(fill)} for fill in fills):
            self.raw.corrupt(
                f"the fill value of {key!r:.100} should have {header.type_nbytes} bytes, found {list(map(len, fills))}"
            )

    def _check_layout(self, data: bytes, key: str) -> None:
        what = f"the layout of {key!r:.100}"
        version = self._part(data, 0, 1, key)[0]
        if not 1 <= version <= 5:
            self.raw.corrupt(f"{what} has the unknown version {version}")
        kind = self._part(data, 2 if version < 3 else 1, 1, key)[0]
        if kind == _VIRTUAL:
            self.raw.elsewhere(key, "a virtual dataset, which maps others")
        if kind == _CHUNKED and version < 4:
            dimensions = self._part(data, 1 if version < 3 else 2, 1, key)[0]
            check_chunk_tree(self.raw, self.raw.offset(data, 8 if version < 3 else 3, what), dimensions, key)

    def _datatype(self, data: bytes, shared: bool, key: str) -> int:
        """Check a datatype, or the separate object that it is, and return the bytes of an element."""
        what = f"the header of {key!r:.100}"
        if not shared:
            check_datatype(self.raw, data, 0, what)
            return int.from_bytes(data[4:8], "little")
        version, kind = self._part(data, 0, 2, key)
        address = self.raw.offset(data, 8 if version == 1 else 2, what)
        if not 1 <= version <= 3 or (version == 3 and kind != _COMMITTED) or address is None:
            self.raw.corrupt(f"{what} keeps its datatype in a table that others share")
        # One that is being read already has none for this one yet.
        nbytes = self.read(address, f"datatype of {key}").type_nbytes
        if nbytes is None:
            self.raw.corrupt(f"{what} takes for its datatype what is none")
        return nbytes

    def _check_attribute(self, data: bytes, key: str) -> None:
        what = f"an attribute of {key!r:.100}"
        head = self._part(data, 0, 8, key)
        version, flags = head[:2]
        if not 1 <= version <= 3:
            self.raw.corrupt(f"{what} has the unknown version {version}")
        name_nbytes, type_nbytes = (int.from_bytes(head[i : i + 2], "little") for i in (2, 4))
        # Version 1 pads each part to eight bytes, version 3 has the name's encoding in front.
        at = 8 + -(-name_nbytes // 8) * 8 if version == 1 else 8 + name_nbytes + (version == 3)
        shared = version > 1 and bool(flags & 1)
        datatype = self.raw.part(data, at, type_nbytes, what)
        self._datatype(datatype, shared, key)
        if shared or datatype[0] & 15 != _VARIABLE:
            return
        # Its one value is a length and a place; the library makes room for the length before it looks at the place.
        space_nbytes = int.from_bytes(head[6:8], "little")
        at += -(-type_nbytes // 8) * 8 + -(-space_nbytes // 8) * 8 if version == 1 else type_nbytes + space_nbytes
        width = 8 + self.raw.offset_nbytes
        lengths = [int.from_bytes(data[i : i + 4], "little") for i in range(at, len(data) - width + 1, width)]
        if max(lengths, default=0) > self._size:
            self.raw.corrupt(f"{what} has a text of {max(lengths)} bytes, the file has {self._size}")

    def _fill(self, data: bytes, key: str) -> bytes:
        version = self._part(data, 0, 1, key)[0]
        if version in {1, 2}:
            return self._sized(data, 4, key) if self._part(data, 3, 1, key)[0] else b""
        if version != 3:
            self.raw.corrupt(f"the fill value of {key!r:.100} has the unknown version {version}")
        return self._sized(data, 2, key) if self._part(data, 1, 1, key)[0] & 0x20 else b""

    def _sized(self, data: bytes, at: int, key: str) -> bytes:
        """Bytes behind their own number; a number of -1 means none."""
        n = int.from_bytes(self._part(data, at, 4, key), "little")
        return b"" if n == _UNDEFINED_SIZE else self._part(data, at + 4, n, key)

    def _messages(self, address: int, key: str) -> Iterator[tuple[int, int, bytes]]:
        """Type, flags and bytes of every message of an object header of version 1 or 2."""
        block = self.raw.block(address, _BLOCK)
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
            self.raw.corrupt(f"the header of {key!r:.100} at {address} begins with {block[:5]!r}")
        what = f"the header of {key!r:.100}"
        chunks = [(address + begin, nbytes)]
        seen = set()
        while chunks:
            at, nbytes = chunks.pop()
            if at in seen:
                self.raw.corrupt(f"the header of {key!r:.100} continues in itself")
            seen.add(at)
            offset = at - address
            known = offset >= 0 and offset + nbytes <= len(block)
            body = block[offset : offset + nbytes] if known else self.raw.read(at, nbytes, what)
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
        what = f"the header of {key!r:.100}"
        offset = self.raw.offset(data, 0, what)
        nbytes = self.raw.length(data, self.raw.offset_nbytes, what)
        # In version 2 a signature is in front and a checksum behind.
        if offset is None or (not old and (nbytes < 8 or self.raw.read(offset, 4, what) != b"OCHK")):
            self.raw.corrupt(f"{what} continues where no header does")
        return (offset, nbytes) if old else (offset + 4, nbytes - 8)

    def _part(self, data: bytes, at: int, nbytes: int, key: str) -> bytes:
        return self.raw.part(data, at, nbytes, f"a message in the header of {key!r:.100}")
