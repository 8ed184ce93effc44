"""A dataset's next generation: the parts that it has, those that come, and the one step that publishes them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from jasper_store.errors import ConversionError, DatasetNotFoundError, IntegrityError
from jasper_store.files.atomic import map_os_errors
from jasper_store.files.fingerprint import FileFingerprint
from jasper_store.formats.base import Extent, Parts
from jasper_store.formats.files import dtype_name
from jasper_store.formats.generation import Generation
from jasper_store.formats.part_columns import PartedTensor, PartFiles, WholeTensor
from jasper_store.formats.parts import parts_of
from jasper_store.formats.registry import base_name, locate
from jasper_store.store.manifest import MANIFEST_NAME, Manifest, key_of
from jasper_store.store.manifest_file import read, update

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import torch

    from jasper_store.formats.base import Schema, TensorSpec

_Row: TypeAlias = "tuple[int, int, int, str | None]"
"""A part: number of its file, offset, rows, checksum."""

__all__ = [
    "PART_DIRECTORY",
    "NewPart",
    "current",
    "extended",
    "next_directory",
    "publish",
    "require_alike",
    "require_growable",
    "retired",
    "stray_directories",
]

PART_DIRECTORY: Final = re.compile(r"part-\d{6,}")
_WAIT_SECONDS = 60.0  # for a reader that is writing down which checks passed


@dataclass(frozen=True)
class NewPart:
    """Rows of one tensor that come to a dataset.

    Attributes:
        spec: where they lie; a tensor's name, dtype and row shape are those of the dataset.
        checksum: xxh3-128 of them in hex; ``None`` where they are a whole tensor in parts.
    """

    spec: TensorSpec
    checksum: str | None


def current(root: Path, schema: Schema) -> Generation | None:
    """The newest generation of a directory, or what one would say of files that are in no parts yet (number 0).

    Returns:
        ``None`` where there is no dataset.

    Raises:
        CorruptFileError: a file of the dataset, or the manifest, cannot be read or is not the one recorded.
        ConversionError: a file of the dataset lies elsewhere.
    """
    manifest = read(root) or Manifest(root)
    if manifest.generation is not None:
        return manifest.generation
    try:
        located = locate(root, "auto", schema)
    except DatasetNotFoundError:
        return None
    manifest.check(located.specs)
    return extended(
        Generation(0, located.format),
        root,
        [NewPart(spec, manifest.checksum(spec)) for spec in located.specs],
        manifest,
    )


def next_directory(root: Path, number: int) -> Path:
    """Directory of the parts that come with a generation."""
    return root / f"part-{number:06d}"


def stray_directories(root: Path, generation: Generation | None) -> list[Path]:
    """Directories of parts that no generation names: those of writers that were killed before they published."""
    named = {name.split("/")[0] for name in generation.files.names} if generation is not None else set()
    return [
        path
        for path in sorted(root.iterdir())
        if PART_DIRECTORY.fullmatch(path.name) and path.name not in named and path.is_dir() and not path.is_symlink()
    ]


def extended(
    old: Generation,
    root: Path,
    parts: Iterable[NewPart],
    manifest: Manifest | None = None,
    *,
    number: int | None = None,
    replaced: Sequence[str] = (),
) -> Generation:
    """A generation with further parts. Old files are not touched, nor read.

    Args:
        old: the generation before.
        root: the dataset's directory.
        parts: what comes, in order.
        manifest: what is known of the files of the parts; else their fingerprints are taken.
        number: of the new generation; by default the old one's.
        replaced: names of tensors whose old parts the new ones replace.

    Raises:
        ConversionError: a file of a part lies outside the directory.
    """
    number = old.number if number is None else number
    files = _Files(root, old.files, manifest)
    columns: dict[str, list[_Row]] = {}
    whole, spec_of = {name: each for name, each in old.whole.items() if name not in replaced}, {}
    for part in parts:
        spec = part.spec
        numbers = {path: files.number(path) for path in spec.paths}
        if not _growable(spec):
            whole[spec.name] = WholeTensor(numbers[spec.path], spec.dtype, spec.shape, part.checksum)
            continue
        spec_of[spec.name] = spec
        for each in parts_of(spec):
            # Without rows it may have no place in its file (HDF5).
            offset = each.location.offset if isinstance(each.location, Extent) else 0
            columns.setdefault(spec.name, []).append((numbers[each.path], offset, each.n_rows, part.checksum))
    tensors = {name: retired(tensor, number) if name in replaced else tensor for name, tensor in old.tensors.items()}
    for name, rows in columns.items():
        tensors[name] = _longer(tensors.get(name), spec_of[name], rows, number)
    return replace(old, number=number, files=files.columns(), tensors=tensors, whole=whole)


class _Files:
    """The files of a generation, and those that come to it."""

    def __init__(self, root: Path, old: PartFiles, manifest: Manifest | None) -> None:
        self._root = root
        self._old = old
        self._entries = manifest.files if manifest is not None else {}
        self._numbers = {name: number for number, name in enumerate(old.names)}
        self._new: list[FileFingerprint] = []

    def number(self, path: Path) -> int:
        """Number of a file, which is added if it is new."""
        name = key_of(self._root, path)
        if name is None:
            msg = f"{path}: expected all files of the dataset in {self._root}, found one elsewhere; convert it first"
            raise ConversionError(msg, path=path)
        if name not in self._numbers:
            entry = self._entries.get(name)
            self._new.append(entry.fingerprint if entry is not None else FileFingerprint.of(path))
            self._numbers[name] = len(self._numbers)
        return self._numbers[name]

    def columns(self) -> PartFiles:
        """All of them."""
        return PartFiles(
            tuple(self._numbers),
            np.concatenate([self._old.sizes, np.array([each.size for each in self._new], np.int64)]),
            np.concatenate([self._old.mtimes, np.array([each.mtime_ns for each in self._new], np.int64)]),
            (*self._old.samples, *(each.sample for each in self._new)),
        )


def _growable(spec: TensorSpec) -> bool:
    return bool(spec.shape) and (isinstance(spec.location, Parts) or spec.contiguous or not spec.n_rows)


def retired(tensor: PartedTensor, number: int) -> PartedTensor:
    """A tensor whose parts end with a generation."""
    return replace(tensor, until=np.where(tensor.until == 0, number, tensor.until).astype(np.int64))


def _longer(old: PartedTensor | None, spec: TensorSpec, rows: Sequence[_Row], number: int) -> PartedTensor:
    none = np.zeros(0, np.int64)
    if old is None:
        old = PartedTensor(spec.dtype, spec.shape[1:], none, none, none, none, none, ())
    return replace(
        old,
        file_of=np.concatenate([old.file_of, np.array([row[0] for row in rows], np.int64)]),
        offsets=np.concatenate([old.offsets, np.array([row[1] for row in rows], np.int64)]),
        rows=np.concatenate([old.rows, np.array([row[2] for row in rows], np.int64)]),
        since=np.concatenate([old.since, np.full(len(rows), number, np.int64)]),
        until=np.concatenate([old.until, np.zeros(len(rows), np.int64)]),
        checksums=(*old.checksums, *(row[3] for row in rows)),
    )


def require_growable(
    generation: Generation, name: str, dtype: torch.dtype, row_shape: tuple[int, ...] | None, path: Path
) -> None:
    """Check that rows may be appended to a tensor of a dataset.

    Raises:
        IntegrityError: the dataset has no such tensor, it cannot grow, or has another dtype or row shape.
    """
    tensor = generation.tensors.get(name)
    whole = generation.whole.get(name)
    if tensor is not None and row_shape is not None and (tensor.dtype, tensor.row_shape) == (dtype, row_shape):
        return
    if tensor is not None:
        expected = f"{dtype_name(tensor.dtype)} rows of shape {list(tensor.row_shape)}, as the dataset has"
    elif whole is not None:
        kind = "a scalar, which has no rows" if not whole.shape else "compressed, in another order or a list"
        expected = f"a tensor that can grow (this one is {kind}; convert the dataset to another directory first)"
    else:
        known = ", ".join(sorted({*generation.tensors, *generation.whole}))
        expected = f"one of the dataset's tensors ({known})"
    found = dtype_name(dtype) if row_shape is None else f"{dtype_name(dtype)} rows of shape {list(row_shape)}"
    msg = f"{path}: {name!r}: expected {expected}, found {found}; nothing was appended"
    raise IntegrityError(msg, path=path, tensor=name)


def require_alike(old: Generation, new: Generation, path: Path) -> None:
    """Check that tensors with one number of rows have one number of rows again.

    Raises:
        IntegrityError: some have grown otherwise than others; the message names both.
    """
    before, after = _rows(old), _rows(new)
    first: dict[int, str] = {}
    for name in sorted(before, key=lambda name: (name not in new.tensors, name)):
        other = first.setdefault(before[name], name)
        if after[name] != after[other]:
            msg = (
                f"{path}: expected {other} and {name} to grow alike, since both have {before[name]:,} rows, found "
                f"{after[other] - before[other]:,} and {after[name] - before[name]:,} new ones; nothing was published. "
                "Append as many rows to each"
            )
            raise IntegrityError(msg, path=path, tensor=name)


def _rows(generation: Generation) -> dict[str, int]:
    """Rows of each tensor, of a ragged one by its base name."""
    found: dict[str, int] = {name: whole.shape[0] for name, whole in generation.whole.items() if whole.shape}
    found |= {name: tensor.n_rows(generation.number) for name, tensor in generation.tensors.items()}
    ragged = {base_name(name) for name in found if name.endswith(".offsets") and f"{base_name(name)}.values" in found}
    rows = {name: count for name, count in found.items() if base_name(name) not in ragged}
    return rows | {name: found[f"{name}.offsets"] - 1 for name in ragged}


def publish(root: Path, old: Generation | None, new: Generation) -> None:
    """Make a generation the newest one, by one replacement of the manifest; the caller holds the directory's lock.

    Raises:
        ConversionError: the directory cannot be written, or another generation was published meanwhile.
    """
    before = old.number if old is not None else 0

    def change(manifest: Manifest) -> Manifest:
        found = manifest.generation.number if manifest.generation is not None else 0
        if found != before:
            msg = f"{root}: expected generation {before}, found {found}: another writer published; run again"
            raise ConversionError(msg, path=root)
        named = set(new.files.names)
        files = {name: entry for name, entry in manifest.files.items() if name not in named}
        return Manifest(root, files, {}, new, {})

    with map_os_errors(root / MANIFEST_NAME):
        update(root, change, wait=_WAIT_SECONDS)
