"""Everything that a report shows of a dataset, gathered in the order in which looking does not change what is seen.

What is in the page cache is asked first, since all the rest reads; the checksums, which read everything, come last.
"""

from __future__ import annotations

import datetime as dt
import os
import platform
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from jasper_store.bench.serving import LoaderRate, loader_rate, quietly
from jasper_store.errors import JasperStoreError
from jasper_store.formats.base import Extent, TensorSpec
from jasper_store.formats.registry import locate
from jasper_store.jasper.api import plan, verify as verify_dataset
from jasper_store.jasper.config import Config, read_config
from jasper_store.jasper.integrity import check_structure, unread_bounds
from jasper_store.jasper.schema import NOUNS, SCHEMA, SPLITS, declaration_for, split_tensor
from jasper_store.jasper.steering import Curriculum
from jasper_store.memory.budget import format_bytes, measure
from jasper_store.paging.residency import cached_bytes
from jasper_store.report.figures import figures
from jasper_store.report.model import DatasetReport, Figures, TensorRow
from jasper_store.samples.graph import build_graph
from jasper_store.samples.integrity import check_bounds_once
from jasper_store.store.opening import open_store
from jasper_store.store.placement import Plan

__all__ = ["curriculum_by_epoch", "make_report"]

_BATCH_SIZES = (32, 256)
_EPOCHS_LOOKED_AT = 10_000
_EPOCHS_AFTER = 10

Step = Callable[[str, int, int | None], None]
"""Called as ``step(what, done, total)``; ``total`` is ``None`` where it is not known."""


def make_report(
    path: str | PathLike[str],
    *,
    storage_format: str = "auto",
    verify: bool = True,
    speed_seconds: float = 0.5,
    step: Step | None = None,
) -> DatasetReport:
    """Look at a JASPER dataset.

    Data whose tensors contradict each other has no figures: the report says why, beside the findings of verify.

    Args:
        path: dataset directory.
        storage_format: format to read.
        verify: read all data once for its checksums.
        speed_seconds: how long to measure each loader.
        step: told what is being done.

    Raises:
        DatasetNotFoundError: no such directory, or no dataset in it.
        CorruptFileError: a header that cannot be read, a configuration that is not JSON.
        IntegrityError: a configuration without its dimensions.
    """
    path, step = Path(path), step or (lambda *_: None)
    config = read_config(path)
    step("headers", 0, None)
    with quietly():
        located = locate(path, storage_format, SCHEMA)
        made = plan(path, format=storage_format)
    tensors = _rows(located.specs, made)
    step("values", 0, None)
    seen, why_not = _look(path, located.format, config)
    step("the loader", 0, None)
    speed, why_no_speed = _speed(path, located.format, located.specs, speed_seconds, why_not)
    found = None
    if verify:
        found = verify_dataset(path, progress=lambda name, done, total: step(f"checksums: {name}", done, total))
    return DatasetReport(
        path=path,
        name=str(config.values.get("dataset_name") or path.resolve().name),
        created=str(config.values.get("created_at") or ""),
        format=located.format,
        dim=config.embedding_dim,
        n_neg=config.n_neg,
        files=len({spec.path for spec in located.specs}),
        tensors=tensors,
        budget=made.budget.explain(),
        curriculum=curriculum_by_epoch(config.curriculum),
        figures=seen,
        why_no_figures=why_not,
        speed=speed,
        why_no_speed=why_no_speed,
        verification=found,
        made_at=dt.datetime.now(tz=dt.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        machine=_machine(),
    )


def curriculum_by_epoch(curriculum: Curriculum) -> tuple[tuple[float, ...], ...]:
    """Probabilities of each epoch, until some epochs after the last change."""
    probabilities = [curriculum.probabilities(epoch) for epoch in range(_EPOCHS_LOOKED_AT)]
    changes = (epoch for epoch in range(1, len(probabilities)) if probabilities[epoch] != probabilities[epoch - 1])
    last = max(changes, default=0)
    return tuple(tuple(stage) for stage in probabilities[: last + _EPOCHS_AFTER])


def _rows(specs: tuple[TensorSpec, ...], made: Plan) -> tuple[TensorRow, ...]:
    entries = {entry.name: entry for entry in made.entries}
    return tuple(
        TensorRow(
            name=spec.name,
            dtype=str(spec.dtype).removeprefix("torch."),
            shape=tuple(spec.shape),
            nbytes=spec.nbytes,
            placement=entries[spec.name].placement,
            reads_per_sample=entries[spec.name].reads_per_sample,
            reason=entries[spec.name].reason,
            resident_nbytes=_resident(spec),
        )
        for spec in specs
        if spec.name in entries
    )


def _resident(spec: TensorSpec) -> int | None:
    if not isinstance(spec.location, Extent) or not spec.contiguous:
        return None
    return cached_bytes(spec.location.path, spec.location.offset, spec.nbytes)


def _look(path: Path, storage_format: str, config: Config) -> tuple[Figures | None, str]:
    """The figures, or why there are none."""
    try:
        with (
            quietly(),
            open_store(path, format=storage_format, use_mmap=True, schema=SCHEMA) as store,
        ):
            there = [split for split in SPLITS if split_tensor(split) in store]
            sizes = check_structure(store, config, there, path)
            declaration = declaration_for(config.curriculum)
            bounds = [bound for split in there for bound in build_graph(declaration, store, split).bounds]
            check_bounds_once(store, [*bounds, *unread_bounds(store)], NOUNS)
            return figures(store, sizes), ""
    except JasperStoreError as exc:
        return None, str(exc)


def _speed(
    path: Path, storage_format: str, specs: tuple[TensorSpec, ...], seconds: float, damaged: str
) -> tuple[tuple[LoaderRate, ...], str]:
    """How fast the loader serves, mapped and as planned; or why that was not measured."""
    names = {spec.name for spec in specs}
    split = next((split for split in SPLITS if split_tensor(split) in names), None)
    if damaged or split is None:
        return (), damaged or "there is no split to serve"
    ways = (True, None) if sum(spec.nbytes for spec in specs) < min(measure().nbytes, 2 << 30) else (True,)
    try:
        rates = [
            loader_rate(path, size, split=split, storage_format=storage_format, use_mmap=use_mmap, seconds=seconds)
            for use_mmap in ways
            for size in _BATCH_SIZES
        ]
    except JasperStoreError as exc:
        return (), str(exc)
    return tuple(rates), ""


def _machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    usable = format_bytes(measure().nbytes)
    return f"{platform.system()} {platform.machine()}, {cores} cores, {usable} of memory that may be used"
