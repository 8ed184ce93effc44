"""The public functions over datasets: those of the storage layers, with the names of a JASPER dataset.

They work on any directory of tensor files, and on single files. The names only add what is known of a JASPER
dataset: HDF5 paths, rows read per sample, which files belong to it, and what its values mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from os import PathLike
from pathlib import Path

import torch

from jasper_store.conversion import converter
from jasper_store.conversion.report import ConversionReport
from jasper_store.conversion.verify import Finding, VerifyReport, Visitor, verify_files
from jasper_store.errors import DeclarationError, IncompatibleOptionsError, JasperStoreError, JasperStoreWarning
from jasper_store.files.hub import is_hub_path, local_path, require_local
from jasper_store.formats.base import Schema
from jasper_store.formats.registry import locate
from jasper_store.jasper.audit import relations, visitor
from jasper_store.jasper.config import read_config
from jasper_store.jasper.integrity import check_structure
from jasper_store.jasper.recognise import Known, is_jasper, known_at
from jasper_store.jasper.schema import SPLITS, split_tensor
from jasper_store.jasper.writing import DatasetWriter, commit, compact
from jasper_store.samples.audit import FiniteVisitor, declared_findings
from jasper_store.store import manifest_file
from jasper_store.store.guard import check_options
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
        path: a dataset directory, any directory of ``.safetensors``, ``.npy``, ``.h5`` or ``.pt`` files, a file,
            several files, or a dataset of the Hugging Face Hub as ``"hf://owner/name"`` or ``"hf://owner/name@revision"``,
            which is downloaded into huggingface_hub's cache and mapped there.
        format: ``"auto"`` (safetensors, npy, hdf5, pt, whichever is complete first) or one of them; or one that is only
            read: ``"arrow"``, ``"faiss"``, ``"bin"``, ``"npz"``, ``"pickle"``, ``"parquet"``.
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
        CorruptFileError: a file is damaged, or not the one that the manifest records.
        InsufficientMemoryError: what must be preloaded does not fit; nothing was loaded.
        HubError: a dataset of the Hub that cannot be reached.

    Example:
        >>> with js.open("data/wordnet") as store:                      # doctest: +SKIP
        ...     rows = store["source_embs"].take([5, 3, 5])
    """
    check_options(use_mmap=use_mmap, device=device, dtype=dtype, memory_limit=memory_limit)
    path = _here(path)
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
    path = _here(path)
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


def _here(path: FileOrFiles) -> FileOrFiles:
    """Where a path lies on this machine; a dataset of the Hub is downloaded."""
    return local_path(path) if isinstance(path, (str, PathLike)) else path


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
    with _quietly_opened(local_path(store_or_path)) as store:
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
    if is_hub_path(src) and dst is None:
        raise IncompatibleOptionsError(
            f"{src}: a dataset of the Hub is only read; pass dst=, the directory to convert it into"
        )
    if dst is not None:
        require_local(dst)
    src = local_path(src)
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
        schema=known_at(src).schema,
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
    path = local_path(path)
    known, unread = _known_or_why(path)
    look: Callable[[str], Visitor | None] | None = None
    if is_jasper(path):
        look = visitor
    elif known.declaration is not None:
        look = FiniteVisitor
    report = verify_files(path, schema=known.schema, visitor=look, progress=progress)
    said = {found.message for found in report.errors}  # a file that cannot be read is one finding, not two
    report.add([found for found in (*unread, *_meaning(path, known)) if found.message not in said])
    if report.ok and path.is_dir():
        manifest_file.remember_parts(locate(path.absolute(), "auto", known.schema))
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
    """A store that loads nothing, for inspection; warnings meant for training are suppressed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JasperStoreWarning)
        return open_store(path, use_mmap=True, schema=known_at(path).schema)
