"""From located tensors to a plan: measures the memory, reads the mount table, and warns of slow layouts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from jasper_store.errors import IncompatibleOptionsError
from jasper_store.formats.base import Chunked, Extent, Inline, Parts
from jasper_store.formats.files import dtype_name
from jasper_store.formats.texts import text_parts
from jasper_store.memory.budget import device_budget, format_bytes, measure
from jasper_store.memory.mounts import file_system
from jasper_store.paging.mapping import mappable
from jasper_store.store.assignment import make_auto_plan, make_plan
from jasper_store.store.guard import NARROW, is_cuda, normalize_device
from jasper_store.store.mapped import rows_are_runs, why_not_mappable
from jasper_store.store.placement import Item

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jasper_store.formats.base import Schema, TensorSpec
    from jasper_store.formats.registry import Located
    from jasper_store.store.placement import Plan

__all__ = ["plan_for", "target_dtype"]

_DWARFS_ROWS = 64
_DWARFS_NBYTES = 1 << 20


def plan_for(
    located: Located,
    schema: Schema,
    *,
    use_mmap: bool | None = None,
    device: str | torch.device | None = None,
    memory_limit: int | None = None,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Measure what may be held now, and decide where the tensors live. Options are checked by the caller.

    Raises:
        IncompatibleOptionsError: a CUDA device was asked for and there is none.
        InsufficientMemoryError: what must be loaded does not fit.
    """
    # Bytes of strings, which no sample reads unless it is declared to.
    texts = text_parts(located.specs)
    unread = {name: 0.0 for name in texts if name not in schema.reads_per_sample}
    known = replace(schema, reads_per_sample={**unread, **schema.reads_per_sample})
    items = [_item(spec, known, dtype) for spec in located.specs]
    fstype, network = file_system(located.root)
    notes = [f"{located.root} lies on a network file system ({fstype})"] if network else []
    notes += map(str, located.skipped)
    wanted = normalize_device(device)
    if wanted == "auto":
        budgets = {}
        if torch.cuda.is_available() and not use_mmap:
            name = f"cuda:{torch.cuda.current_device()}"
            budgets[name] = device_budget(name)
        plan = make_auto_plan(items, measure(memory_limit), budgets, use_mmap=use_mmap, notes=notes, network=network)
    elif is_cuda(wanted):
        name = _present_device(wanted)
        plan = make_plan(items, device_budget(name), device=name, use_mmap=use_mmap, notes=notes, network=network)
    else:
        plan = make_plan(items, measure(memory_limit), use_mmap=use_mmap, notes=notes, network=network)
    return replace(plan, warnings=(*plan.warnings, *_slow(located.specs, plan)))


def target_dtype(spec: TensorSpec, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a tensor is served in when a store is opened with ``dtype``.

    Rows that are single numbers (scores, distances) keep theirs: narrowing them saves next to nothing.
    """
    return dtype if dtype is not None and spec.dtype in NARROW and len(spec.shape) > 1 else spec.dtype


def _present_device(device: str) -> str:
    """A CUDA device that is there, with its number."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(device.partition(":")[2] or (torch.cuda.current_device() if count else 0))
    if number >= count:
        msg = (
            f"device={device!r}: this machine has {count or 'no'} CUDA device{'s' if count != 1 else ''} that torch "
            f"{torch.__version__} can use; use device=None, or 'auto' to take one where there is one"
        )
        raise IncompatibleOptionsError(msg)
    return f"cuda:{number}"


def _item(spec: TensorSpec, schema: Schema, dtype: torch.dtype | None) -> Item:
    target = target_dtype(spec, dtype)
    count = math.prod(spec.shape)
    return Item(
        name=spec.name,
        nbytes=count * target.itemsize,
        reads_per_sample=schema.reads(spec.name),
        row_nbytes=math.prod(spec.shape[1:]) * target.itemsize,
        mappable=not why_not_mappable(spec),
        chunked=isinstance(spec.location, Chunked),
        inline=isinstance(spec.location, Inline),
        together=spec.name in schema.together,
        remark="; ".join(_remarks(spec, target)),
    )


def _remarks(spec: TensorSpec, target: torch.dtype) -> list[str]:
    remarks = []
    location = spec.location
    if target != spec.dtype:
        remarks.append(f"{dtype_name(spec.dtype)} to {dtype_name(target)}")
    if isinstance(location, Extent):
        if not mappable(location.offset, spec.dtype):
            remarks.append(f"not aligned in its file (byte {location.offset:,})")
        if not rows_are_runs(spec):
            remarks.append("rows scattered over its file")
    elif isinstance(location, Parts):
        files = f" in {len(location.files)} files" if len(location.files) > 1 else ""
        remarks.append(f"{len(location):,} parts{files}")
    elif isinstance(location, Chunked):
        chunk = _chunk_nbytes(spec)
        filters = location.filters or "no filter"
        remarks.append(f"chunks of {format_bytes(chunk)}, {filters}" if chunk else filters)
    return remarks


def _chunk_nbytes(spec: TensorSpec) -> int:
    shape = spec.location.chunk_shape if isinstance(spec.location, Chunked) else None
    return math.prod(shape) * spec.dtype.itemsize if shape else 0


def _slow(specs: Sequence[TensorSpec], plan: Plan) -> list[str]:
    """Texts for PerformanceWarning about how the files are laid out; only of tensors that are read in training."""
    read = {entry.name for entry in plan.entries if entry.reads_per_sample > 0}
    texts = []
    for spec in specs:
        placement = plan.placement(spec.name)
        chunk = _chunk_nbytes(spec)
        if spec.name not in read:
            continue
        if placement == "chunked" and chunk > max(_DWARFS_NBYTES, _DWARFS_ROWS * spec.row_nbytes):
            texts.append(
                f"{spec.name}: a row of {format_bytes(spec.row_nbytes)} costs reading and unpacking a chunk of "
                f"{format_bytes(chunk)} ({spec.path}); convert it (jasper-store convert DIR), which writes chunks made "
                "for rows, or to safetensors, which has none"
            )
        if placement == "mmap" and not rows_are_runs(spec) and spec.nbytes > _DWARFS_NBYTES:
            texts.append(
                f"{spec.name}: rows are scattered over {spec.path} (Fortran order, or a saved view), so a row of "
                f"{format_bytes(spec.row_nbytes)} touches many pages and cannot be prefetched; convert it "
                "(jasper-store convert DIR), or preload it (use_mmap=False)"
            )
    return texts
