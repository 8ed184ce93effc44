"""The parts that a manifest names: a generation of a dataset, in columns, so that ten thousand parts parse in milliseconds.

A dataset that has grown lies in several directories of files. Its manifest (``jasper_store.json``) names the file, the
offset and the rows of each part, so opening reads no header of a part, and a file that the manifest does not name is
invisible. Files are never changed. A part records the generation that it appeared in and the one that it was replaced
in, so a reader finds the generation that it opened for as long as its files are there.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import numpy as np
import xxhash

from jasper_store.errors import CorruptFileError, DatasetNotFoundError
from jasper_store.formats.base import Extent, FormatName, Parts, TensorSpec
from jasper_store.formats.file_list import FileList
from jasper_store.formats.files import dtype_name, read_file
from jasper_store.formats.part_columns import (
    PartedTensor,
    PartFiles,
    WholeTensor,
    parse_files,
    parse_parts,
    parse_whole,
)
from jasper_store.native.stats import stat_files

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from jasper_store.formats.base import Schema
    from jasper_store.formats.protocols import ReadFormat

__all__ = [
    "MANIFEST_NAME",
    "SHARDS",
    "Generation",
    "read_generation",
]

MANIFEST_NAME: Final = "jasper_store.json"
SHARDS: Final = ".shards"
"""Directory, inside a dataset's, that shards are written into until they are committed."""


@dataclass(frozen=True, eq=False)
class Generation:
    """What a manifest names.

    Attributes:
        number: of the newest generation, from 1.
        format: format that most of the files have.
        files: all files, those of older generations too while they are kept.
        tensors: tensors in parts, by name.
        whole: the other tensors, by name.
        oldest: the first generation whose files are still there.
    """

    number: int
    format: FormatName
    files: PartFiles = field(default_factory=PartFiles)
    tensors: Mapping[str, PartedTensor] = field(default_factory=dict)
    whole: Mapping[str, WholeTensor] = field(default_factory=dict)
    oldest: int = 1

    def files_of(self, number: int) -> NDArray[np.int64]:
        """Numbers of the files that a generation reads, ascending."""
        used = [tensor.file_of[tensor.visible(number)] for tensor in self.tensors.values()]
        return np.unique(np.concatenate([np.array([w.file for w in self.whole.values()], np.int64), *used]))

    def digest(self) -> str:
        """Short text that changes with any file or part of the newest generation."""
        facts: list[Any] = [self.number, *sorted((name, repr(whole)) for name, whole in self.whole.items())]
        for name, tensor in sorted(self.tensors.items()):
            columns = (tensor.file_of, tensor.offsets, tensor.rows, tensor.since, tensor.until)
            facts += [name, dtype_name(tensor.dtype), tensor.row_shape, [_hash(column) for column in columns]]
        facts += [self.files.names, _hash(self.files.sizes), self.files.samples]
        return xxhash.xxh3_128_hexdigest(repr(facts).encode())

    def locate(
        self, root: Path, schema: Schema, format_for: Callable[[Path], ReadFormat | None], number: int | None = None
    ) -> list[TensorSpec]:
        """The tensors of a generation; reads headers of whole tensors only.

        Args:
            root: the dataset's directory.
            schema: names, for the headers that are read.
            format_for: format of a file by its name.
            number: the generation; the newest by default.

        Raises:
            CorruptFileError: a file is missing or has another size than is recorded, or lacks a tensor.
            DatasetNotFoundError: that generation is not there (any more).
        """
        number = self.number if number is None else number
        if not self.oldest <= number <= self.number:
            why = "a compaction removed its files; " if number < self.oldest else ""
            msg = f"{root}: expected generation {self.oldest} to {self.number}, found {number}: {why}open the dataset again"
            raise DatasetNotFoundError(msg, path=root)
        paths = self._checked_paths(root, number)
        specs = self.specs_at(root, paths, number)
        for file in sorted({whole.file for whole in self.whole.values()}):
            path = Path(paths[file])
            fmt = format_for(path)
            there = {spec.name: spec for spec in fmt.locate(path, schema)} if fmt is not None else {}
            for name, whole in self.whole.items():
                if whole.file == file:
                    specs.append(_whole_spec(name, whole, there, path))
        return specs

    def specs_at(self, root: Path, paths: Mapping[int, str], number: int) -> list[TensorSpec]:
        """The tensors in parts of a generation, given the path of each of its files, as a text, by its number."""
        return [
            _spec(name, tensor, paths, root, number)
            for name, tensor in self.tensors.items()
            if tensor.since[0] <= number  # others came later
        ]

    def _checked_paths(self, root: Path, number: int) -> dict[int, str]:
        prefix = f"{root}{os.sep}"
        numbers = self.files_of(number)
        names = [self.files.names[file] for file in numbers.tolist()]
        found = stat_files(root, names)
        if found is None or not np.array_equal(found[0], self.files.sizes[numbers]):
            self._require_files(root, prefix, numbers.tolist(), number)
        return {file: prefix + name for file, name in zip(numbers.tolist(), names, strict=True)}

    def _require_files(self, root: Path, prefix: str, files: Sequence[int], number: int) -> None:
        """Raise the error of the first file that is missing or has another size."""
        for file in files:
            name, expected = self.files.names[file], int(self.files.sizes[file])
            where = prefix + name
            try:
                size = Path(where).stat().st_size
            except OSError as exc:
                kept = "it was removed after a compaction" if number < self.number else "restore it"
                msg = (
                    f"{where}: expected the file that {MANIFEST_NAME} names in generation {number}, found none "
                    f"({exc.strerror}); {kept}, or copy the dataset again"
                )
                raise CorruptFileError(msg, path=root / name) from exc
            if size != expected:
                msg = (
                    f"{where}: expected {expected:,} bytes, as {MANIFEST_NAME} records, found {size:,}: it was truncated "
                    "or replaced; copy the dataset again"
                )
                raise CorruptFileError(msg, path=root / name)

    # ---- JSON

    def to_json(self) -> dict[str, Any]:
        """Plain values, one list per column."""
        return {
            "number": self.number,
            **({"oldest": self.oldest} if self.oldest > 1 else {}),
            "format": self.format,
            "files": {
                "names": list(self.files.names),
                "sizes": self.files.sizes.tolist(),
                "mtimes_ns": self.files.mtimes.tolist(),
                "samples": list(self.files.samples),
            },
            "parts": {
                name: {
                    "dtype": dtype_name(tensor.dtype),
                    "row_shape": list(tensor.row_shape),
                    "files": tensor.file_of.tolist(),
                    "offsets": tensor.offsets.tolist(),
                    "rows": tensor.rows.tolist(),
                    "since": tensor.since.tolist(),
                    "until": tensor.until.tolist(),
                    "xxh3_128": list(tensor.checksums),
                }
                for name, tensor in self.tensors.items()
            },
            "whole": {
                name: {"file": w.file, "dtype": dtype_name(w.dtype), "shape": list(w.shape), "xxh3_128": w.checksum}
                for name, w in self.whole.items()
            },
        }

    @classmethod
    def from_json(cls, raw: Any, path: Path) -> Generation:
        """Check and build.

        Args:
            raw: what :meth:`to_json` gave.
            path: the manifest, for errors.

        Raises:
            ValueError, TypeError, KeyError, CorruptFileError: it makes no sense.
        """
        number, chosen = raw["number"], raw["format"]
        if type(number) is not int or not 1 <= number < 2**31:
            raise ValueError(f"generation {number!r:.60}")
        oldest = raw.get("oldest", 1)
        if type(oldest) is not int or not 1 <= oldest <= number:
            raise ValueError(f"oldest generation {oldest!r:.60} of {number}")
        if chosen not in get_args(FormatName):
            raise ValueError(f"format {chosen!r:.60}")
        files = parse_files(raw["files"])
        tensors = {_name(name): parse_parts(name, each, files, number, path) for name, each in raw["parts"].items()}
        whole = {_name(name): parse_whole(name, each, files, path) for name, each in raw["whole"].items()}
        if both := sorted(tensors.keys() & whole.keys()):
            raise ValueError(f"tensor {both[0]!r:.60} both in parts and whole")
        return cls(number, chosen, files, tensors, whole, oldest)


