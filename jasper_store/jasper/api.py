"""The public functions over datasets: the storage layers' own, handed the names of a JASPER dataset.

They work on any directory of tensor files, and on single files. The names only add what is known of a JASPER
dataset: HDF5 paths, rows read per sample, which files belong to it, and what its values mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from jasper_store.conversion import commit as committing, compact as compaction, converter, writer
from jasper_store.conversion.compact import CompactReport
from jasper_store.conversion.report import ConversionReport
from jasper_store.conversion.verify import Finding, VerifyReport, Visitor, verify_files
from jasper_store.errors import DeclarationError, JasperStoreError, JasperStoreWarning
from jasper_store.formats.base import Schema, TensorSpec
from jasper_store.formats.registry import base_name
from jasper_store.jasper.audit import relations, visitor
from jasper_store.jasper.config import read_config
from jasper_store.jasper.integrity import check_structure
from jasper_store.jasper.recognise import Known, is_jasper, known_at
from jasper_store.jasper.schema import SCHEMA, SPLITS, split_tensor
from jasper_store.samples.audit import FiniteVisitor, declared_findings
from jasper_store.samples.compiler import build_graph
from jasper_store.samples.declaration import CONFIG_KEY, Declaration
from jasper_store.store.opening import FileOrFiles, open_store, plan_store
from jasper_store.store.placement import Plan
from jasper_store.store.store import Progress, TensorStore
from jasper_store.store.warmup import WarmupReport, warm

__all__ = ["DatasetWriter", "commit", "compact", "convert", "open", "plan", "verify", "warm_up"]


def open(  # noqa: A001 (the fixed name of the library's entry: jasper_store.open)
    path: FileOrFiles,
    format: str = "auto",  # noqa: A002 (the word that users pass)
    use_mmap: bool | None = None,
    device: torch.device | str | None = None,
    memory_limit: int | str | None = None,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> TensorStore:
    """Open a dataset directory, any directory of tensor files, or one file.

    Headers are read, a plan is made against the memory that is really available, what the plan says is preloaded,
    and the rest is mapped.

    Args:
        path: a dataset directory, any directory of ``.safetensors``, ``.npy``, ``.h5`` or ``.pt`` files, a file, or
            several files.
        format: ``"auto"`` (safetensors, npy, hdf5, pt, whichever is complete first) or one of them.
        use_mmap: ``None`` plans; ``True`` maps everything; ``False`` preloads everything.
        device: ``None`` for host memory, ``"cuda"``, ``"cuda:N"``, or ``"auto"``.
        memory_limit: bytes; one more upper bound on what is preloaded.
        dtype: floating dtype that floating tensors of two or more dimensions are converted to.
        progress: called with (bytes done, bytes in all) while tensors are preloaded.

    Returns:
        A :class:`~jasper_store.store.store.TensorStore`, a mapping of names to tensors.

    Raises:
        IncompatibleOptionsError: options that are incompatible; before anything is touched.
        DatasetNotFoundError: no such path, or no tensors there.
        CorruptFileError: a file is damaged, or not the one that the manifest vouches for.
        InsufficientMemoryError: what must be preloaded does not fit; nothing was loaded.

    Example:
        >>> with js.open("data/wordnet") as store:                      # doctest: +SKIP
        ...     rows = store["source_embs"].take([5, 3, 5])
    """
    known = _known(path)
    return open_store(
        path,
        format=format,
        use_mmap=use_mmap,
        device=device,
        memory_limit=memory_limit,
        schema=known.schema,
        dtype=dtype,
        progress=progress,
        describe=known.describe,
    )


def plan(
    path: FileOrFiles,
    device: torch.device | str | None = None,
    use_mmap: bool | None = None,
    memory_limit: int | str | None = None,
    *,
    format: str = "auto",  # noqa: A002
    dtype: torch.dtype | None = None,
) -> Plan:
    """Where :func:`open` would place each tensor now, and why; reads headers only. ``str(plan)`` is a table.

    Args and errors are those of :func:`open`.
    """
    known = _known(path)
    return plan_store(
        path,
        format=format,
        use_mmap=use_mmap,
        device=device,
        memory_limit=memory_limit,
        schema=known.schema,
        dtype=dtype,
        describe=known.describe,
    )


def _known(path: FileOrFiles) -> Known:
    return known_at(Path(path)) if isinstance(path, (str, PathLike)) else Known(Schema())


def warm_up(
    store_or_path: TensorStore | str | PathLike[str],
    tensors: Collection[str] | None = None,
    budget: int | str | None = None,
    progress: Progress | None = None,
) -> WarmupReport:
    """Read tensors into the page cache, so that the first epoch runs at memory speed.

    Args:
        store_or_path: an open store, or what :func:`open` takes (then everything is mapped for the purpose).
        tensors: names to warm, in this order; by default all that are mapped, most useful first.
        budget: bytes that may be brought in; by default what the machine can hold without evicting anything.
        progress: called with (bytes done, bytes in all).

    Returns:
        A report with residency before and after, bytes and seconds.

    Raises:
        UnknownNameError: a tensor that does not exist.
        DatasetNotFoundError, CorruptFileError: as :func:`open`.
    """
    if isinstance(store_or_path, TensorStore):
        return warm(store_or_path, tensors=tensors, budget=budget, progress=progress)
    with _quietly_opened(Path(store_or_path)) as store:
        return warm(store, tensors=tensors, budget=budget, progress=progress)


def convert(
    src: str | PathLike[str],
    dst: str | PathLike[str] | None = None,
    format: str = "safetensors",  # noqa: A002
    compression: str | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    tensors: Collection[str] | None = None,
    source_format: str = "auto",
) -> ConversionReport:
    """Write a dataset, or one file, in another format: bounded memory, published whole, proven by checksums.

    Args:
        src: a dataset directory, or one file.
        dst: directory to write to; the source's own by default. For HDF5 also a file name.
        format: ``"safetensors"``, ``"npy"``, ``"hdf5"`` or ``"pt"``.
        compression: HDF5 only: ``None``, ``"gzip"``, ``"lzf"``, or a filter of hdf5plugin.
        dtype: narrow floating tensors to this dtype; the largest error is reported.
        overwrite: replace targets that hold something else.
        progress: called as ``progress(tensor, done_bytes, total_bytes)`` after each block.
        tensors: names of the tensors to convert; all by default.
        source_format: format to read where the source has its tensors in several.

    Returns:
        A report with sizes, seconds and checksums per tensor; ``str(report)`` is a table.

    Raises:
        ConversionError: no room, read-only, another conversion at work, a target that holds other values, a source
            that changed meanwhile, or values that read back differently.
        IncompatibleOptionsError, UnknownNameError: options.
        IntegrityError: ``dtype`` would make a finite value infinite.
        DatasetNotFoundError, CorruptFileError: the source.
    """
    return converter.convert(
        src,
        dst,
        format=format,
        compression=compression,
        dtype=dtype,
        overwrite=overwrite,
        progress=progress,
        tensors=tensors,
        source_format=source_format,
        schema=known_at(Path(src)).schema,
    )


def verify(path: str | PathLike[str], *, progress: Callable[[str, int, int], None] | None = None) -> VerifyReport:
    """Check a dataset: that the files hold what was written, and that the values mean what they should.

    Checksums against the manifest, shapes, index bounds; NaN, Inf and zero rows; ranges of relevance, distance and
    tiers; splits that overlap, repeat or miss pairs; positives among hard negatives; repeated negatives. Each
    tensor is read once.

    Args:
        path: a dataset directory, any directory of tensor files, or one file; of those, what applies is checked.
        progress: called as ``progress(tensor, done_bytes, total_bytes)`` after each block.

    Returns:
        A report; ``report.ok`` is False if there are errors (warnings do not count).

    Raises:
        DatasetNotFoundError: nothing there.
    """
    path = Path(path)
    known, unread = _known_or_why(path)
    look: Callable[[str], Visitor | None] | None = None
    if is_jasper(path):
        look = visitor
    elif known.declaration is not None:
        look = FiniteVisitor
    report = verify_files(path, schema=known.schema, visitor=look, progress=progress)
    said = {found.message for found in report.errors}  # a file that cannot be read is one finding, not two
    report.add([found for found in (*unread, *_meaning(path, known)) if found.message not in said])
    return report


def _known_or_why(path: Path) -> tuple[Known, list[Finding]]:
    """What is known of a dataset; nothing, and a finding, where its declaration cannot be understood."""
    try:
        return known_at(path), []
    except DeclarationError as exc:
        return Known(Schema()), [Finding("error", "dataset", "declaration", str(exc), None)]


def _meaning(path: Path, known: Known) -> list[Finding]:
    """Findings about what the tensors say of each other, read as a dataset reads them."""
    if known.declaration is None:
        return []
    try:
        if not is_jasper(path):
            with _quietly_opened(path) as store:
                return list(declared_findings(store, known.declaration))
        config = read_config(path)
        with _quietly_opened(path) as store:
            there = [split for split in SPLITS if split_tensor(split) in store]
            sizes = check_structure(store, config, there, path)
            found = list(relations(store, sizes))
            found += [
                Finding("warning", split_tensor(split), "missing split", f"there is no {split} split", None)
                for split in SPLITS
                if split not in there
            ]
            return found
    except JasperStoreError as exc:
        # The store names files absolutely; findings name them as the caller does.
        message = str(exc).replace(str(path.absolute()), str(path))
        return [Finding("error", exc.tensor or "dataset", "structure", message, None)]


def _quietly_opened(path: Path) -> TensorStore:
    """A store that loads nothing, for looking at it; what a trainer would be warned of does not matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JasperStoreWarning)
        return open_store(path, use_mmap=True, schema=known_at(path).schema)


