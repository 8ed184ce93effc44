"""``DirectoryWriter``: a dataset larger than memory, appended block by block and published in one step."""

from __future__ import annotations

import contextlib
import os
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from jasper_store.conversion.append import Appending, check_known, check_part_options, shard_directory
from jasper_store.conversion.checksum import Hasher
from jasper_store.conversion.coerce import are_strings, as_block, as_json, flatten
from jasper_store.conversion.plan import FileTask, make_tasks
from jasper_store.conversion.staging import make_staging, publish
from jasper_store.conversion.transfer import Options, require_reference, write_file
from jasper_store.errors import ClosedError, ConversionError, IntegrityError
from jasper_store.files.atomic import (
    map_os_errors,
    remove,
    require_space,
    sync_directory,
    sync_file,
)
from jasper_store.files.fingerprint import FileFingerprint
from jasper_store.formats.base import Schema
from jasper_store.formats.files import check_name, dtype_name
from jasper_store.formats.registry import FORMATS, base_name, locate, writable
from jasper_store.formats.texts import encode, hash_block, sort_hashes
from jasper_store.store.manifest import FileEntry, Manifest, TensorEntry
from jasper_store.store.manifest_file import write as write_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from numpy.typing import NDArray
    from typing_extensions import Self

    from jasper_store.formats.base import TensorSpec
    from jasper_store.formats.protocols import FileWriter, Format

__all__ = ["DirectoryWriter"]

_SPOOL: Final = "safetensors"  # takes rows of unknown number, every dtype, and needs no second pass
_CONFIG: Final = "config.json"


