"""Where the columns of each block lie: safetensors files whose header names every block of every column.

A block's columns lie one after another, and the blocks one after another::

    header | rows of splits, origins | block 0: narrow columns, wide column, wide column ... | block 1 ... |

Narrow columns of a block share pages; each wide one begins on a page, so that it can be written and read directly. The
gaps between them are tensors of bytes as well, since the format allows no hole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import numpy as np

from jasper_store.formats.safetensors import header_entry

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from jasper_store.packing.columns import Column

_Bytes = TypeVar("_Bytes", int, "NDArray[np.int64]")

__all__ = ["PAGE", "BlockShape", "IndexTensor", "Layout", "block_shape", "lay_out"]

PAGE: Final = 4096
BLOCK_NBYTES: Final = 768 << 10
"""Bytes of a block, at least, where there are so many: a disk reads runs of this length at its full rate."""
MOST_NBYTES: Final = 16 << 20
"""Bytes that a block grows to, so that there are not too many of them."""
MANY_BLOCKS: Final = 16_384
WINDOW_NBYTES: Final = 32 << 20
"""Bytes of the blocks that are mixed with each other."""
WINDOW_BLOCKS: Final = (8, 256)
"""Blocks of a window, at least and at most."""
_FEWEST, _MOST = 16, 1 << 16
_WIDE: Final = 64 << 10
"""A column of at least so many bytes a block is wide."""
_HEADER_NBYTES: Final = 8 << 20
"""Bytes of a file's header, at most: larger datasets are written to several files."""
_ENTRY_NBYTES: Final = 140
_ALIGNMENT: Final = 8


class BlockShape(NamedTuple):
    """Samples per block, and blocks per window."""

    block: int
    window: int