class DatasetWriter(writer.DirectoryWriter):
    """Build a dataset larger than memory: rows appended tensor by tensor, block by block, published atomically.

    Nothing that opens is left behind by a writer that is abandoned or killed.

    ``mode="append"`` adds rows to a dataset that is there: no old byte is read or copied, :meth:`close` publishes the
    longer dataset in one step, and readers keep what they have opened. With ``shard=k, shards=n`` many processes or
    hosts write one dataset, which :func:`commit` publishes.

    Args:
        path: directory to make, or to append to.
        format: ``"safetensors"``, ``"npy"``, ``"hdf5"`` or ``"pt"``; by default the first, or that of the dataset that
            is appended to.
        compression: HDF5 only.
        config: written as ``config.json``.
        overwrite: replace a dataset that is there.
        samples: what a sample reads: ``{"fields": {...}, "splits": {...}}``, or the fields alone; written into
            ``config.json``, and checked against the tensors before anything is published.
        mode: ``"create"`` or ``"append"``.
        shard: number of the shard that is written, from 0; a writer that is run again replaces its shard.
        shards: how many shards there are.

    Raises:
        ConversionError: the target is there already, or is not there to be appended to, has another writer, cannot be
            written, or has no room.
        IntegrityError: rows of another dtype or shape than the dataset's; on closing, tensors that did not grow alike.
        DeclarationError: ``samples`` cannot be understood; on closing, that it does not fit the tensors.

    Example:
        >>> with js.DatasetWriter("out", samples={"emb": "embeddings[i]", "label": "labels[i]"}) as writer:  # doctest: +SKIP
        ...     for block in embed(texts):
        ...         writer.append("embeddings", block)
    """

    def __init__(
        self,
        path: str | PathLike[str],
        format: str | None = None,  # noqa: A002
        *,
        compression: str | None = None,
        config: dict[str, object] | None = None,
        overwrite: bool = False,
        samples: Mapping[str, Any] | None = None,
        mode: str = "create",
        shard: int | None = None,
        shards: int | None = None,
    ) -> None:
        declaration = None if samples is None else _declared(samples)
        if declaration is not None:
            config = {**(config or {}), CONFIG_KEY: declaration.to_config()}
        # The names of a declared dataset are its author's.
        schema = SCHEMA if declaration is None else None
        check = None if declaration is None else partial(_require_fit, declaration)
        if mode == "append" and config is None:
            known = known_at(Path(path))
            schema, check = known.schema, _fits(known)
        super().__init__(
            path,
            format=format,
            compression=compression,
            config=config,
            overwrite=overwrite,
            schema=schema,
            check=check,
            mode=mode,
            shard=shard,
            shards=shards,
        )