@dataclass
class _Part:
    """One tensor being appended to, in its own file."""

    path: Path
    writer: FileWriter
    dtype: torch.dtype
    row_shape: tuple[int, ...] | None
    rows: int = 0
    hasher: Hasher = field(default_factory=Hasher)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what has been appended."""
        return () if self.row_shape is None else (self.rows, *self.row_shape)


class DirectoryWriter:
    """Writes a dataset block by block; nothing of it is visible before :meth:`close` has published all of it.

    Blocks may come in any order of tensors, and sizes need not be known. Memory is what the caller's block takes.
    Everything is written into a hidden directory beside the target, which takes the target's name in the end, so a
    reader finds the old dataset or the new one, never a mixture. Abandoned, or killed, it leaves nothing that opens:
    the hidden directory is removed at once, or by the next writer to the same place. HDF5 needs the number of rows
    beforehand and so takes twice the disk space until it is published.

    With ``mode="append"`` the rows come to a dataset that is there, as a part of each tensor: no old byte is read or
    changed, and :meth:`close` publishes the longer dataset in one step. Readers keep what they have opened. Tensors with
    one number of rows have to grow alike. The dataset has no other writer meanwhile.

    With ``shard`` and ``shards`` many processes or hosts write a dataset, each of them one shard; nothing is visible
    before :func:`jasper_store.conversion.commit.commit`. A writer that was killed and is run again replaces its shard.

    Use it as a context manager; an exception inside the block abandons it. Not safe for concurrent use.

    Args:
        path: directory to make, or to append to.
        format: ``"safetensors"``, ``"npy"``, ``"hdf5"`` or ``"pt"``; by default the first, or that of the dataset that
            is appended to.
        schema: names and HDF5 paths of the dataset; by default names are taken as they are.
        compression: HDF5 only, as in ``convert``.
        config: written as ``config.json``.
        overwrite: replace a dataset that is there, with everything in its directory. A directory that holds anything
            but datasets, JSON files and what this library leaves is never replaced.
        check: called by :meth:`close` with the tensors as they were written, in the hidden directory, just before it
            is published; on appending with all of the dataset's. What it raises ends the writer, and nothing is
            published.
        mode: ``"create"``, or ``"append"`` to a dataset that is there.
        shard: number of the shard that is written, from 0; with ``shards``.
        shards: how many there are.

    Raises:
        ConversionError: the target is there and ``overwrite`` is False, holds other things, cannot be written, or is
            being written by another writer; or there is nothing to append to.
        CorruptFileError: a file of the dataset that is appended to is not the one that was written.
        UnknownNameError: an unknown format, mode or compression.
        IncompatibleOptionsError: a compression that the format does not have, a config that is no JSON, or options that
            make no sense for a part of a dataset.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        format: str | None = None,  # noqa: A002 - the word that users pass
        *,
        schema: Schema | None = None,
        compression: str | None = None,
        config: dict[str, Any] | None = None,
        overwrite: bool = False,
        check: Callable[[Sequence[TensorSpec]], None] | None = None,
        mode: str = "create",
        shard: int | None = None,
        shards: int | None = None,
    ) -> None:
        writable(format or "safetensors")  # refuses a name that is not known before anything is made
        check_known("mode", mode, ("create", "append"))
        part = mode == "append" or shard is not None or shards is not None
        if part:
            check_part_options(Path(path), compression=compression, overwrite=overwrite, appends=mode, config=config)
        schema = Schema() if schema is None else schema
        self._config = None if config is None else as_json(config)
        # A link to a directory is followed: the dataset behind it is what gets replaced, not the link.
        self._root = self._target = Path(os.path.realpath(path))
        if shard is not None or shards is not None:
            self._target = shard_directory(self._root, shard, shards, append=mode == "append", schema=schema)
        self._overwrite = overwrite or self._target != self._root
        self._check = check
        self._is_part = part
        self._parts: dict[str, _Part] = {}
        # Names of ragged tensors, and of ids with the hashes of those that came.
        self._ragged: dict[str, list[NDArray[np.uint64]]] = {}
        self._ids: dict[str, list[NDArray[np.uint64]]] = {}
        self._closed = False
        self._published = False
        self._appending: Appending | None = None
        with contextlib.ExitStack() as stack:
            if mode == "append" and self._target == self._root:
                self._appending = Appending(stack, self._target, schema)
                self._staging = self._appending.staging
                format = format or self._appending.format  # noqa: A001
            else:
                self._staging = make_staging(stack, self._target, overwrite=self._overwrite)
            self._fmt: Format = writable(format or "safetensors")
            self._options = Options(self._fmt, schema, compression)
            with map_os_errors(self._target):
                # A compression that the format or this machine lacks is refused now, and not after the last block.
                probe = self._staging / "probe"
                self._fmt.writer(probe, self._options.schema, compression=self._options.compression).abort()
                probe.unlink()
            stack.callback(_abort, self._parts)
            # Runs on abandon(), when the writer is forgotten, and when the process ends in good order.
            self._release = weakref.finalize(self, _release, stack.pop_all(), os.getpid())

    @property
    def path(self) -> Path:
        """The dataset's directory."""
        return self._root

    @property
    def closed(self) -> bool:
        """Whether it was published or abandoned."""
        return self._closed

    def append(self, name: str, rows: torch.Tensor | NDArray[Any] | Sequence[Any] | float) -> None:
        """Append a block of rows to a tensor; the first block decides its dtype and the shape of its rows.

        Args:
            name: the tensor.
            rows: [n, ...] on any device, a scalar (once), or strings, which go to :meth:`append_ids`.

        Raises:
            IntegrityError: another dtype or row shape than before, or a second block of a scalar; nothing was written.
            IncompatibleOptionsError: a name that cannot be a file name, or a dtype that the format cannot hold.
            ConversionError: the disk is full, or the system refused otherwise; the writer is abandoned.
            ClosedError: it was published or abandoned.
        """
        if are_strings(rows):
            self.append_ids(name, rows)  # type: ignore[arg-type]
            return
        self._check_open()
        self._check_kind(name, "append()")
        if self._appending is not None:
            self._appending.require_plain(name)
        self._append(name, as_block(name, rows))

    def append_ragged(self, name: str, rows: Sequence[Sequence[int] | torch.Tensor]) -> None:
        """Append rows of different lengths to a ragged tensor of ints.

        Args:
            name: base name of the tensor; it is stored as ``name.values`` and ``name.offsets``, in ``.pt`` as a list
                of lists.
            rows: one sequence of ints per row; they may be empty.

        Raises:
            IntegrityError, IncompatibleOptionsError, ConversionError, ClosedError: as :meth:`append`.
        """
        self._check_open()
        self._check_kind(name, "append_ragged()")
        self._append_rows(name, *flatten(name, rows), self._ragged)

    def append_ids(self, name: str, rows: Sequence[str] | NDArray[Any]) -> None:
        """Append strings: ids of the rows of other tensors, which ``store.ids(name)`` finds rows by.

        They are stored as UTF-8, ``name.values`` and ``name.offsets``, with sorted hashes, ``name.hashes`` and
        ``name.order``. Memory is 8 bytes for each id until :meth:`close`, which takes 32 for sorting.

        Args:
            name: base name.
            rows: strings; an id that is there twice can be written, and then not be looked up.

        Raises:
            IntegrityError: what is no string, or cannot be UTF-8; names its position in ``rows``. Nothing was written.
            IncompatibleOptionsError, ConversionError, ClosedError: as :meth:`append`.
        """
        self._check_open()
        self._check_kind(name, "append_ids()")
        values, lengths = encode(name, rows.tolist() if isinstance(rows, np.ndarray) else rows)
        self._append_rows(name, torch.from_numpy(values.copy()), torch.from_numpy(lengths), self._ids)
        self._ids[name].append(hash_block(values, lengths))

    def _check_kind(self, name: str, called: str) -> None:
        """Refuse rows of another kind than those that were appended to a tensor before."""
        base = base_name(name)
        known = {"append_ragged()": self._ragged, "append_ids()": self._ids}
        before = next((kind for kind, names in known.items() if name in names or base in names), None)
        if before is None and (name in self._parts or f"{name}.values" in self._parts):
            before = "append()"
        if before not in {None, called}:
            msg = f"{name!r}: expected rows through {before}, as before, found {called}; the two cannot mix"
            raise IntegrityError(msg, tensor=name)

    def _append_rows(
        self, name: str, values: torch.Tensor, lengths: torch.Tensor, known: dict[str, list[NDArray[np.uint64]]]
    ) -> None:
        """Append rows of different lengths: their values one after another, and where each row ends."""
        before = self._appending.n_rows(f"{name}.values") if self._appending is not None else 0
        if name not in known:
            check_name(name)
            if self._appending is not None:
                self._appending.require_ragged(name, values.dtype)
            known[name] = []
            self._append(f"{name}.values", torch.empty(0, dtype=values.dtype))
            # Offsets of an appended part begin where the old ones end, which is the end of the values there are.
            self._append(f"{name}.offsets", torch.zeros(int(self._appending is None), dtype=torch.int64))
        offsets = lengths.cumsum(0) + (before + self._parts[f"{name}.values"].rows)
        self._append(f"{name}.values", values)
        self._append(f"{name}.offsets", offsets)

    def _append_hashes(self) -> None:
        """Write the sorted hashes of all ids."""
        for name, blocks in self._ids.items():
            hashes, order = sort_hashes(blocks)
            blocks.clear()
            before = self._appending.n_rows(f"{name}.hashes") if self._appending is not None else 0
            self._append(f"{name}.hashes", torch.from_numpy(hashes))
            self._append(f"{name}.order", torch.from_numpy(order) + before)

    def _append(self, name: str, block: torch.Tensor) -> None:
        block = block.detach().cpu()
        part = self._parts.get(name)
        row_shape = tuple(block.shape[1:]) if block.ndim else None
        if part is not None and (part.row_shape is None or (part.dtype, part.row_shape) != (block.dtype, row_shape)):
            expected = "one block only" if part.row_shape is None else f"{part.dtype} [n, {_sizes(part.row_shape)}]"
            msg = f"{name!r}: expected {expected}, as it began, found {block.dtype} {list(block.shape)}; nothing was written"
            raise IntegrityError(msg, tensor=name)
        if part is None:
            part = self._begin(name, block.dtype, row_shape)
        with self._abandoned_on_failure():
            part.writer.append(block)
            part.hasher.update(block)
            part.rows += len(block) if block.ndim else 1

    def _begin(self, name: str, dtype: torch.dtype, row_shape: tuple[int, ...] | None) -> _Part:
        check_name(name)
        if self._appending is not None:
            self._appending.require(name, dtype, row_shape)
        # A part holds runs of rows, so no list of lists.
        lists = not self._is_part and self._fmt.name == "pt" and base_name(name) in self._ragged
        spooled = self._fmt.one_file is not None or lists
        rows = 1 if row_shape is None else None
        try:
            with map_os_errors(self._target):
                if not spooled:
                    path = self._staging / f"{name}{self._fmt.suffixes[0]}"
                    writer = self._started(self._fmt, path, name, dtype, row_shape, rows)
                else:
                    # What the format cannot hold is refused now, and not after the last block.
                    probe = self._spool / "probe"
                    self._spool.mkdir(exist_ok=True)
                    self._started(self._fmt, probe, name, dtype, row_shape, rows or 0).abort()
                    probe.unlink()
                    path = self._spool / f"{name}{FORMATS[_SPOOL].suffixes[0]}"
                    writer = self._started(FORMATS[_SPOOL], path, name, dtype, row_shape, rows)
        except ConversionError:
            self.abandon()
            raise
        self._parts[name] = _Part(path, writer, dtype, row_shape)
        return self._parts[name]

    def _started(
        self,
        fmt: Format,
        path: Path,
        name: str,
        dtype: torch.dtype,
        row_shape: tuple[int, ...] | None,
        rows: int | None,
    ) -> FileWriter:
        """A writer of ``path`` with its tensor begun; nothing is left where that is refused."""
        writer = fmt.writer(path, self._options.schema)
        try:
            writer.begin(name, dtype, row_shape, rows)
        except BaseException:
            writer.abort()
            path.unlink()
            raise
        return writer

    @property
    def _spool(self) -> Path:
        return self._staging / ".spool"

    # ---- the end

    def close(self) -> Path:
        """Publish the dataset with its manifest; does nothing if it was published before.

        Returns:
            The directory.

        Raises:
            ConversionError: nothing was appended, no room, or the system refused; nothing was published.
            ClosedError: it was abandoned.
            Exception: what ``check`` raised; nothing was published.
        """
        if self._published:
            return self._root
        self._check_open()
        with self._abandoned_on_failure():
            if not self._parts:
                msg = f"{self._target}: expected at least one tensor before close(), found none; nothing was published"
                raise ConversionError(msg, path=self._target)
            self._append_hashes()
            for part in self._parts.values():
                part.writer.end()
                part.writer.close()
            files = self._finish_files()
            if self._appending is None:
                if self._config is not None:
                    (self._staging / _CONFIG).write_text(self._config, encoding="utf-8")
                write_manifest(Manifest(self._staging, files))
            for file in self._staging.iterdir():
                sync_file(file)
            sync_directory(self._staging)
            if self._appending is not None:
                self._appending.publish(self._fmt.name, files, self._check)
            else:
                if self._check is not None and self._target == self._root:
                    self._check(locate(self._staging, self._fmt.name, self._options.schema).specs)
                publish(self._staging, self._target, overwrite=self._overwrite)
            self._published = True
        self._end()
        return self._root

    def _finish_files(self) -> dict[str, FileEntry]:
        """Turn spooled tensors into the files of the format, and describe every file."""
        entries: dict[str, FileEntry] = {}
        spooled: list[str] = []
        for name, part in self._parts.items():
            if part.path.parent != self._staging:
                spooled.append(name)
                continue
            require_reference(self._fmt, part.path, self._target / part.path.name)
            tensor = TensorEntry(dtype_name(part.dtype), part.shape, part.hasher.hexdigest())
            entries[part.path.name] = FileEntry(FileFingerprint.of(part.path), {name: tensor})
        if spooled:
            specs = [FORMATS[_SPOOL].locate(self._parts[name].path, self._options.schema)[0] for name in spooled]
            tasks = make_tasks(specs, self._staging, None, self._fmt)
            needed = sum(task.needed(None) for task in tasks)
            require_space(self._staging, needed, what=f"building {self._fmt.name} files beside the spooled tensors")
            for task in tasks:
                entries[task.target.name] = self._build(task)
            remove(self._spool)
        return entries

    def _build(self, task: FileTask) -> FileEntry:
        tensors = {}
        for item in write_file(task, task.target, self._options):
            part = self._parts[item.spec.name]
            if item.checksum != part.hasher.hexdigest():
                msg = (
                    f"{item.spec.name}: the values read back from the hidden directory are not those appended; nothing "
                    "was published. The disk or the memory is faulty: check both, and write it again"
                )
                raise ConversionError(msg, path=self._target, tensor=item.spec.name)
            tensors[item.spec.name] = TensorEntry(dtype_name(part.dtype), part.shape, item.checksum)
        return FileEntry(FileFingerprint.of(task.target), tensors)

    def abandon(self) -> None:
        """Give up: everything written is removed. Does nothing after it was published or abandoned."""
        if not self._closed:
            self._end()

    def _end(self) -> None:
        self._closed = True
        self._release()
        self._parts.clear()

    @contextlib.contextmanager
    def _abandoned_on_failure(self) -> Iterator[None]:
        """A block that was half written cannot be taken back, so a failure ends the writer."""
        try:
            with map_os_errors(self._target):
                yield
        except BaseException:
            self.abandon()
            raise

    def _check_open(self) -> None:
        if self._closed:
            done = "published" if self._published else "abandoned"
            msg = f"{self._target}: this writer was {done}; make a new one to write more"
            raise ClosedError(msg, path=self._target)

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abandon()
        elif not self._closed:
            self.close()


def _abort(parts: dict[str, _Part]) -> None:
    for part in parts.values():
        part.writer.abort()


def _release(stack: contextlib.ExitStack, owner: int) -> None:
    """Remove the hidden directory and free the lock; not from a forked child, which merely inherited the writer."""
    if os.getpid() == owner:
        stack.close()


def _sizes(row_shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, row_shape))
