"""``pack``: the samples of a dataset written in the order in which they are served."""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jasper_store.errors import DatasetNotFoundError, JasperStoreWarning, UnknownNameError
from jasper_store.files.hub import local_path, require_local
from jasper_store.formats.registry import locate
from jasper_store.jasper.config import read_config
from jasper_store.jasper.dataset import JASPERSteeringDataset
from jasper_store.jasper.integrity import require_structure
from jasper_store.jasper.recognise import PACKED_KIND, is_jasper, is_packed_jasper, known_at
from jasper_store.jasper.schema import SCHEMA, SPLITS
from jasper_store.loading.estimate import estimates, packed_nbytes
from jasper_store.memory import budget
from jasper_store.packing.pack import pack_splits
from jasper_store.samples.compiler import build_graph
from jasper_store.samples.dataset import Dataset
from jasper_store.samples.declaration import CONFIG_KEY
from jasper_store.samples.expression import closest
from jasper_store.samples.opened import CONFIG_NAME, declaration_at, load_config, open_dataset
from jasper_store.samples.packed import PACKED_KEY

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from jasper_store.formats.base import TensorSpec
    from jasper_store.loading.estimate import DiskRates, Estimate
    from jasper_store.packing.report import PackReport
    from jasper_store.store.placement import Plan

__all__ = ["orders_at", "pack"]

_PRELOADED_SHARE = 8
"""The part of the memory that tensors of the source are preloaded to, index tensors first: one eighth."""


