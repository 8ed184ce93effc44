"""Everything that a report shows of a dataset, gathered in the order in which looking does not change what is seen.

What is in the page cache is asked first, since all the rest reads; the checksums, which read everything, come last.
"""

from __future__ import annotations

import datetime as dt
import os
import platform
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from jasper_store.bench.serving import LoaderRate, loader_rate, quietly
from jasper_store.conversion.verify import VerifyReport
from jasper_store.errors import DeclarationError, JasperStoreError
from jasper_store.files.hub import local_path
from jasper_store.formats.base import Schema, TensorSpec
from jasper_store.formats.registry import Located, locate
from jasper_store.jasper.api import verify as verify_dataset
from jasper_store.jasper.recognise import Known, is_jasper, known_at
from jasper_store.memory.budget import format_bytes, measure
from jasper_store.memory.sizes import nbytes_of
from jasper_store.report.jasper import look_at_jasper
from jasper_store.report.model import DatasetReport, TensorRow
from jasper_store.report.parts import look_at_parts
from jasper_store.report.sample import SampleView, look_at_samples
from jasper_store.samples.dataset import Dataset
from jasper_store.samples.declaration import CONFIG_KEY
from jasper_store.samples.integrity import unrecorded
from jasper_store.samples.opened import CONFIG_NAME, load_config
from jasper_store.store.opening import plan_store
from jasper_store.store.placement import Plan
from jasper_store.store.tensors import resident_nbytes

__all__ = ["make_report"]

_BATCH_SIZES = (32, 256)
_MOST_PRELOADED = 2 << 30  # bytes; more would take longer to preload than the page is worth

Step = Callable[[str, int, int | None], None]
"""Called as ``step(what, done, total)``; ``total`` is ``None`` where it is not known."""


def make_report(
    path: str | PathLike[str],
    *,
    storage_format: str = "auto",
    verify: bool = True,
    memory_limit: int | str | None = None,
    speed_seconds: float = 0.5,
    step: Step | None = None,
) -> DatasetReport:
    """Look at a dataset: of JASPER, of one that declares its samples, or of any tensors. Writes nothing beside it.

    Where tensors contradict each other, or the declaration does not fit them, the report says so instead of what
    cannot be shown, and among the findings of verify.

    Args:
        path: dataset directory, or one file.
        storage_format: format to read.
        verify: read all data once for its checksums.
        memory_limit: upper bound on what may be preloaded: bytes, or a text such as ``"8GiB"``.
        speed_seconds: how long to measure each loader; 0 measures none.
        step: told what is being done.

    Raises:
        DatasetNotFoundError: no such path, or no tensors there.
        CorruptFileError: a header that cannot be read, a configuration that is not JSON.
        IntegrityError: a JASPER configuration without its dimensions.
    """
    with unrecorded():
        return _look(
            local_path(path), storage_format, memory_limit, speed_seconds, step or (lambda *_: None), verify=verify
        )


def _look(
    path: Path, storage_format: str, memory_limit: int | str | None, speed_seconds: float, step: Step, *, verify: bool
) -> DatasetReport:
    step("headers", 0, None)
    known, problem = _known(path)
    with quietly():
        located = locate(path, storage_format, known.schema)
        made = plan_store(
            path, format=storage_format, schema=known.schema, describe=known.describe, memory_limit=memory_limit
        )
    facts, declares = _facts(path, located, made), CONFIG_KEY in _config(path)
    samples, problem = (None, problem) if problem else _samples(path, located.specs)
    step("values", 0, None)
    jasper = look_at_jasper(path, located.format) if is_jasper(path) else None
    damaged = problem or (jasper.why_no_figures if jasper else _unservable(path, located.format, samples))
    step("the loader", 0, None)
    speed, why_no_speed = _speed(path, located, made, speed_seconds, samples, damaged, memory_limit)
    return DatasetReport(
        **facts,
        memory_limit=None if memory_limit is None else nbytes_of(memory_limit, "memory_limit"),
        samples=samples,
        why_no_samples=problem,
        declares=declares,
        jasper=jasper,
        speed=speed,
        why_no_speed=why_no_speed,
        verification=_verified(path, step) if verify else None,
    )


def _facts(path: Path, located: Located, made: Plan) -> dict[str, Any]:
    """What can be said of any dataset from its headers and its configuration."""
    config = _config(path) if path.is_dir() else {}
    return {
        "path": path,
        "name": str(config.get("dataset_name") or path.resolve().name),
        "created": str(config.get("created_at") or ""),
        "format": located.format,
        "files": len({path for spec in located.specs for path in spec.paths}),
        "tensors": _rows(located.specs, made),
        "parts": look_at_parts(located.specs),
        "budget": made.budget.explain(),
        "made_at": dt.datetime.now(tz=dt.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": _machine(),
    }


def _known(path: Path) -> tuple[Known, str]:
    """What is known of a dataset, or nothing and why its declaration cannot be understood."""
    try:
        return known_at(path), ""
    except DeclarationError as exc:
        return Known(Schema()), str(exc)


def _config(path: Path) -> Mapping[str, Any]:
    """The configuration of a directory, or of the directory of a file; nothing without one."""
    file = (path if path.is_dir() else path.parent) / CONFIG_NAME
    return load_config(file) if file.is_file() else {}


def _samples(path: Path, specs: tuple[TensorSpec, ...]) -> tuple[SampleView | None, str]:
    """What a sample reads, or why that is not known."""
    try:
        return look_at_samples(path, specs), ""
    except JasperStoreError as exc:
        return None, str(exc)


def _unservable(path: Path, storage_format: str, samples: SampleView | None) -> str:
    """Why a dataset cannot be opened, an index out of bounds for instance; nothing if it can."""
    splits = () if samples is None else tuple(samples.splits) or (None,)
    try:
        for split in splits:
            with quietly(), Dataset(path, split=split, format=storage_format, use_mmap=True):
                pass
    except JasperStoreError as exc:
        return str(exc)
    return ""


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
            resident_nbytes=resident_nbytes(spec),
        )
        for spec in specs
        if spec.name in entries
    )


def _speed(
    path: Path,
    located: Located,
    made: Plan,
    seconds: float,
    samples: SampleView | None,
    damaged: str,
    memory_limit: int | str | None,
) -> tuple[tuple[LoaderRate, ...], str]:
    """How fast the loader serves, mapped and as planned; or why that was not measured."""
    if damaged or samples is None:
        return (), damaged
    if not samples.length:
        return (), "there is no sample to serve"
    if not seconds > 0:
        return (), "it was not asked for"
    ways = (True, None) if made.preloaded_nbytes < min(measure().nbytes, _MOST_PRELOADED) else (True,)
    try:
        rates = [
            loader_rate(
                path,
                size,
                split=samples.split,
                storage_format=located.format,
                use_mmap=use_mmap,
                memory_limit=memory_limit,
                seconds=seconds,
            )
            for use_mmap in ways
            for size in _BATCH_SIZES
        ]
    except JasperStoreError as exc:
        return (), str(exc)
    return tuple(rates), ""


def _verified(path: Path, step: Step) -> VerifyReport:
    return verify_dataset(path, progress=lambda name, done, total: step(f"checksums: {name}", done, total))


def _machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    usable = format_bytes(measure().nbytes)
    return f"{platform.system()} {platform.machine()}, {cores} cores, {usable} of memory that may be used"
