"""What the HDF5 library knows about a chunked dataset, read once: its grid, its filters, and where each chunk lies."""

from __future__ import annotations

import math
import os
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jasper_store.errors import CorruptFileError
from jasper_store.formats.base import Chunked, contiguous_strides
from jasper_store.formats.hdf5.library import describe_filters, open_dataset, open_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from jasper_store.formats.base import TensorSpec

    Places = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint8]]

__all__ = ["GZIP", "SHUFFLE", "ChunkIndex", "changed", "identity_of", "read_index"]

GZIP, SHUFFLE, FLETCHER32 = 1, 2, 3
_DIRECT = ((), (GZIP,), (SHUFFLE,), (SHUFFLE, GZIP))
# Rows that h5py reads at once where the layout has no chunks of its own.
_BLOCK_NBYTES = 64 * 1024


@dataclass(frozen=True)
class ChunkIndex:
    """The chunks of one dataset. It holds no handle, so a forked process can go on using it.

    Attributes:
        identity: device, inode, size and time of the file this was read from.
        chunk: elements per chunk; of a layout without chunks, the rows that are read at once.
        grid: number of chunks along each dimension.
        filters: filter codes in the order they were applied.
        fill: bytes of the value of chunks that were never written.
        places: place in C order of the grid, ascending, offset, stored bytes and filter mask of each chunk that was
            written, since a file of a kilobyte may claim a grid of any size. ``None`` where the library does not tell.
        direct: whether the chunks can be read without the library.
    """

    identity: tuple[int, int, int, int]
    chunk: tuple[int, ...]
    grid: tuple[int, ...]
    filters: tuple[int, ...]
    fill: NDArray[np.uint8]
    places: Places | None
    direct: bool


def read_index(spec: TensorSpec) -> ChunkIndex:
    """Ask the library for everything about a dataset, and check it against the file.

    Raises:
        CorruptFileError: a chunk that cannot be, or a dataset that is no longer what the spec says.
    """
    import h5py

    location = spec.location
    assert isinstance(location, Chunked)
    with open_file(spec.path) as (file, size):
        dataset, header = open_dataset(file, spec.path, location.key)
        plist = dataset.id.get_create_plist()
        if (
            tuple(dataset.shape) != spec.shape
            or dataset.dtype.itemsize != spec.dtype.itemsize
            or dataset.chunks != location.chunk_shape
            or describe_filters(plist) != location.filters
            or len(header.fill) not in {0, spec.dtype.itemsize}
        ):
            raise changed(spec)
        chunk = dataset.chunks or (max(1, _BLOCK_NBYTES // max(1, spec.row_nbytes)), *spec.shape[1:])
        grid = tuple(-(-n // c) for n, c in zip(spec.shape, chunk, strict=True))
        filters = tuple(plist.get_filter(i)[0] for i in range(plist.get_nfilters()))
        places, direct = None, False
        if plist.get_layout() == h5py.h5d.CHUNKED and hasattr(dataset.id, "chunk_iter"):
            # Checked even where the library will read them: it trusts what it is told, and crashes if that is wrong.
            where, found = _chunks(dataset, size, grid, filters)
            places = _places(where, found, grid)
            direct = filters in _DIRECT and hasattr(os, "preadv")
        # Not dataset.fillvalue: the library copies a damaged one beyond its memory.
        fill = np.frombuffer(header.fill or bytes(spec.dtype.itemsize), dtype=np.uint8)
        identity = identity_of(os.fstat(file.id.get_vfd_handle()))
        return ChunkIndex(identity, chunk, grid, filters, fill, places, direct)


def _chunks(
    dataset: Any, file_size: int, grid: tuple[int, ...], filters: tuple[int, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places in the grid [n, dimensions] of all chunks, and their offsets, sizes and filter masks [n, 3], checked.

    Raises:
        ValueError: a chunk outside of the grid or the file, or of a size that it cannot have.
    """
    numbers = array("q")
    add = numbers.extend
    stored = 0

    def remember(info: Any) -> bool | None:
        nonlocal stored
        offset, mask, at, size = info
        add(offset)
        add((at, size, mask))
        stored += size
        # An index that leads to one chunk again and again would be walked for ever. True ends the walk, None does not.
        return stored > file_size or None

    # Asking for one chunk's place takes the library time in proportion to their number; all at once is linear.
    dataset.id.chunk_iter(remember)
    if stored > file_size:
        raise ValueError(f"its chunks have over {stored} bytes, the file has {file_size} (truncated?)")
    table = np.frombuffer(numbers, dtype=np.int64).reshape(-1, dataset.ndim + 3)
    where = table[:, : dataset.ndim] // np.array(dataset.chunks)
    found = table[:, dataset.ndim :]
    at, sizes, masks = found.T
    inside = (where >= 0).all(axis=1) & (where < np.array(grid)).all(axis=1)
    inside &= (at > 0) & (sizes > 0) & (at <= file_size - sizes) & (sizes < 2**32)
    if not inside.all():
        at_fault = table[np.flatnonzero(~inside)[0]].tolist()
        raise ValueError(f"the chunk {at_fault} lies outside of the dataset, or the file of {file_size} (truncated?)")
    # Without a filter that compresses, a chunk has all its bytes.
    plain = np.ones(len(masks), dtype=bool)
    expected = np.full(len(masks), math.prod(dataset.chunks) * dataset.dtype.itemsize)
    for i, code in enumerate(filters):
        applied = masks >> i & 1 == 0
        if code == FLETCHER32:
            expected += 4 * applied
        elif code != SHUFFLE:
            plain &= ~applied
    wrong = np.flatnonzero(plain & (sizes != expected))
    if len(wrong):
        raise ValueError(f"a chunk should have {expected[wrong[0]]} bytes, found {sizes[wrong[0]]}")
    return where, found


def _places(where: NDArray[np.int64], found: NDArray[np.int64], grid: tuple[int, ...]) -> Places:
    flat = where @ np.array(contiguous_strides(grid))
    order = np.argsort(flat)
    flat, found = flat[order], found[order]
    if (flat[1:] == flat[:-1]).any():
        raise ValueError("two of its chunks have one place")
    return flat, found[:, 0].copy(), found[:, 1].astype(np.uint32), found[:, 2].astype(np.uint8)


def identity_of(status: os.stat_result) -> tuple[int, int, int, int]:
    """What tells a file from the one that took its name."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def changed(spec: TensorSpec) -> CorruptFileError:
    """The error for a file that was replaced or rewritten since it was located."""
    return CorruptFileError(
        f"{spec.path}: {spec.name!r} is no longer what it was when the file was first opened; open it again.",
        path=spec.path,
        tensor=spec.name,
    )