def pack(
    dataset: str | os.PathLike[str] | Dataset,
    dst: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 42,
    memory_limit: int | str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    overwrite: bool = False,
    splits: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> PackReport:
    """Write what each sample reads side by side, in the order of a fixed permutation, for data larger than memory.

    The result is a dataset: :class:`JASPERSteeringDataset` opens what was packed from one, :class:`Dataset` everything
    else. It serves the same samples, of the same seed and epoch the same variants; only their order is another one. A
    loader reads it in long runs, block by block. Takes bounded memory, whatever the size. Published whole; a run that was
    killed is continued by the next one with the same arguments.

    Args:
        dataset: a directory or ``"hf://owner/name"``, all of whose splits are packed, or an open dataset, whose split is
            packed.
        dst: directory to make.
        fields: names of the fields to pack; all by default.
        dtype: ``"float16"`` or ``"bfloat16"``: what floating fields of more than one number a sample are narrowed to.
        seed: decides the permutation. Draws and shuffles have seeds of their own.
        memory_limit: bytes that rows may take, or a text such as ``"2GiB"``; by default half of the memory that is free.
        progress: called as ``progress(tensor, done_bytes, total_bytes)``.
        overwrite: replace a dataset that is there.
        splits: names of the splits to pack, of a directory; all by default.
        columns: fields of the packed dataset at ``dst`` that are written anew from the source, for example new negatives.
            The rest stays as it is; readers keep what they have open.

    Returns:
        A report; ``str(report)`` is for people.

    Raises:
        ConversionError: the target is there, has another writer, cannot be written, or has no room; the source changed
            meanwhile; with ``columns`` a source with other samples than those that were packed.
        UnknownNameError, IncompatibleOptionsError: fields, splits or a dtype that do not exist or make no sense.
        IntegrityError: ``dtype`` would make a finite value infinite.
        DatasetNotFoundError, CorruptFileError, DeclarationError: the source.

    Example:
        >>> js.pack("data/wordnet", "data/wordnet-packed", dtype="float16")      # doctest: +SKIP
        >>> loader = js.create_loader("data/wordnet-packed", "train", 256)       # doctest: +SKIP
    """
    require_local(dst)
    options: dict[str, Any] = {
        "fields": fields,
        "dtype": dtype,
        "seed": seed,
        "memory_limit": memory_limit,
        "progress": progress,
        "overwrite": overwrite,
        "columns": columns,
    }
    if isinstance(dataset, Dataset):
        jasper = isinstance(dataset, JASPERSteeringDataset)
        config: dict[str, Any] = _config_of(dataset) if jasper else _rest_of(dataset.dataset_dir)
        sources: dict[str, Dataset] = {dataset.split or "": dataset}
        return pack_splits(sources, dst, kind=PACKED_KIND if jasper else "dataset", config=config, **options)
    path = local_path(dataset)
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore", JasperStoreWarning)  # meant for training
        limit = budget.measure(memory_limit).nbytes // _PRELOADED_SHARE
        if is_jasper(path) or is_packed_jasper(path):
            found: Mapping[str, Dataset] = _jasper_splits(path, splits, limit)
            config, kind = _config_of(next(iter(found.values()))), PACKED_KIND
        else:
            found, config, kind = _splits(path, splits, limit), _rest_of(path), "dataset"
        for each in found.values():
            stack.callback(each.close)
        return pack_splits(found, dst, kind=kind, config=config, **options)


def orders_at(path: Path, specs: Sequence[TensorSpec], made: Plan, disk: DiskRates | None = None) -> list[Estimate]:
    """What each order of a directory's samples allows, the fastest first, and what packing them would.

    Args:
        path: the directory.
        specs: its tensors.
        made: where they would live.
        disk: what its disk gives; typical figures by default.

    Returns:
        None of them where no sample would be read from the disk, the samples are packed, or nothing is declared.
    """
    known = known_at(path)
    mapped = sum(each.nbytes for each in made.entries if each.placement == "mmap" and each.reads_per_sample > 0)
    if known.declaration is None or known.packed is not None:
        return []
    if mapped <= max(made.budget.nbytes - made.preloaded_nbytes, 0):
        return []
    by_name = {spec.name: spec for spec in specs}
    there = [split for split, name in known.declaration.splits.items() if name in by_name]
    splits: Sequence[str | None] = there or [None]
    graphs = [build_graph(known.declaration, by_name, split) for split in splits]
    largest = max(graphs, key=lambda graph: graph.length)
    found = estimates(largest, made, disk)
    total = math.ceil(sum(packed_nbytes(graph) * graph.length for graph in graphs))
    return [replace(each, total_nbytes=total) if each.order == "packed" else each for each in found]


def _jasper_splits(path: Path, asked: Sequence[str] | None, limit: int) -> dict[str, JASPERSteeringDataset]:
    if is_packed_jasper(path):
        declared = declaration_at(path)
        there = [split for split in SPLITS if declared is not None and split in declared.splits]
    else:
        specs = {spec.name: spec for spec in locate(path, "auto", SCHEMA).specs}
        there = list(require_structure(specs, read_config(path), path))
    wanted = [split for split in there if split in _chosen(asked, there)]
    return JASPERSteeringDataset.open_splits(path, wanted, memory_limit=limit)


def _splits(path: Path, asked: Sequence[str] | None, limit: int) -> dict[str, Dataset]:
    """The splits of any other dataset, over one store."""
    declaration = declaration_at(path)
    parts = [None] if declaration is None else declaration.parts
    if parts == [None]:
        if asked is not None:
            raise UnknownNameError(f"splits={list(asked)}: {path} declares no splits; leave it out")
        return {"": Dataset.over(open_dataset(path, declaration, [None], memory_limit=limit), None)}
    wanted = [split for split in parts if split in _chosen(asked, [split for split in parts if split is not None])]
    opened = open_dataset(path, declaration, wanted, memory_limit=limit)
    return {split: Dataset.over(opened, split) for split in wanted if split is not None}


def _chosen(asked: Sequence[str] | None, there: Sequence[str]) -> Sequence[str]:
    """The splits to pack.

    Raises:
        UnknownNameError: a split that is not there.
        DatasetNotFoundError: none is asked for.
    """
    if asked is None:
        return there
    for split in asked:
        if split not in there:
            raise UnknownNameError(f"unknown split {split!r}; {closest(split, there)}")
    if not asked:
        raise DatasetNotFoundError("splits: expected at least one split to pack, found none")
    return asked


def _config_of(dataset: Any) -> dict[str, Any]:
    """What the configuration of a JASPER dataset says, and the number of its clusters, which the tensors say no more."""
    values = dataset.config
    values.pop(CONFIG_KEY, None)
    values.pop(PACKED_KEY, None)
    return {**values, "n_clusters": dataset.n_clusters}


def _rest_of(path: Path) -> dict[str, Any]:
    """What a configuration says beside what samples read."""
    file = (path if path.is_dir() else path.parent) / CONFIG_NAME
    values = dict(load_config(file)) if file.is_file() else {}
    return {name: value for name, value in values.items() if name not in {CONFIG_KEY, PACKED_KEY}}