@lru_cache(maxsize=1)
def parse_json(text: bytes) -> Any:
    """A manifest's JSON, to be looked at only: the last one is kept, since an opening needs it several times.

    Raises:
        ValueError, RecursionError: it is none.
    """
    return json.loads(text)


def read_generation(root: Path) -> Generation | None:
    """The generation that the manifest of a directory names; ``None`` where there is no manifest, or it names no parts.

    Raises:
        CorruptFileError: the manifest names parts, and what it says makes no sense.
    """
    path = root / MANIFEST_NAME
    try:
        text = read_file(path)
    except DatasetNotFoundError:
        return None  # one that is there and cannot be read is refused where the rest of it is read
    if b'"generation"' not in text:
        return None
    try:
        raw = parse_json(text)
        return Generation.from_json(raw["generation"], path) if "generation" in raw else None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as exc:
        if isinstance(exc, CorruptFileError):
            raise
        msg = (
            f"{path}: the parts that it names cannot be understood ({exc!s:.200}); restore the file. Without it the "
            "dataset cannot be put together"
        )
        raise CorruptFileError(msg, path=path) from exc


def _name(value: object) -> str:
    if type(value) is not str or not value:
        raise ValueError(f"expected a name, found {value!r:.60}")
    return value


def _hash(column: NDArray[np.int64]) -> str:
    return xxhash.xxh3_64_hexdigest(column.tobytes())


def _spec(name: str, tensor: PartedTensor, paths: Mapping[int, str], root: Path, number: int) -> TensorSpec:
    at = tensor.visible(number)
    if not len(at):
        msg = f"{root}: expected parts of {name!r} in generation {number}, found none; copy the dataset again"
        raise CorruptFileError(msg, path=root / MANIFEST_NAME, tensor=name)
    rows = tensor.rows[at]
    shape = (int(rows.sum()), *tensor.row_shape)
    filled = at[rows > 0]
    if len(filled) <= 1:
        only = (filled if len(filled) else at)[0]
        place = Extent(Path(paths[int(tensor.file_of[only])]), int(tensor.offsets[only]))
        return TensorSpec(name, tensor.dtype, shape, place)
    numbers, first, inverse = np.unique(tensor.file_of[filled], return_index=True, return_inverse=True)
    order = np.argsort(first)  # files in the order in which their first rows come
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(tensor.rows[filled])])
    files = FileList(paths[file] for file in numbers[order].tolist())
    return TensorSpec(name, tensor.dtype, shape, Parts(files, rank[inverse], tensor.offsets[filled], starts))


def _whole_spec(name: str, whole: WholeTensor, there: Mapping[str, TensorSpec], path: Path) -> TensorSpec:
    found = there.get(name)
    if found is None or (found.dtype, found.shape) != (whole.dtype, whole.shape):
        what = "none" if found is None else f"{dtype_name(found.dtype)} {list(found.shape)}"
        msg = (
            f"{path}: expected the tensor {name!r}, {dtype_name(whole.dtype)} {list(whole.shape)}, as {MANIFEST_NAME} "
            f"records, found {what}; restore the file"
        )
        raise CorruptFileError(msg, path=path, tensor=name)
    return found