def commit(path: str | PathLike[str]) -> Path:
    """Publish the shards that ``DatasetWriter(path, shard=k, shards=n)`` wrote: nothing is visible before, all after.

    The shards' rows follow each other by their numbers, behind those of a dataset that is there. Files are moved, not
    copied. A commit that was killed is run again.

    Args:
        path: the dataset's directory.

    Returns:
        The directory.

    Raises:
        ConversionError: shards are missing, which the message names, or still being written; or there are none.
        IntegrityError: shards that do not fit each other, or the dataset.
        DeclarationError: what ``config.json`` declares does not fit the tensors.
        CorruptFileError: a shard is not the one that was written.

    Example:
        >>> with js.DatasetWriter("out", shard=rank, shards=world_size) as writer:  # doctest: +SKIP
        ...     writer.append("embeddings", embed(my_texts))
        >>> js.commit("out")  # once, when all are done  # doctest: +SKIP
    """
    known = known_at(Path(path))
    if known.declaration is None and (first := committing.first_shard(Path(path))) is not None:
        known = known_at(first)  # the configuration comes with the shards
    return committing.commit(path, schema=known.schema, check=_fits(known))


def compact(
    path: str | PathLike[str],
    *,
    remove_old: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> CompactReport:
    """Make one part of many, for each tensor of a dataset that has more than one: bounded memory, one step, proven.

    Args:
        path: the dataset's directory.
        remove_old: remove the files that only older generations have; readers that have one of these open lose it.
        progress: called as ``progress(tensor, done_bytes, total_bytes)`` after each block.

    Returns:
        A report; ``str(report)`` is for people.

    Raises:
        ConversionError: no dataset, no room, another writer, or values that read back differently.
        CorruptFileError: a part is not the one that was written.
    """
    return compaction.compact(path, remove_old=remove_old, progress=progress, schema=known_at(Path(path)).schema)


def _fits(known: Known) -> Callable[[Sequence[TensorSpec]], None] | None:
    """What a dataset that grows has to keep to, where it is known what its samples read."""
    declaration = known.declaration
    if declaration is None:
        return None
    required = known.schema.required

    def fits(specs: Sequence[TensorSpec]) -> None:
        there = {spec.name for spec in specs}
        # A JASPER dataset may lack splits, and is not one before it has the rest.
        if required <= {base_name(name) for name in there}:
            splits = {split: tensor for split, tensor in declaration.splits.items() if tensor in there}
            if splits or not declaration.splits:
                _require_fit(replace(declaration, splits=splits), specs)

    return fits


def _declared(samples: Mapping[str, Any]) -> Declaration:
    """A declaration in the form that ``config.json`` has, or its fields alone."""
    if isinstance(samples.get("fields"), Mapping):
        return Declaration.from_config({CONFIG_KEY: samples}, Path("samples=")) or Declaration.parse({})
    return Declaration.parse(samples)


def _require_fit(declaration: Declaration, specs: Sequence[TensorSpec]) -> None:
    """Refuse to publish tensors that the declaration does not fit."""
    by_name = {spec.name: spec for spec in specs}
    for split in declaration.parts:
        build_graph(declaration, by_name, split)
