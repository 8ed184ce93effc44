"""A check of how long the rows of variable length claim to be, before the library makes room for them.

A row is a length and the place of its values in a global heap. The library (2.0 and before) takes memory for the length,
and looks only then whether the heap has as much.

Source: HDF5 File Format Specification, sections III.E "Global Heap" and VIII.A, "Variable-length" in the data's layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from jasper_store.formats.hdf5.raw import RawFile

__all__ = ["longest_row"]

_GZIP, _SHUFFLE = 1, 2


def longest_row(raw: RawFile, dataset: Any) -> int:
    """Values that the longest row of a dataset claims to have, 0 where that is not known.

    Not known are rows that other filters than shuffle and gzip were applied to, and those of a compact dataset.

    Raises:
        CorruptFileError: rows lie outside of the file.
        InflateError: a chunk is damaged.
    """
    return max((int(lengths.max()) for lengths in _lengths(raw, dataset) if lengths.size), default=0)


def _lengths(raw: RawFile, dataset: Any) -> Iterator[NDArray[np.uint32]]:
    what, width = f"the rows of {dataset.name!r:.100}", 8 + raw.offset_nbytes
    plist = dataset.id.get_create_plist()
    if dataset.chunks is None:
        at = dataset.id.get_offset()
        if at is not None:
            yield _of_rows(raw.read_absolute(at, dataset.size * width, what), width)
        return
    filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    if filters not in ([], [_GZIP], [_SHUFFLE], [_SHUFFLE, _GZIP]) or not hasattr(dataset.id, "chunk_iter"):
        return
    found: list[tuple[int, int, int]] = []

    def remember(info: Any) -> None:
        found.append((info.byte_offset, info.size, info.filter_mask))

    dataset.id.chunk_iter(remember)
    nbytes = dataset.chunks[0] * width
    for at, size, mask in found:
        data = raw.read_absolute(at, size, what)
        applied = [code for i, code in enumerate(filters) if not mask >> i & 1]
        if _GZIP in applied:
            from jasper_store.formats.hdf5.deflate import inflate

            data = inflate(data, nbytes)
        if len(data) != nbytes:
            raw.corrupt(f"{what} should have {nbytes} bytes a chunk, found {len(data)}")
        # Shuffled, the first bytes of all rows come first, then the second ones.
        yield _of_rows(
            np.frombuffer(data, np.uint8).reshape(width, -1).T.tobytes() if _SHUFFLE in applied else data, width
        )


def _of_rows(data: bytes, width: int) -> NDArray[np.uint32]:
    rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, width)
    return np.ascontiguousarray(rows[:, :4]).view("<u4")[:, 0]
