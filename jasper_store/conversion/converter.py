"""``convert``: a dataset in another format, in bounded memory, published whole, proven, and resumable."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from jasper_store.conversion.narrow import parse_dtype
from jasper_store.conversion.plan import SourceFacts, find_sources, make_tasks, select, target_of
from jasper_store.conversion.run import Run, finish_interrupted
from jasper_store.conversion.transfer import Options
from jasper_store.files.atomic import clean_stale, map_os_errors
from jasper_store.files.lock import LOCK_NAME, exclusive, remove_stale
from jasper_store.formats.base import Schema
from jasper_store.formats.registry import writable
from jasper_store.memory import budget
from jasper_store.store.manifest_file import MANIFEST_LOCK

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Iterator

    import torch

    from jasper_store.conversion.report import ConversionReport

__all__ = ["convert", "finish_interrupted"]


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str] | None = None,
    format: str = "safetensors",  # noqa: A002 - the word that users pass
    compression: str | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    tensors: Collection[str] | None = None,
    source_format: str = "auto",
    schema: Schema | None = None,
) -> ConversionReport:
    """Write a dataset, or one file, in another format.

    Takes a few blocks of memory whatever the size, and never executes what a file contains. A second run skips
    the tensors whose target already holds the right values. Readers that have old files open keep them.

    Args:
        src: a dataset directory, or one file.
        dst: directory to write to, made if it is not there; the source's own directory by default. For HDF5 also a
            file name. Other ``*.json`` files of the source's directory are copied along.
        format: ``"safetensors"``, ``"npy"``, ``"hdf5"`` or ``"pt"``.
        compression: HDF5 only: ``None``, ``"gzip"``, ``"lzf"``, or a filter of hdf5plugin.
        dtype: narrow floating tensors to this dtype (``"float16"``, ``"bfloat16"``, ``"float32"``); the largest error
            is reported. ``None`` keeps every value bit by bit.
        overwrite: replace targets that hold something else. With ``tensors``, other tensors of an HDF5 file stay.
        progress: called as ``progress(tensor, done_bytes, total_bytes)``, both of the whole conversion, after each
            block. What it raises ends the conversion.
        tensors: names of the tensors to convert, ragged ones by their base name; all by default.
        source_format: format to read where the source has its tensors in several.
        schema: names and HDF5 paths of a dataset; by default names are taken as they are.

    Raises:
        ConversionError: no room, read-only, another conversion is writing there, a target holds other values and
            ``overwrite`` is False, the source changed meanwhile, or the values read back are not those written.
        IncompatibleOptionsError: source and destination are the same file, or options that are incompatible.
        IntegrityError: ``dtype`` would make a finite value infinite.
        DatasetNotFoundError, CorruptFileError: the source cannot be read.
        UnknownNameError: an unknown format, dtype, compression or tensor.
    """
    started = time.perf_counter()
    schema = Schema() if schema is None else schema
    fmt, wanted_dtype = writable(format), parse_dtype(dtype)
    src = Path(src)
    directory, one_file = target_of(src, None if dst is None else Path(dst), fmt)
    sources = find_sources(src, directory, fmt, source_format, schema)
    specs = select(sources.specs, tensors)
    facts = SourceFacts({path for spec in specs for path in spec.paths})
    tasks = make_tasks(specs, directory, one_file, fmt)
    moved = sum(spec.nbytes for spec in specs) * 2
    options = Options(fmt, schema, compression, wanted_dtype, drop=moved > budget.measure().nbytes // 2)
    with _made(directory), exclusive(directory / LOCK_NAME, f"converting into {directory}"):
        finish_interrupted(directory)
        clean_stale(directory)
        remove_stale(directory / MANIFEST_LOCK)
        run = Run(src, directory, tasks, options, facts, progress, overwrite=overwrite, part=tensors is not None)
        run.do()
    return run.report(sources, time.perf_counter() - started)


@contextlib.contextmanager
def _made(directory: Path) -> Iterator[None]:
    """Make a directory and its parents; those made are removed again if nothing came to lie in them."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    with map_os_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):  # not empty: finished tensors are kept for the next run
                path.rmdir()
        raise
