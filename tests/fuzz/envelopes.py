"""Wraps a mutated payload so that it gets past lengths and checksums, to what reads it."""

from __future__ import annotations

import re
import struct
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["deflated", "hdf5_object", "npy_header", "pt_records", "raw_deflate", "safetensors_header", "sound_zip"]

RECORD = bytes(range(96))
"""What each storage of a ``.pt`` seed holds."""
_RECORDS = [(f"x/data/{i}".encode(), RECORD) for i in range(4)]
_END_OF_TENSOR = re.compile(rb"data_offsets[^]]{0,40}?(\d{1,5})\s*\]")
_MAX_DATA = 1 << 14


def raw_deflate(data: bytes, level: int) -> bytes:
    """A deflate stream without zlib's header and checksum."""
    encoder = zlib.compressobj(level, wbits=-15)
    return encoder.compress(data) + encoder.flush()


def sound_zip(records: Iterable[tuple[bytes, bytes]], *, deflate: bool = False) -> bytes:
    """A zip archive of these names and contents, all lengths and checksums as they should be."""
    out, directory, count = bytearray(), bytearray(), 0
    for name, data in records:
        stored = raw_deflate(data, 1) if deflate else data
        sizes = (zlib.crc32(data), len(stored), len(data), len(name), 0)
        head = struct.pack("<5H3L2H", 20, 0, 8 if deflate else 0, 0, 33, *sizes)
        directory += b"PK\1\2\x14\0" + head + struct.pack("<3HLL", 0, 0, 0, 0, len(out)) + name
        out += b"PK\3\4" + head + name + stored
        count += 1
    end = struct.pack("<4HLLH", 0, 0, count, count, len(directory), len(out), 0)
    return bytes(out + directory + b"PK\5\6" + end)


def pt_records(stream: bytes) -> bytes:
    """A ``.pt`` file with this pickle and four storages of 96 bytes."""
    return sound_zip([(b"x/data.pkl", stream), (b"x/byteorder", b"little"), *_RECORDS])


def safetensors_header(text: bytes) -> bytes:
    """A safetensors file with this header, and as many bytes of data as it speaks of."""
    ends = [int(end) for end in _END_OF_TENSOR.findall(text)]
    return len(text).to_bytes(8, "little") + text + bytes(min(max(ends, default=0), _MAX_DATA))


def npy_header(text: bytes) -> bytes:
    """A ``.npy`` file with this header and 96 bytes of data."""
    return b"\x93NUMPY\x01\0" + (len(text) % 65536).to_bytes(2, "little") + text + RECORD


def deflated(raw: bytes, most: int) -> tuple[bytes, int]:
    """A zlib stream with this deflate stream and, if it inflates, the right checksum; and how many bytes it has then."""
    try:
        data = zlib.decompressobj(-15).decompress(raw, most)
    except zlib.error:
        data = b""
    return b"\x78\x01" + raw + zlib.adler32(data).to_bytes(4, "big"), len(data)


def hdf5_object(payload: bytes, old: bytes, new: bytes) -> bytes:
    """An HDF5 file whose root is the object that two bytes name, by its place; the superblock is that of a sound file."""
    selector = int.from_bytes(payload[:2], "little")
    sound = new if selector & 0x8000 else old
    superblock = bytearray(sound[:96] if sound is old else sound[:48])
    place = 64 if sound is old else 36
    superblock[place : place + 8] = (selector & 0x7FFF).to_bytes(8, "little")
    return bytes(superblock) + payload[2:]


# ---- checksums of HDF5's metadata

_MASK = 0xFFFFFFFF


def lookup3(data: bytes) -> int:
    """HDF5's checksum of metadata: Bob Jenkins' hashlittle with an initial value of 0."""
    a = b = c = (0xDEADBEEF + len(data)) & _MASK
    whole = max(0, (len(data) - 1) // 12 * 12)
    for at in range(0, whole, 12):
        x, y, z = struct.unpack_from("<III", data, at)
        a, b, c = (a + x) & _MASK, (b + y) & _MASK, (c + z) & _MASK
        a, c = ((a - c) & _MASK) ^ _rotated(c, 4), (c + b) & _MASK
        b, a = ((b - a) & _MASK) ^ _rotated(a, 6), (a + c) & _MASK
        c, b = ((c - b) & _MASK) ^ _rotated(b, 8), (b + a) & _MASK
        a, c = ((a - c) & _MASK) ^ _rotated(c, 16), (c + b) & _MASK
        b, a = ((b - a) & _MASK) ^ _rotated(a, 19), (a + c) & _MASK
        c, b = ((c - b) & _MASK) ^ _rotated(b, 4), (b + a) & _MASK
    if data:
        x, y, z = struct.unpack("<III", data[whole:].ljust(12, b"\0"))
        a, b, c = (a + x) & _MASK, (b + y) & _MASK, (c + z) & _MASK
        c = ((c ^ b) - _rotated(b, 14)) & _MASK
        a = ((a ^ c) - _rotated(c, 11)) & _MASK
        b = ((b ^ a) - _rotated(a, 25)) & _MASK
        c = ((c ^ b) - _rotated(b, 16)) & _MASK
        a = ((a ^ c) - _rotated(c, 4)) & _MASK
        b = ((b ^ a) - _rotated(a, 14)) & _MASK
        c = ((c ^ b) - _rotated(b, 24)) & _MASK
    return c


def _rotated(x: int, k: int) -> int:
    return (x << k | x >> (32 - k)) & _MASK


def sound_headers(data: bytes) -> bytes:
    """An HDF5 file whose object headers of version 2 have the right checksums again."""
    out = bytearray(data)
    at = data.find(b"OHDR\x02")
    while 0 <= at < len(data) - 24:
        flags = data[at + 5]
        begin = at + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        end = begin + width + int.from_bytes(data[begin : begin + width], "little")
        if end + 4 <= len(data) and end - at < 2048:
            out[end : end + 4] = lookup3(bytes(out[at:end])).to_bytes(4, "little")
        at = data.find(b"OHDR\x02", at + 1)
    return bytes(out)
