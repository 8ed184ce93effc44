"""The gzip filter of HDF5, made and undone faster than the library does, byte plane by byte plane.

HDF5's shuffle filter puts the first bytes of all elements first, then all second bytes, and so on. In
embeddings the planes differ wholly: the mantissa's bytes are noise, which no compressor shrinks, and the bytes
of sign and exponent are few values without order, where a Huffman code alone beats matching. So each plane gets
the cheapest of three encodings that are all plain deflate: stored blocks, ISA-L's matching, or zlib's Huffman
code. On MiniLM embeddings the stream is 3 % smaller than zlib's at level 4 of the same shuffled bytes, is made
several times faster, and inflates at over 2 GB/s a core, since three quarters of it are only copied.

Every stream is an ordinary zlib stream (RFC 1950 and 1951) that any HDF5 reads.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np
from isal import isal_zlib

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["InflateError", "compress", "inflate", "shuffle"]

# zlib header: deflate, 32 KiB window, fastest; then at the end an empty final stored block and the checksum.
_HEADER = b"\x78\x01"
_FINAL_BLOCK = b"\x01\x00\x00\xff\xff"
_STORED_MAX = 65535
# Under one part in a hundred is not worth inflating again on every read.
_WORTH_IT = 0.99
# Where order is this much less than frequency, looking harder for order is in vain.
_CLEARLY_BETTER = 0.9


# The package's type stubs say that this is an instance.
_IsalError: type[Exception] = isal_zlib.IsalError  # type: ignore[assignment]


class InflateError(ValueError):
    """A stream that is damaged, or is not as long as it should be."""


def shuffle(values: NDArray[np.uint8], itemsize: int) -> NDArray[np.uint8]:
    """Byte planes [itemsize, n] of ``n`` elements given as their bytes; the shuffle filter of HDF5."""
    return np.ascontiguousarray(values.reshape(-1, itemsize).T)


def compress(planes: NDArray[np.uint8]) -> bytes:
    """A zlib stream of the planes, one after another. Releases the interpreter lock while it works."""
    parts: list[bytes | memoryview] = [_HEADER]
    for plane in planes:
        parts.extend(_encode(plane.data))
    parts.append(_FINAL_BLOCK)
    parts.append(isal_zlib.adler32(planes.data).to_bytes(4, "big"))
    return b"".join(parts)


def _encode(plane: memoryview) -> list[bytes | memoryview]:
    """One plane as deflate blocks that end on a byte."""
    best = _match(plane, level=1)
    if len(best) >= _WORTH_IT * len(plane):
        return _store(plane)
    # A Huffman code takes at least one bit a byte, so it cannot beat a match that took much less.
    if len(best) > len(plane) // 8:
        coder = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        coded = coder.compress(plane) + coder.flush(zlib.Z_SYNC_FLUSH)
        if len(coded) < _CLEARLY_BETTER * len(best):
            return [coded]
        best = min(best, coded, key=len)
    # Level 3 finds repeats of rows that the fastest level misses, at half its speed.
    return [min(best, _match(plane, level=3), key=len)]


def _match(plane: memoryview, level: int) -> bytes:
    matcher = isal_zlib.compressobj(level, isal_zlib.DEFLATED, -15)
    matched: bytes = matcher.compress(plane) + matcher.flush(isal_zlib.Z_SYNC_FLUSH)
    return matched


def _store(plane: memoryview) -> list[bytes | memoryview]:
    parts: list[bytes | memoryview] = []
    for start in range(0, len(plane), _STORED_MAX):
        part = plane[start : start + _STORED_MAX]
        n = len(part)
        parts += [b"\x00" + n.to_bytes(2, "little") + (n ^ 0xFFFF).to_bytes(2, "little"), part]
    return parts


def inflate(stream: bytes | memoryview, nbytes: int) -> bytes:
    """Exactly ``nbytes`` bytes from a zlib stream, its checksum verified. Releases the interpreter lock.

    Raises:
        InflateError: damaged, truncated, or of another length; memory stays bounded by ``nbytes``.
    """
    decoder = isal_zlib.decompressobj()
    try:
        # One byte more than expected shows a stream that is too long without inflating all of it.
        data: bytes = decoder.decompress(stream, nbytes + 1)
    except (_IsalError, zlib.error, ValueError) as exc:
        raise InflateError(f"it does not inflate: {exc!s:.100}") from exc
    if len(data) != nbytes or not decoder.eof:
        raise InflateError(f"it should inflate to {nbytes} bytes, found {len(data)}{'' if decoder.eof else ' or more'}")
    return data