def block_shape(samples: int, sample_nbytes: int) -> BlockShape:
    """How many samples make a block, and how many blocks are mixed: a pure function of the data's size.

    Args:
        samples: of all splits.
        sample_nbytes: of an average one.
    """
    sample_nbytes = max(sample_nbytes, 1)
    block = _FEWEST
    while block < _MOST and block * sample_nbytes < BLOCK_NBYTES:
        block *= 2
    while block < _MOST and block * sample_nbytes < MOST_NBYTES and samples > block * MANY_BLOCKS:
        block *= 2
    low, high = WINDOW_BLOCKS
    wanted = max(low, min(high, WINDOW_NBYTES // (block * sample_nbytes)))
    # A power of two, so that the blocks of a window are shared evenly by as many ranks.
    return BlockShape(block, 1 << (wanted.bit_length() - 1))


class IndexTensor(NamedTuple):
    """A tensor that is not in blocks."""

    name: str
    dtype: torch.dtype
    rows: int

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.rows * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Layout:
    """Where everything lies.

    Attributes:
        columns: the columns.
        counts: rows of each column in each block, int64 [columns, blocks].
        file_of: number of the file of each block, int64 [blocks].
        offsets: of each column in each block, from the start of its file, int64 [columns, blocks].
        groups: columns that are written together: numbers of adjacent ones.
        begins: of each group in each block, a multiple of a page, int64 [groups, blocks].
        nbytes: of each group in each block, with the gap after it, a multiple of a page, int64 [groups, blocks].
        index: the tensors that are not in blocks, and the offset of each in the first file.
        headers: of each file, a multiple of a page.
        sizes: bytes of each file.
    """

    columns: tuple[Column, ...]
    counts: NDArray[np.int64]
    file_of: NDArray[np.int64]
    offsets: NDArray[np.int64]
    groups: tuple[tuple[int, ...], ...]
    begins: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    index: tuple[tuple[IndexTensor, int], ...]
    headers: tuple[bytes, ...]
    sizes: tuple[int, ...]

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return len(self.file_of)


def lay_out(columns: Sequence[Column], counts: NDArray[np.int64], index: Sequence[IndexTensor]) -> Layout:
    """Lay out blocks.

    Args:
        columns: what a block holds.
        counts: rows of each column in each block, int64 [columns, blocks].
        index: what is written before the blocks.
    """
    order, groups = _grouped(columns, counts)
    columns, counts = [columns[number] for number in order], counts[order]
    relative, begins, nbytes = _within(columns, counts, groups)
    block_nbytes = nbytes.sum(axis=0, dtype=np.int64)
    per_block = sum(_ENTRY_NBYTES + 2 * len(column.name) for column in columns) + len(groups) * _ENTRY_NBYTES
    file_of = np.arange(counts.shape[1], dtype=np.int64) // max(1, _HEADER_NBYTES // per_block)
    places, index_nbytes = [], 0
    for tensor in index:
        places.append((tensor, index_nbytes))
        index_nbytes += _up(tensor.nbytes, PAGE)
    offsets, headers, sizes = relative.copy(), [], []
    starts = begins.copy()
    for file in range(int(file_of[-1]) + 1 if len(file_of) else 1):
        inside = np.flatnonzero(file_of == file)
        first = 0 if file else index_nbytes
        base = first + np.cumsum(block_nbytes[inside]) - block_nbytes[inside]
        offsets[:, inside] += base
        starts[:, inside] += base
        data = first + int(block_nbytes[inside].sum())
        header = _header(columns, counts, offsets, inside, [] if file else places, data)
        offsets[:, inside] += len(header)
        starts[:, inside] += len(header)
        if not file:
            places = [(tensor, offset + len(header)) for tensor, offset in places]
        headers.append(header)
        sizes.append(len(header) + data)
    return Layout(
        *(tuple(columns), counts, file_of, offsets, groups, starts, nbytes),
        *(tuple(places), tuple(headers), tuple(sizes)),
    )


def _grouped(columns: Sequence[Column], counts: NDArray[np.int64]) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
    """Order of the columns in a block, and which of them are written together.

    The tensors of a choice come last, so that those of variants that are not drawn need not be read.
    """
    most = counts.max(axis=1, initial=0)
    wide = [int(most[number]) * column.row_nbytes >= _WIDE for number, column in enumerate(columns)]
    narrow = [number for number in range(len(columns)) if not wide[number]]
    rest = sorted((number for number in range(len(columns)) if wide[number]), key=lambda n: columns[n].variant > 0)
    groups = [tuple(range(len(narrow)))] if narrow else []
    groups += [(len(narrow) + number,) for number in range(len(rest))]
    return [*narrow, *rest], tuple(groups)


def _within(
    columns: Sequence[Column], counts: NDArray[np.int64], groups: Sequence[Sequence[int]]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Offsets of columns and groups from the start of their block, and bytes of each group with its gap."""
    blocks = counts.shape[1]
    relative = np.zeros((len(columns), blocks), np.int64)
    begins, nbytes = np.zeros((len(groups), blocks), np.int64), np.zeros((len(groups), blocks), np.int64)
    end = np.zeros(blocks, np.int64)
    for number, group in enumerate(groups):
        begins[number] = end
        for column in group:
            relative[column] = end
            end = _up(end + counts[column] * columns[column].row_nbytes, _ALIGNMENT)
        end = _up(end, PAGE)
        nbytes[number] = end - begins[number]
    return relative, begins, nbytes


def _header(
    columns: Sequence[Column],
    counts: NDArray[np.int64],
    offsets: NDArray[np.int64],
    inside: NDArray[np.int64],
    index: Sequence[tuple[IndexTensor, int]],
    data_nbytes: int,
) -> bytes:
    """The header of a file; offsets are from the start of its data."""
    found: list[tuple[int, int, str, torch.dtype, tuple[int, ...]]] = [
        (offset, tensor.nbytes, tensor.name, tensor.dtype, (tensor.rows,)) for tensor, offset in index
    ]
    for block in inside.tolist():
        for number, column in enumerate(columns):
            rows = int(counts[number, block])
            shape, nbytes = (rows, *column.row_shape), rows * column.row_nbytes
            found.append((int(offsets[number, block]), nbytes, f"{column.name}.{block:06d}", column.dtype, shape))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    # An empty tensor stands where it begins, before one that begins there and is not empty.
    for offset, nbytes, name, dtype, shape in [
        *sorted(found, key=lambda each: each[:2]),
        (data_nbytes, 0, "", None, ()),
    ]:
        if offset > end:
            entries[f".gap.{len(entries):06d}"] = {
                "dtype": "U8",
                "shape": [offset - end],
                "data_offsets": [end, offset],
            }
        if dtype is not None:
            entries[name] = header_entry(dtype, shape, offset, offset + nbytes)
        end = offset + nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = _up(len(text) + 8, PAGE) - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def _up(value: _Bytes, multiple: int) -> _Bytes:
    return -(-value // multiple) * multiple
