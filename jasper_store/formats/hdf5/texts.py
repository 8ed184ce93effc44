"""Strings of an HDF5 dataset, of fixed or of variable length, read block by block as UTF-8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from jasper_store.formats.files import open_for_reading
from jasper_store.formats.hdf5.heap import check_heaps
from jasper_store.formats.hdf5.library import corrupt, open_dataset, open_file
from jasper_store.formats.hdf5.raw import RawFile
from jasper_store.formats.hdf5.variable import longest_row
from jasper_store.formats.texts import BLOCK_NBYTES, check_utf8, encode_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from jasper_store.formats.texts import Block

__all__ = ["read_texts"]

# Many rows may name one string, so what they take together is counted.
_NBYTES_PER_BYTE = 16
_NBYTES_AT_LEAST = 1 << 18
_ROWS_AT_ONCE = 1 << 16
_ROWS_OF_UNKNOWN_LENGTH = 64


def read_texts(path: Path, name: str, key: str) -> Iterator[Block]:
    """The strings of the one-dimensional dataset at ``key``.

    Args:
        path: the file.
        name: for messages.
        key: path of the dataset in the file.

    Raises:
        CorruptFileError: the file is damaged, or its rows claim more bytes than it explains.
        IntegrityError: a string is no UTF-8.
    """
    with open_for_reading(path) as (raw, size), open_file(path) as (file, _):
        try:
            dataset, header = open_dataset(file, path, key)
        except LookupError as exc:
            corrupt(path, f"the dataset {key!r:.100} is no longer there.", cause=exc)
        if dataset.dtype.kind == "S":
            yield from _fixed(name, dataset)
            return
        check_heaps(path)
        if any(header.fill):
            corrupt(path, f"dataset {key!r:.100} has a fill value of variable length.")
        yield from _variable(name, dataset, RawFile(path, raw, size), size, path)


def _fixed(name: str, dataset: Any) -> Iterator[Block]:
    width = dataset.dtype.itemsize
    step = max(BLOCK_NBYTES // width, 1)
    for first in range(0, dataset.shape[0], step):
        rows = np.ascontiguousarray(dataset[first : first + step])
        yield encode_bytes(name, rows.view(np.uint8).reshape(len(rows), width), first)


def _variable(name: str, dataset: Any, raw: RawFile, size: int, path: Path) -> Iterator[Block]:
    if dataset.chunks is None and dataset.size * 16 > max(size, 1024):
        corrupt(path, f"dataset {name!r:.100} is larger than the file (was it truncated?).")
    longest = longest_row(raw, dataset)
    if longest > size:
        corrupt(path, f"a string of {name!r:.100} claims {longest} bytes, the file has {size} (was it truncated?).")
    step = min(max(BLOCK_NBYTES // longest, 1), _ROWS_AT_ONCE) if longest else _ROWS_OF_UNKNOWN_LENGTH
    left = max(_NBYTES_PER_BYTE * size, _NBYTES_AT_LEAST)
    for first in range(0, dataset.shape[0], step):
        rows = [row if isinstance(row, bytes) else bytes(row) for row in dataset[first : first + step].tolist()]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        left -= int(lengths.sum()) + len(rows)
        if left < 0:
            corrupt(path, f"the strings of {name!r:.100} are more than a file of {size} bytes explains.")
        values = np.frombuffer(b"".join(rows), np.uint8)
        check_utf8(name, values, lengths, first)
        yield values, lengths
