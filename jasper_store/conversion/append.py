"""Where a writer puts its files: a separate directory, the next part of a dataset, or one shard of many."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Final

import torch

from jasper_store.conversion.generations import (
    NewPart,
    current,
    extended,
    next_directory,
    publish,
    require_alike,
    require_growable,
    stray_directories,
)
from jasper_store.errors import ConversionError, IncompatibleOptionsError, IntegrityError, UnknownNameError
from jasper_store.files.atomic import clean_stale, map_os_errors, remove, sync_directory, temporary_name
from jasper_store.files.lock import LOCK_NAME, exclusive, remove_stale
from jasper_store.formats.generation import SHARDS, read_generation
from jasper_store.formats.registry import FORMATS, base_name, format_for, locate
from jasper_store.store.manifest import Manifest
from jasper_store.store.manifest_file import MANIFEST_LOCK

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    from jasper_store.formats.base import FormatName, Schema, TensorSpec
    from jasper_store.store.manifest import FileEntry

__all__ = ["SHARD_NAME", "Appending", "check_known", "check_part_options", "clean_parts", "shard_directory"]

SHARD_NAME: Final = re.compile(r"(?P<shard>\d{5,})-of-(?P<shards>\d{5,})")


class Appending:
    """A dataset that is being appended to: locked, with a hidden directory for the files that come.

    Attributes:
        staging: the hidden directory.
        format: format of the dataset.
    """

    def __init__(self, stack: contextlib.ExitStack, root: Path, schema: Schema) -> None:
        """Lock the dataset and make the hidden directory; the stack undoes both.

        Raises:
            ConversionError: there is no dataset, it has another writer, or it cannot be written.
            CorruptFileError: a file of it is not the one that was written.
        """
        self._root = root
        self._schema = schema
        if not root.is_dir():
            msg = f"{root}: expected a dataset to append to, found no directory; write it first, without mode='append'"
            raise ConversionError(msg, path=root)
        stack.enter_context(exclusive(root / LOCK_NAME, f"appending to {root}"))
        with map_os_errors(root):
            old = current(root, schema)
            if old is None:
                msg = (
                    f"{root}: expected a dataset to append to, found no tensors; write it first, without mode='append'"
                )
                raise ConversionError(msg, path=root)
            self._old = old
            clean_parts(root)
            self._target = next_directory(root, old.number + 1)
            self.staging = temporary_name(self._target, "staging")
            stack.callback(remove, self.staging)
            self.staging.mkdir()

    @property
    def format(self) -> FormatName:
        """Format of the dataset; the first one if that is only read, since parts may be of any."""
        return self._old.format if self._old.format in FORMATS else "safetensors"

    def require(self, name: str, dtype: torch.dtype, row_shape: tuple[int, ...] | None) -> None:
        """Check that such rows may be appended; see :func:`generations.require_growable`."""
        require_growable(self._old, name, dtype, row_shape, self._root)

    def n_rows(self, name: str) -> int:
        """Rows that a tensor has so far; 0 if it is not in parts."""
        tensor = self._old.tensors.get(name)
        return tensor.n_rows(self._old.number) if tensor is not None else 0

    def require_plain(self, name: str) -> None:
        """Refuse rows of the values or offsets of a ragged tensor that come one without the other.

        Raises:
            IntegrityError: the tensor is one of these.
        """
        base = base_name(name)
        if base != name and self.n_rows(f"{base}.offsets"):
            msg = f"{name!r}: expected rows of {base!r} through append_ragged(), since it is ragged, found append()"
            raise IntegrityError(msg, tensor=name)

    def require_ragged(self, name: str, dtype: torch.dtype) -> None:
        """Check that rows of such values may be appended to a ragged tensor; as :meth:`require`."""
        self.require(f"{name}.values", dtype, ())
        self.require(f"{name}.offsets", torch.int64, ())

    def publish(
        self,
        fmt: FormatName,
        entries: Mapping[str, FileEntry],
        check: Callable[[Sequence[TensorSpec]], None] | None,
    ) -> None:
        """Give the hidden directory its name, and publish the generation that has its parts.

        Args:
            fmt: format of the files.
            entries: of each file by its name.
            check: called with all tensors as they will be; by default tensors with one number of rows must grow alike.

        Raises:
            IntegrityError: tensors did not grow alike.
            ConversionError: the system refused; nothing was published.
        """
        number = self._old.number + 1
        self.staging.rename(self._target)
        try:
            sync_directory(self._root)
            manifest = Manifest(self._root, {f"{self._target.name}/{name}": entry for name, entry in entries.items()})
            specs = locate(self._target, fmt, self._schema).specs
            parts = [NewPart(spec, manifest.checksum(spec)) for spec in specs]
            new = extended(self._old, self._root, parts, manifest, number=number)
            if check is None:
                require_alike(self._old, new, self._root)
            else:
                check(new.locate(self._root, self._schema, format_for))
            publish(self._root, self._old if self._old.number else None, new)
        except BaseException:
            # Named by no manifest, so nothing is lost; a kill here leaves it to the next writer.
            if (found := read_generation(self._root)) is None or found.number != number:
                remove(self._target)
            raise


def clean_parts(root: Path) -> None:
    """Remove what writers left that were killed; the caller holds the directory's lock.

    Shards that a commit had moved before it was killed go back to where they were written.

    Raises:
        OSError: it cannot be removed.
        CorruptFileError: the manifest cannot be understood.
    """
    clean_stale(root)
    remove_stale(root / MANIFEST_LOCK)
    for path in stray_directories(root, read_generation(root)):
        for shard in sorted(path.iterdir()):
            if SHARD_NAME.fullmatch(shard.name) and not (root / SHARDS / shard.name).exists():
                (root / SHARDS).mkdir(exist_ok=True)
                shard.rename(root / SHARDS / shard.name)
        sync_directory(root / SHARDS if (root / SHARDS).is_dir() else root)
        remove(path)


def check_known(option: str, value: str, known: Collection[str]) -> None:
    """Raise UnknownNameError unless an option has one of the known values."""
    if value not in known:
        msg = f"{option}={value!r}: expected one of {', '.join(map(repr, known))}"
        raise UnknownNameError(msg)


def check_part_options(path: Path, *, compression: object, overwrite: bool, appends: str, config: object) -> None:
    """Raise IncompatibleOptionsError on options that make no sense where a part of a dataset is written."""
    if compression is not None:
        msg = f"compression={compression!r}: parts hold uncompressed rows, so that they can be mapped; leave it out"
    elif overwrite:
        msg = "overwrite=True: parts are added to a dataset, and a shard replaces itself; leave it out"
    elif config is not None and appends == "append":
        msg = "config=, samples=: the dataset that is appended to has its own; leave them out, or edit its config.json"
    else:
        return
    raise IncompatibleOptionsError(msg, path=path)


def shard_directory(root: Path, shard: int | None, shards: int | None, *, append: bool, schema: Schema) -> Path:
    """Where a shard is written until it is committed.

    Raises:
        IncompatibleOptionsError: numbers that make no sense.
        ConversionError: there is a dataset already, and it is not appended to; or there is none to append to.
    """
    if shard is None or shards is None or not 0 <= shard < shards:
        msg = f"shard={shard!r}, shards={shards!r}: expected both, with shard from 0 to shards - 1"
        raise IncompatibleOptionsError(msg, path=root)
    there = root.is_dir() and current(root, schema) is not None
    if there and not append:
        msg = (
            f"{root}: expected no dataset where shards are written, found one; name another directory, or pass "
            "mode='append' to add the shards to it"
        )
        raise ConversionError(msg, path=root)
    if append and not there:
        msg = f"{root}: expected a dataset to append to, found none; leave out mode='append'"
        raise ConversionError(msg, path=root)
    return root / SHARDS / f"{shard:05d}-of-{shards:05d}"
