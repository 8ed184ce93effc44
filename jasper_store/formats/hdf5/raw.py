"""Bytes of an HDF5 file for the checks that come before the library: addresses, numbers, and one budget for all.

Source: HDF5 File Format Specification, section II "Superblock".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, NoReturn

from jasper_store.errors import CorruptFileError
from jasper_store.formats.files import read_at

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["RawFile"]

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# What is checked may be reached by several ways. Together it still is a part of the file.
_TIMES = 4


class RawFile:
    """Reads parts of one file and gives up where they come to more than the file explains. Not for concurrent use.

    Attributes:
        offset_nbytes: bytes of an address.
        length_nbytes: bytes of a length.
        root: address of the root group's header.
    """

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        """Read the superblock.

        Raises:
            CorruptFileError: there is none.
        """
        self._path = path
        self._file = file
        self._size = size
        self._budget = _TIMES * size + (1 << 16)
        self._base = self._find_superblock()
        start = self.read(0, 24, "the superblock")
        version = start[8]
        self.offset_nbytes, self.length_nbytes = (start[13], start[14]) if version < 2 else (start[9], start[10])
        if version > 3 or not {self.offset_nbytes, self.length_nbytes} <= {2, 4, 8}:
            self.corrupt(
                f"the superblock has version {version}, offsets of {self.offset_nbytes} and lengths of "
                f"{self.length_nbytes} bytes"
            )
        # Versions 0 and 1: four addresses and the name's offset are in front; version 2 and 3: three addresses.
        at = {0: 24 + 5 * self.offset_nbytes, 1: 28 + 5 * self.offset_nbytes}.get(version, 12 + 3 * self.offset_nbytes)
        self.root = int.from_bytes(self.read(at, self.offset_nbytes, "the superblock"), "little")

    def read(self, address: int, nbytes: int, what: str) -> bytes:
        """Exactly so many bytes from an address; ``what`` names them in messages.

        Raises:
            CorruptFileError: the file ends before, or too much was read of it already.
        """
        return self.read_absolute(self._base + address, nbytes, what)

    def read_absolute(self, at: int, nbytes: int, what: str) -> bytes:
        """As :meth:`read`, from the beginning of the file, also of one with a user block."""
        self._budget -= nbytes
        if at + nbytes > self._size or self._budget < 0:
            self.corrupt(
                f"{nbytes} bytes at byte {at} of {what} do not fit the file of {self._size} (was it truncated?)"
            )
        data = read_at(self._file, at, nbytes)
        if len(data) != nbytes:
            self.corrupt(f"it ends at byte {at + len(data)}, in the middle of {what} (was it truncated?)")
        return data

    def block(self, address: int, nbytes: int) -> bytes:
        """Up to so many bytes from an address."""
        at = self._base + address
        return read_at(self._file, at, nbytes) if at < self._size else b""

    def offset(self, data: bytes, at: int, what: str) -> int | None:
        """An address, ``None`` for the undefined one."""
        raw = self.part(data, at, self.offset_nbytes, what)
        return None if raw == b"\xff" * self.offset_nbytes else int.from_bytes(raw, "little")

    def length(self, data: bytes, at: int, what: str) -> int:
        """A length, or an offset within something."""
        return int.from_bytes(self.part(data, at, self.length_nbytes, what), "little")

    def part(self, data: bytes, at: int, nbytes: int, what: str) -> bytes:
        """Bytes that must be within ``data``."""
        if at + nbytes > len(data):
            self.corrupt(f"{what} needs {at + nbytes} bytes, found {len(data)}")
        return data[at : at + nbytes]

    def elsewhere(self, key: str, what: str) -> NoReturn:
        """Raise CorruptFileError about values that are not in the file."""
        raise CorruptFileError(
            f"{self._path}: the values of {key!r:.100} lie in {what}; only values inside of the file are read. Copy them "
            "into one file.",
            path=self._path,
            tensor=key,
        )

    def corrupt(self, what: str) -> NoReturn:
        """Raise CorruptFileError about the file."""
        raise CorruptFileError(
            f"{self._path}: not an HDF5 file that can be read: {what}. Write or convert it again.", path=self._path
        )

    def _find_superblock(self) -> int:
        at = 0
        while read_at(self._file, at, len(_SIGNATURE)) != _SIGNATURE:
            at = max(512, 2 * at)
            if at >= self._size:
                self.corrupt("it has no superblock (was it truncated?)")
        return at
