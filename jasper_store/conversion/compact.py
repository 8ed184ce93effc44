"""``compact``: one part of many, proven by checksums, published in one step."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from jasper_store.conversion.append import clean_parts
from jasper_store.conversion.generations import (
    PART_DIRECTORY,
    current,
    publish,
)
from jasper_store.conversion.rewrite import rewrite
from jasper_store.errors import ConversionError
from jasper_store.files.atomic import (
    map_os_errors,
    remove,
)
from jasper_store.files.lock import LOCK_NAME, exclusive
from jasper_store.formats.base import Parts, Schema
from jasper_store.formats.generation import Generation
from jasper_store.formats.part_columns import PartFiles
from jasper_store.formats.registry import format_for
from jasper_store.memory.budget import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from jasper_store.formats.base import TensorSpec

__all__ = ["CompactReport", "compact"]


@dataclass(frozen=True)
class CompactReport:
    """What a compaction did. ``str(report)`` is for people, :meth:`to_dict` for machines.

    Attributes:
        path: the dataset's directory.
        generation: number of the newest generation now.
        parts: name of each tensor that was rewritten to the parts it had.
        nbytes: bytes written.
        seconds: time taken.
        kept: files of older generations that are still there, for readers that have them open.
        kept_nbytes: their bytes.
        removed: files of older generations that were removed.
    """

    path: Path
    generation: int
    parts: dict[str, int]
    nbytes: int
    seconds: float
    kept: int
    kept_nbytes: int
    removed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**self.__dict__, "path": str(self.path)}

    def __str__(self) -> str:
        if self.parts:
            what = ", ".join(f"{name} ({parts:,} parts)" for name, parts in sorted(self.parts.items()))
            cost = f"{format_bytes(self.nbytes)} written and read back in {self.seconds:.1f} s"
            lines = [f"{self.path}: generation {self.generation}; {cost}: {what}"]
        else:
            lines = [f"{self.path}: every tensor is in one part (generation {self.generation})"]
        if self.removed:
            lines.append(f"{self.removed} files of older generations were removed")
        if self.kept:
            lines.append(
                f"{self.kept} files of older generations ({format_bytes(self.kept_nbytes)}) are kept for readers that have "
                "them open; remove them with --remove-old when there are none"
            )
        return "\n".join(lines)


def compact(
    path: str | os.PathLike[str],
    *,
    remove_old: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    schema: Schema | None = None,
) -> CompactReport:
    """Make one part of many, for each tensor that has more than one.

    Takes a few blocks of memory whatever the size. What was written is read back and its checksum compared before the
    new generation is published, in one step. Readers keep the generation that they opened as long as its files are
    there.

    Args:
        path: the dataset's directory.
        remove_old: remove the files that only older generations have, also those of earlier compactions. Readers that
            have opened one of these lose it.
        progress: called as ``progress(tensor, done_bytes, total_bytes)`` after each block.
        schema: names and HDF5 paths.

    Raises:
        ConversionError: no dataset, no room, another writer, or values that read back differently; nothing was published.
        CorruptFileError: a part is not the one that was written.
    """
    started = time.perf_counter()
    root = Path(os.path.realpath(path))
    schema = Schema() if schema is None else schema
    if not root.is_dir():
        raise ConversionError(f"{root}: expected a dataset's directory, found none; name another", path=root)
    with map_os_errors(root), exclusive(root / LOCK_NAME, f"compacting {root}"):
        clean_parts(root)
        old = current(root, schema)
        if old is None:
            raise ConversionError(f"{root}: expected a dataset, found no tensors; name another directory", path=root)
        specs = old.locate(root, schema, format_for, old.number or None) if old.number else _plain(old, root, schema)
        many = [spec for spec in specs if isinstance(spec.location, Parts)]
        new = rewrite(root, old, many, schema, what="compacting", progress=progress) if many else old
        removed = 0
        if remove_old and new.number:
            removed, new = _without_old(root, new)
    old_files = np.setdiff1d(np.arange(len(new.files.names)), new.files_of(new.number))
    return CompactReport(
        root,
        new.number,
        {spec.name: len(spec.location) for spec in many if isinstance(spec.location, Parts)},
        sum(spec.nbytes for spec in many),
        time.perf_counter() - started,
        len(old_files),
        int(new.files.sizes[old_files].sum()),
        removed,
    )


def _plain(old: Generation, root: Path, schema: Schema) -> list[TensorSpec]:
    """The tensors of files that no manifest names as parts: numbered ones may be parts all the same."""
    return replace(old, number=1).locate(root, schema, format_for, 1)


def _without_old(root: Path, generation: Generation) -> tuple[int, Generation]:
    """Remove the files that only older generations have; how many, and the generation without them.

    The files go first: a kill in between leaves names of files that are missing, which only an older generation reads,
    and the next run removes the names.
    """
    files = generation.files
    kept = generation.files_of(generation.number)
    gone = [files.names[i] for i in np.setdiff1d(np.arange(len(files.names)), kept).tolist()]
    if not gone:
        return 0, generation
    for name in gone:
        (root / name).unlink(missing_ok=True)
    renumbered = np.full(len(files.names), -1, np.int64)
    renumbered[kept] = np.arange(len(kept))
    columns = PartFiles(
        tuple(files.names[i] for i in kept.tolist()),
        files.sizes[kept],
        files.mtimes[kept],
        tuple(files.samples[i] for i in kept.tolist()),
    )
    tensors = {}
    for name, tensor in generation.tensors.items():
        at = tensor.visible(generation.number)
        tensors[name] = replace(
            tensor,
            file_of=renumbered[tensor.file_of[at]],
            offsets=tensor.offsets[at],
            rows=tensor.rows[at],
            since=tensor.since[at],
            until=tensor.until[at],
            checksums=tuple(tensor.checksums[i] for i in at.tolist()),
        )
    whole = {name: replace(each, file=int(renumbered[each.file])) for name, each in generation.whole.items()}
    new = replace(generation, files=columns, tensors=tensors, whole=whole, oldest=generation.number)
    publish(root, generation, new)
    for directory in _without_files(root, new):
        remove(directory)
    return len(gone), new


def _without_files(root: Path, generation: Generation) -> list[Path]:
    """Directories of parts, and of shards in them, that hold no file of the dataset; what else a shard had goes with them."""
    used = {str(parent) for name in generation.files.names for parent in PurePosixPath(name).parents}
    tops = [path for path in root.iterdir() if PART_DIRECTORY.fullmatch(path.name) and path.is_dir()]
    empty = [path for path in tops if path.name not in used]
    for top in tops:
        if top.name in used:
            empty += [path for path in top.iterdir() if path.is_dir() and f"{top.name}/{path.name}" not in used]
    return empty
