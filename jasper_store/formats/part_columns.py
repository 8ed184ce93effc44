"""What a manifest says of parts, in columns: values, and how they are checked when they are read from JSON."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jasper_store.formats.files import check_shape, shown

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["PartFiles", "PartedTensor", "WholeTensor", "parse_files", "parse_parts", "parse_whole", "safe_name"]

_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, eq=False)
class PartFiles:
    """Columns about files; row i is file i.

    Attributes:
        names: relative to the dataset's directory, with forward slashes.
        sizes: bytes, int64 [files].
        mtimes: modification times in nanoseconds, int64 [files].
        samples: hash of a sample of the content in hex, or ``None``.
    """

    names: tuple[str, ...] = ()
    sizes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    mtimes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    samples: tuple[str | None, ...] = ()


@dataclass(frozen=True, eq=False)
class PartedTensor:
    """Columns about the parts of one tensor, in the order of their rows; part i is row i.

    Attributes:
        dtype: torch dtype of all parts.
        row_shape: shape of one row.
        file_of: number of the file, int64 [parts].
        offsets: byte offset of the first row in that file, int64 [parts].
        rows: number of rows, int64 [parts].
        since: generation that the part appeared in, int64 [parts]; 0 for the files of a dataset before it grew.
        until: generation that no longer has it; 0 while the newest one has it, int64 [parts].
        checksums: xxh3-128 of the part's values in hex, or ``None``.
    """

    dtype: torch.dtype
    row_shape: tuple[int, ...]
    file_of: NDArray[np.int64]
    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]
    since: NDArray[np.int64]
    until: NDArray[np.int64]
    checksums: tuple[str | None, ...]

    def visible(self, number: int) -> NDArray[np.int64]:
        """Positions of the parts that a generation has, in order."""
        return np.flatnonzero((self.since <= number) & ((self.until == 0) | (self.until > number)))

    def n_rows(self, number: int) -> int:
        """Rows that the tensor has in a generation."""
        return int(self.rows[self.visible(number)].sum())


@dataclass(frozen=True)
class WholeTensor:
    """A tensor that lies in one file and cannot grow; the file's header says where (a scalar, compressed, a list).

    Attributes:
        file: number of its file.
        dtype: torch dtype.
        shape: sizes.
        checksum: xxh3-128 of its values in hex, or ``None``.
    """

    file: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    checksum: str | None


# ---- from JSON


def safe_name(name: object) -> str:
    """A relative file name that stays inside its directory.

    Raises:
        ValueError: it does not.
    """
    if type(name) is not str or not name or name[0] == "/" or "\0" in name:
        raise ValueError(f"file name {name!r:.60} leaves the dataset's directory")
    if not name.isascii():
        os.fsencode(name)  # UnicodeEncodeError, a ValueError, of what no file can be called
    if not all(name.split("/")) or (".." in name and ".." in name.split("/")) or name in {".", ".."}:
        raise ValueError(f"file name {name!r:.60} leaves the dataset's directory")
    return name


def parse_files(raw: Any) -> PartFiles:
    """Columns about files, checked; a name that leaves the dataset's directory, or is there twice, is a ``ValueError``."""
    names = tuple(safe_name(name) for name in raw["names"])
    if len(set(names)) != len(names):
        raise ValueError("a file is named twice")
    sizes, mtimes = _ints(raw["sizes"], len(names), low=0), _ints(raw["mtimes_ns"], len(names))
    return PartFiles(names, sizes, mtimes, _hexes(raw["samples"], len(names)))


def parse_parts(name: str, raw: Any, files: PartFiles, number: int, path: Path) -> PartedTensor:
    """Columns about the parts of a tensor, checked against the files and the newest generation.

    Raises:
        ValueError, TypeError, KeyError, CorruptFileError: they make no sense.
    """
    file_of = _ints(raw["files"], None, low=0)
    count = len(file_of)
    offsets, rows, since, until = (_ints(raw[key], count, low=0) for key in ("offsets", "rows", "since", "until"))
    checksums = _hexes(raw["xxh3_128"], count)
    tensor = PartedTensor(
        _dtype(raw["dtype"]), tuple(raw["row_shape"]), file_of, offsets, rows, since, until, checksums
    )
    # The rows in all, also of parts that were replaced, are more than any generation has.
    total = sum(tensor.rows.tolist())
    shape, _ = check_shape((total, *tensor.row_shape), tensor.dtype.itemsize, path=path, tensor=name)
    if not count or int(file_of.max()) >= len(files.names) or int(tensor.since.max()) > number:
        raise ValueError(f"parts of {name!r:.60} that name no file, or a generation that is to come")
    if int(tensor.until.max()) > number or bool(((tensor.until > 0) & (tensor.until <= tensor.since)).any()):
        raise ValueError(f"parts of {name!r:.60} that end before they begin")
    if not len(tensor.visible(number)):
        raise ValueError(f"{name!r:.60} without a part")
    row_nbytes = tensor.dtype.itemsize
    for size in shape[1:]:
        row_nbytes *= size
    sizes = files.sizes[file_of]
    # Divided, not multiplied: a claimed product may not fit 64 bits.
    room = (sizes - tensor.offsets) // max(row_nbytes, 1)
    if row_nbytes and bool(((tensor.rows > 0) & ((tensor.offsets > sizes) | (tensor.rows > room))).any()):
        raise ValueError(f"parts of {name!r:.60} beyond the end of their files")
    return tensor


def parse_whole(name: str, raw: Any, files: PartFiles, path: Path) -> WholeTensor:
    """A tensor in one file, checked against the files; errors as :func:`parse_parts`."""
    dtype, file = _dtype(raw["dtype"]), raw["file"]
    if type(file) is not int or not 0 <= file < len(files.names):
        raise ValueError(f"{name!r:.60} in no file")
    shape, _ = check_shape(raw["shape"], dtype.itemsize, path=path, tensor=name)
    return WholeTensor(file, dtype, shape, _hexes([raw["xxh3_128"]], 1)[0])


def _ints(raw: Any, count: int | None, *, low: int | None = None) -> NDArray[np.int64]:
    values = np.array(raw) if isinstance(raw, list) and raw else np.zeros(0 if raw == [] else (0, 0), np.int64)
    if values.dtype != np.int64 or values.ndim != 1 or (count is not None and len(values) != count):
        raise ValueError(f"expected a list of {'' if count is None else f'{count} '}ints, found {shown(raw, 60)}")
    if low is not None and len(values) and int(values.min()) < low:
        raise ValueError(f"expected ints of at least {low}, found {int(values.min())}")
    return values


def _hexes(raw: Any, count: int) -> tuple[str | None, ...]:
    if not isinstance(raw, list) or len(raw) != count:
        raise ValueError(f"expected a list of {count} hashes, found {shown(raw, 60)}")
    for value in raw:
        if value is not None and (type(value) is not str or len(value) != 32 or not _HEX.issuperset(value)):
            raise ValueError(f"expected 32 hex digits, found {shown(value, 60)}")
    return tuple(raw)


def _dtype(name: object) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype) or "qint" in str(found) or "quint" in str(found):
        raise ValueError(f"dtype {name!r:.60}")
    return found
