"""``pack_splits``: the samples of a dataset's splits, written as a packed dataset."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jasper_store.conversion.generations import next_directory
from jasper_store.conversion.narrow import parse_dtype
from jasper_store.conversion.staging import check_target, publish
from jasper_store.errors import IncompatibleOptionsError
from jasper_store.files.atomic import (
    make_directory,
    map_os_errors,
    recover_directory,
    remove,
    sync_directory,
    write_bytes,
)
from jasper_store.files.lock import exclusive, lock_beside
from jasper_store.formats.generation import Generation
from jasper_store.memory import budget
from jasper_store.packing.parts import part_files, parted, refuse_changes, write_parts
from jasper_store.packing.plan import Options, Work, plan
from jasper_store.packing.repack import repack
from jasper_store.samples.opened import CONFIG_NAME
from jasper_store.store.manifest import Manifest
from jasper_store.store.manifest_file import write

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from jasper_store.packing.report import PackReport
    from jasper_store.samples.dataset import Dataset

__all__ = ["pack_splits"]

_SHARE: Final = 0.5
"""Share of the free memory that packing takes where no limit is given."""
_LEAST_ROOM: Final = 8 << 20


def pack_splits(
    sources: Mapping[str, Dataset],
    dst: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 42,
    memory_limit: int | str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    overwrite: bool = False,
    columns: Sequence[str] | None = None,
    kind: str = "dataset",
    config: Mapping[str, Any] | None = None,
) -> PackReport:
    """Write samples in the order of a fixed permutation, what each reads side by side.

    Args:
        sources: the splits of one dataset, open on the host, by name; ``""`` alone for one without splits.
        dst: directory to make.
        fields: fields to pack; all by default.
        dtype: floating dtype that floating fields of more than one number a sample are narrowed to.
        seed: decides the permutation.
        memory_limit: bytes of memory to take for rows; by default half of what is free.
        progress: called as ``progress(tensor, done_bytes, total_bytes)``.
        overwrite: replace a dataset that is there.
        columns: fields of the packed dataset at ``dst`` to write anew; all others stay as they are.
        kind: what opens it, see :class:`~jasper_store.samples.packed.Packed`.
        config: what else ``config.json`` says.

    Raises:
        ConversionError: the target is there, has another writer, cannot be written, or has no room; the source changed
            meanwhile.
        UnknownNameError, IncompatibleOptionsError: options.
        IntegrityError: ``dtype`` would make a finite value infinite.
        DatasetNotFoundError, CorruptFileError: the source, or the packed dataset whose columns are written anew.
    """
    began = time.perf_counter()
    target = Path(os.path.abspath(dst))  # noqa: PTH100 - links in it are kept
    options = Options(target, fields, parse_dtype(dtype), seed, kind, config or {}, progress, overwrite)
    for name, dataset in sources.items():
        if dataset.device.type != "cpu":
            raise IncompatibleOptionsError(
                f"packing reads from the host, and {name or 'the dataset'} is on {dataset.device}; open it with device=None"
            )
    measured = budget.measure(memory_limit).nbytes
    room = max(int(measured * (_SHARE if memory_limit is None else 1)), _LEAST_ROOM)
    if columns is None:
        return _pack(sources, options, room, began)
    return repack(sources, options, columns, room, began)


def _pack(sources: Mapping[str, Dataset], options: Options, room: int, began: float) -> PackReport:
    target = options.target
    work = plan(sources, options)
    parent = target.parent
    with map_os_errors(target):
        make_directory(parent)
    with contextlib.ExitStack() as stack:
        stack.enter_context(exclusive(lock_beside(target), f"packing into {target}"))
        with map_os_errors(target):
            recover_directory(target)
            check_target(target, overwrite=options.overwrite)
            hidden = parent / f".{target.name}.packing"
            try:
                report = _pack_hidden(work, hidden, options, room, began)
            except Exception:
                # A kill, also by the keyboard, leaves it behind for the next run; what failed begins anew.
                remove(hidden)
                raise
            publish(hidden, target, overwrite=options.overwrite)
    return replace(report, path=target, seconds=time.perf_counter() - began)


def _pack_hidden(work: Work, hidden: Path, options: Options, room: int, began: float) -> PackReport:
    """Write the whole dataset into a hidden directory."""
    directory = next_directory(hidden, 1)
    report, checksums = write_parts(work, hidden, directory, options, room, began)
    refuse_changes(work, options.target)
    for left in hidden.iterdir():  # of a run that was cut later than here
        if left != directory:
            remove(left)
    _write_generation(work, hidden, directory, checksums)
    write_bytes(hidden / CONFIG_NAME, json.dumps(work.config, indent=1).encode())
    sync_directory(directory)
    sync_directory(hidden)
    return report


def _write_generation(work: Work, root: Path, directory: Path, checksums: Mapping[str, list[str]]) -> None:
    """Write the manifest of a new dataset."""
    generation = Generation(1, "safetensors", part_files(root, directory, work.layout))
    tensors = parted(work, checksums, 1, 0)
    write(Manifest(root, {}, {}, replace(generation, tensors=tensors), {}))
