"""``commit``: publish what shard writers wrote, all of it in one step."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from jasper_store.conversion.append import SHARD_NAME, clean_parts
from jasper_store.conversion.checksum import Hasher
from jasper_store.conversion.generations import (
    NewPart,
    current,
    extended,
    next_directory,
    publish,
    require_alike,
    require_growable,
)
from jasper_store.conversion.rows import read_blocks
from jasper_store.errors import ConversionError, IntegrityError
from jasper_store.files.atomic import map_os_errors, sync_directory, sync_file, write_bytes
from jasper_store.files.fingerprint import FileFingerprint
from jasper_store.files.lock import LOCK_NAME, exclusive, lock_beside
from jasper_store.formats.base import Schema
from jasper_store.formats.files import dtype_name
from jasper_store.formats.generation import SHARDS, Generation, read_generation
from jasper_store.formats.registry import FORMATS, base_name, format_for, locate
from jasper_store.formats.texts import text_names
from jasper_store.store.manifest import FileEntry, Manifest, TensorEntry, key_of
from jasper_store.store.manifest_file import read

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from jasper_store.formats.base import TensorSpec
    from jasper_store.formats.registry import Located

__all__ = ["commit", "first_shard"]

_CONFIG: Final = "config.json"
_NAMED = 40  # missing shards that a message names


def commit(
    path: str | os.PathLike[str],
    *,
    schema: Schema | None = None,
    check: Callable[[Sequence[TensorSpec]], None] | None = None,
) -> Path:
    """Publish the shards of a dataset: nothing of them is visible before, everything after.

    Shards follow each other by their numbers, behind the rows of a dataset that is there. Their files are moved, not
    copied; only offsets of ragged tensors and rows of ids, 8 bytes a row, are written again: they count from the first row of all.
    A commit that was killed is run again.

    Args:
        path: the dataset's directory.
        schema: names and HDF5 paths.
        check: called with all tensors as they will be; by default tensors with one number of rows must agree.

    Returns:
        The directory.

    Raises:
        ConversionError: shards are missing (the message names them), or being written; there are none; or the system
            refused. Nothing was published.
        IntegrityError: shards do not fit each other, or the dataset.
        CorruptFileError: a shard is not the one that was written.
    """
    root = Path(os.path.realpath(path))
    if not root.is_dir():
        msg = f"{root}: expected a directory that shards were written to, found none; run the shard writers first"
        raise ConversionError(msg, path=root)
    with map_os_errors(root), contextlib.ExitStack() as stack:
        stack.enter_context(exclusive(root / LOCK_NAME, f"committing {root}"))
        clean_parts(root)
        names = _complete(root)
        for name in names:
            # The lock of the shard's writer; see make_staging.
            stack.enter_context(exclusive(lock_beside(root / SHARDS / name), f"committing {root / SHARDS / name}"))
        _Commit(root, names, Schema() if schema is None else schema, check).do()
    with contextlib.suppress(OSError):  # shards of another round may be on their way
        (root / SHARDS).rmdir()
    return root


def first_shard(root: Path) -> Path | None:
    """Directory of a shard that is not committed yet; ``None`` if there is none."""
    shards = root / SHARDS
    found = [path for path in shards.iterdir() if SHARD_NAME.fullmatch(path.name)] if shards.is_dir() else []
    return min(found, default=None)


def _complete(root: Path) -> list[str]:
    """Names of the shards, which are all there, in order."""
    shards = root / SHARDS
    found: dict[int, set[int]] = {}
    for entry in shards.iterdir() if shards.is_dir() else ():
        if (match := SHARD_NAME.fullmatch(entry.name)) and entry.is_dir():
            found.setdefault(int(match["shards"]), set()).add(int(match["shard"]))
    if not found:
        number = generation.number if (generation := read_generation(root)) is not None else 0
        msg = (
            f"{root}: expected shards to commit, found none (the newest generation is {number}); run the shard writers, "
            "or nothing, if they were committed before"
        )
        raise ConversionError(msg, path=root)
    if len(found) > 1:
        msg = (
            f"{shards}: expected the shards of one number, found some of {' and some of '.join(map(str, sorted(found)))}; "
            "remove those that are not meant"
        )
        raise ConversionError(msg, path=shards)
    ((count, there),) = found.items()
    missing = sorted(set(range(count)) - there)
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        msg = (
            f"{root}: expected {count} shards, found {len(there)}; missing: {', '.join(map(str, missing[:_NAMED]))}{more}. "
            "Run their writers to the end, then commit again; nothing was published"
        )
        raise ConversionError(msg, path=root)
    return [f"{shard:05d}-of-{count:05d}" for shard in range(count)]


class _Commit:
    """One commit, while all locks are held."""

    def __init__(
        self, root: Path, names: Sequence[str], schema: Schema, check: Callable[[Sequence[TensorSpec]], None] | None
    ) -> None:
        self.root = root
        self.names = names
        self.schema = schema
        self.check = check
        self.old = current(root, schema)
        self.number = self.old.number + 1 if self.old is not None else 1
        self.target = next_directory(root, self.number)
        self.entries: dict[str, FileEntry] = {}

    def do(self) -> None:
        """Check everything that can be, then move, then publish."""
        shards = [self._opened(self.root / SHARDS / name) for name in self.names]
        self._require_alike(shards)
        config = self._config()
        self.target.mkdir()
        sync_directory(self.root)  # before anything is moved there
        try:
            for name in self.names:
                (self.root / SHARDS / name).rename(self.target / name)
            moved = [locate(self.target / name, shards[0].format, self.schema) for name in self.names]
            parts = self._parts(moved)
            # A move is on the disk when both directories are.
            for directory in (self.target, self.root / SHARDS, self.root):
                sync_directory(directory)
            before = self.old or Generation(0, moved[0].format)
            new = extended(before, self.root, parts, Manifest(self.root, self.entries), number=self.number)
            self._check(before, new)
            if config is not None and self.old is None:
                write_bytes(self.root / _CONFIG, config)
            publish(self.root, self.old if self.old is not None and self.old.number else None, new)
            self._remove_replaced(moved, new)
        except BaseException:
            if (found := read_generation(self.root)) is None or found.number != self.number:
                clean_parts(self.root)  # which puts the shards back
            raise

    def _opened(self, directory: Path) -> Located:
        manifest = read(directory)
        if manifest is None:
            msg = f"{directory}: expected a shard with its manifest, found none; write the shard again"
            raise ConversionError(msg, path=directory)
        located = locate(directory, "auto", self.schema)
        manifest.check(located.specs)
        for name, entry in manifest.files.items():
            self.entries[f"{self.target.name}/{directory.name}/{name}"] = entry
        return located

    def _require_alike(self, shards: Sequence[Located]) -> None:
        """Raise unless all shards have the same tensors, and those of the dataset."""
        first = {spec.name: spec for spec in shards[0].specs}
        for located in shards:
            found = {spec.name: spec for spec in located.specs}
            if found.keys() != first.keys():
                odd = ", ".join(sorted(found.keys() ^ first.keys()))
                msg = (
                    f"{located.root}: expected the tensors that shard 0 has, found a difference in {odd}; write one of both "
                    "shards again"
                )
                raise IntegrityError(msg, path=located.root)
            for name, spec in found.items():
                whole, other = spec.shape[1:], first[name].shape[1:]
                if (spec.dtype, whole, bool(spec.shape)) != (first[name].dtype, other, bool(first[name].shape)):
                    msg = (
                        f"{located.root}: {name!r}: expected {dtype_name(first[name].dtype)} rows of shape {list(other)}, as "
                        f"shard 0 has, found {dtype_name(spec.dtype)} of {list(whole)}; write one of both shards again"
                    )
                    raise IntegrityError(msg, path=located.root, tensor=name)
                if self.old is not None and spec.shape:
                    require_growable(self.old, name, spec.dtype, whole, located.root)
        self._require_scalars([{spec.name: spec for spec in located.specs if not spec.shape} for located in shards])

    def _require_scalars(self, shards: Sequence[Mapping[str, TensorSpec]]) -> None:
        for name in shards[0]:
            values = [torch.cat([block.reshape(1) for block in read_blocks(shard[name])]) for shard in shards]
            if any(not torch.equal(values[0], value) for value in values) or self.old is not None:
                msg = (
                    f"{self.root}: {name!r}: expected a scalar of one value in all shards, and none in what is appended to "
                    "a dataset; write it into the configuration, or as a tensor with rows"
                )
                raise IntegrityError(msg, path=self.root, tensor=name)

    def _config(self) -> bytes | None:
        """``config.json`` of the shards, which is one; ``None`` if they have none."""
        found = []
        for name in self.names:
            file = self.root / SHARDS / name / _CONFIG
            found.append(file.read_bytes() if file.is_file() else None)
            if found[-1] != found[0]:
                msg = f"{file}: expected the configuration of shard 0, found another; write one of both shards again"
                raise IntegrityError(msg, path=file)
        return found[0]

    def _parts(self, moved: Sequence[Located]) -> list[NewPart]:
        shards = [{spec.name: spec for spec in located.specs} for located in moved]
        names = [spec.name for spec in moved[0].specs]
        ragged = sorted({base_name(n) for n in names if f"{base_name(n)}.offsets" in names and n.endswith(".values")})
        rebased = [self._rebased(f"{name}.offsets", self._ends(f"{name}.values", shards), shards) for name in ragged]
        rebased += [
            self._rebased(f"{name}.order", self._ends(f"{name}.hashes", shards), shards)
            for name in sorted(text_names(moved[0].specs))
            if f"{name}.order" in names
        ]
        replaced = {part.spec.name for part in rebased}
        known = Manifest(self.root, self.entries)
        parts = [
            NewPart(spec, known.checksum(spec))
            for position, located in enumerate(moved)
            for spec in located.specs
            if spec.name not in replaced and (spec.shape or position == 0)
        ]
        return parts + rebased

    def _ends(self, name: str, shards: Sequence[Mapping[str, TensorSpec]]) -> list[int]:
        """Rows of a tensor of the dataset before the first shard, the second, and so on."""
        before = self.old.tensors[name].n_rows(self.old.number) if self.old is not None else 0
        return [before, *(before + np.cumsum([shard[name].n_rows for shard in shards])).tolist()]

    def _rebased(self, name: str, starts: Sequence[int], shards: Sequence[Mapping[str, TensorSpec]]) -> NewPart:
        """Offsets or row numbers of all shards in one file, counted from the beginning of the dataset."""
        fmt = FORMATS["npy" if shards[0][name].path.suffix == ".npy" else "safetensors"]
        file = self.target / f"{name}{fmt.suffixes[0]}"
        file.unlink(missing_ok=True)
        writer, hasher, rows = fmt.writer(file, self.schema), Hasher(), 0
        # Every shard's offsets begin with a zero; only the first of all is one of the dataset.
        zeros = [int(name.endswith(".offsets") and (i > 0 or self.old is not None)) for i in range(len(shards))]
        try:
            writer.begin(name, torch.int64, (), None)
            for shard, start, skipped in zip(shards, starts, zeros, strict=False):
                for block in read_blocks(shard[name]):
                    absolute = block[skipped:] + start
                    skipped = 0  # noqa: PLW2901 - of the first block only
                    writer.append(absolute)
                    hasher.update(absolute)
                    rows += len(absolute)
            writer.end()
            writer.close()
        except BaseException:
            writer.abort()
            raise
        sync_file(file)
        entry = TensorEntry("int64", (rows,), hasher.hexdigest())
        found = FileEntry(FileFingerprint.of(file), {name: entry})
        self.entries[f"{self.target.name}/{file.name}"] = found
        return NewPart(fmt.locate(file, self.schema)[0], entry.xxh3_128)

    def _remove_replaced(self, moved: Sequence[Located], new: Generation) -> None:
        """Remove the shards' own offsets, which were needed until now if the commit had to be run again."""
        named = set(new.files.names)
        for located in moved:
            for spec in located.specs:
                if key_of(self.root, spec.path) not in named:
                    spec.path.unlink(missing_ok=True)

    def _check(self, before: Generation, new: Generation) -> None:
        if self.check is not None:
            self.check(new.locate(self.root, self.schema, format_for))
        elif self.old is not None:
            require_alike(before, new, self.root)
