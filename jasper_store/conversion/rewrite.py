"""Tensors of a dataset written anew, as one part each: what a compaction does, and what takes the place of old values."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from jasper_store.conversion.append import clean_parts
from jasper_store.conversion.generations import NewPart, current, extended, next_directory, publish, require_growable
from jasper_store.conversion.plan import FileTask, SourceFacts
from jasper_store.conversion.transfer import Options, write_file
from jasper_store.errors import ConversionError
from jasper_store.files.atomic import (
    map_os_errors,
    remove,
    require_space,
    sync_directory,
    sync_file,
    temporary_name,
)
from jasper_store.files.fingerprint import FileFingerprint
from jasper_store.files.lock import LOCK_NAME, exclusive
from jasper_store.formats.base import Extent
from jasper_store.formats.registry import FORMATS
from jasper_store.memory import budget
from jasper_store.store.manifest import FileEntry, Manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from jasper_store.formats.base import Schema, TensorSpec
    from jasper_store.formats.generation import Generation

__all__ = ["replace_tensors", "rewrite"]


def replace_tensors(root: Path, specs: Sequence[TensorSpec], schema: Schema) -> None:
    """Publish a generation of a dataset in parts in which some tensors have other values, and new ones may be there.

    What was written is read back and its checksum compared before. Readers keep the generation that they opened.

    Args:
        root: the dataset's directory.
        specs: the new tensors, wherever they lie; one that is there has the dtype and row shape of before.
        schema: names and HDF5 paths.

    Raises:
        ConversionError: no dataset, no room, another writer, or values that read back differently; nothing was published.
        IntegrityError: another dtype or row shape.
        CorruptFileError: the manifest cannot be understood.
    """
    with map_os_errors(root), exclusive(root / LOCK_NAME, f"replacing tensors of {root}"):
        clean_parts(root)
        old = current(root, schema)
        if old is None:
            raise ConversionError(f"{root}: expected a dataset, found no tensors; name another directory", path=root)
        for spec in specs:
            if spec.name in old.tensors:
                require_growable(old, spec.name, spec.dtype, spec.shape[1:], root)
        rewrite(root, old, specs, schema, what="writing new values")


def rewrite(
    root: Path,
    old: Generation,
    specs: Sequence[TensorSpec],
    schema: Schema,
    *,
    what: str,
    progress: Callable[[str, int, int], None] | None = None,
) -> Generation:
    """Write tensors in one piece each, prove them, and publish a generation that has these instead of the old ones.

    Args:
        root: the dataset's directory, whose lock the caller holds.
        old: its newest generation.
        specs: the tensors, wherever they lie.
        schema: names and HDF5 paths.
        what: is done, for an error that there is no room.
        progress: called as ``progress(tensor, done_bytes, total_bytes)`` after each block.

    Raises:
        ConversionError, CorruptFileError: see :func:`replace_tensors`.
    """
    fmt = FORMATS.get(old.format, FORMATS["safetensors"])
    target = next_directory(root, old.number + 1)
    staging = temporary_name(target, "staging")
    if fmt.one_file is not None:
        tasks = [FileTask(staging / fmt.one_file, tuple(specs))]
    else:
        tasks = [FileTask(staging / f"{spec.name}{fmt.suffixes[0]}", (spec,)) for spec in specs]
    total = sum(spec.nbytes for spec in specs)
    require_space(root, sum(task.needed(None) for task in tasks), what=what)
    facts = SourceFacts(path for spec in specs for path in spec.paths)
    options = Options(fmt, schema, drop=2 * total > budget.measure().nbytes // 2)
    done = 0

    def advance(name: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(name, done, total)

    with contextlib.ExitStack() as stack:
        stack.callback(remove, staging)
        staging.mkdir()
        entries: dict[str, FileEntry] = {}
        placed: list[NewPart] = []
        for task in tasks:
            facts.check(path for spec in task.specs for path in spec.paths)
            for written in write_file(task, task.target, options, advance):
                place = written.target.location
                assert isinstance(place, Extent)  # rows that are there, and not compressed
                place = replace(place, path=target / task.target.name)
                spec = replace(written.target, name=written.spec.name, location=place)
                placed.append(NewPart(spec, written.checksum))
            facts.check(path for spec in task.specs for path in spec.paths)
            sync_file(task.target)
            entries[f"{target.name}/{task.target.name}"] = FileEntry(FileFingerprint.of(task.target))
        sync_directory(staging)
        staging.rename(target)
        sync_directory(root)
    names = [spec.name for spec in specs]
    manifest = Manifest(root, entries)
    new = extended(old, root, placed, manifest, number=old.number + 1, replaced=names)
    publish(root, old if old.number else None, new)
    return new
