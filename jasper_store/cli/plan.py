"""``jasper-store plan``: what would be preloaded and what mapped, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.markup import escape

import jasper_store as js
from jasper_store.cli.console import print_json, results, table
from jasper_store.cli.errors import AlreadyShown, error_entry
from jasper_store.cli.flags import in_flags
from jasper_store.cli.options import Device, Directory, FormatOption, Json, MemoryLimit, Mmap, Preload, use_mmap
from jasper_store.memory.sizes import format_bytes

if TYPE_CHECKING:
    from jasper_store.formats.base import TensorSpec
    from jasper_store.loading.estimate import Estimate
    from jasper_store.store.placement import Plan

__all__ = ["plan", "show_plan"]

_PAYS: Final = 1.3
"""Times the rate of the best other order, beyond which packing is recommended."""


def plan(
    path: Directory,
    storage_format: FormatOption = "auto",
    device: Device = None,
    memory_limit: MemoryLimit = None,
    *,
    mmap: Mmap = False,
    preload: Preload = False,
    measure_disk: Annotated[
        bool,
        typer.Option("--measure-disk", help="Read from the files for a second, to say what each order would reach."),
    ] = False,
    json: Json = False,
) -> None:
    """Show where each tensor would live, and which bound on memory decides. Loads nothing.

    Where samples are read from the disk it shows what each order allows, and whether packing the samples would pay.

    If the declaration in config.json does not fit the tensors, or tensors are missing, the exit code says so.

    Examples:
      jasper-store plan data/
      jasper-store plan data/ --memory-limit 8GiB
      jasper-store plan data/ --device cuda
    """
    from jasper_store.cli.known import manifest_says, packed_changes, samples_of
    from jasper_store.formats.registry import locate
    from jasper_store.jasper.recognise import known_at

    asked = use_mmap(mmap=mmap, preload=preload)
    made = js.plan(path, format=storage_format, device=device, use_mmap=asked, memory_limit=memory_limit)
    located = locate(path, storage_format, known_at(path).schema)
    warnings = manifest_says(path, located)
    _, problem = samples_of(path, located.specs)
    orders = [] if problem is not None else _orders(path, located.specs, made, measure=measure_disk)
    warnings += packed_changes(path)
    if json:
        error = None if problem is None else error_entry(problem)
        print_json(
            {**made.to_dict(), "manifest": warnings, "orders": [each.to_dict() for each in orders], "error": error}
        )
    else:
        show_plan(made, str(path))
        _show_orders(orders, path)
        for warning in warnings:
            results().print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    if problem is not None:
        raise AlreadyShown(problem) if json else problem


def _orders(path: Path, specs: Sequence[TensorSpec], made: Plan, *, measure: bool) -> list[Estimate]:
    """What each order allows; none where no sample is read from the disk, or the samples are packed."""
    from jasper_store.bench.disk import probe
    from jasper_store.jasper.packed import orders_at
    from jasper_store.loading.estimate import DiskRates

    disk = None
    if measure and specs:
        largest = max(specs, key=lambda spec: spec.nbytes).path
        runs, single = (probe(largest, random=random, seconds=0.5) for random in (False, True))
        if runs is not None and single is not None:
            disk = DiskRates(runs.bytes_per_second, single.reads_per_second, "measured")
    return orders_at(path, specs, made, disk)


def _show_orders(orders: Sequence[Estimate], path: Path) -> None:
    """Print what each order allows, and how to pack where that pays."""
    if not orders:
        return
    out = results()
    out.print("from the disk: " + ", ".join(map(str, orders)), markup=False, soft_wrap=True)
    best = max((each.samples_per_s for each in orders if each.order != "packed"), default=0.0)
    packed = next(each for each in orders if each.order == "packed")
    if packed.samples_per_s > _PAYS * best:
        out.print(
            f"packing the samples pays: {packed.samples_per_s / best:.1f} x, for {format_bytes(packed.total_nbytes)} of "
            f"disk: jasper-store pack {path} {path.name}-packed",
            markup=False,
            soft_wrap=True,
        )


def show_plan(made: Plan, title: str) -> None:
    """Print a plan: the table, the totals, the bounds."""
    out = results()
    cells = [
        (
            entry.name,
            format_bytes(entry.nbytes),
            f"{entry.reads_per_sample:.4g}",
            entry.placement,
            escape(in_flags(entry.reason)),
        )
        for entry in made.entries
    ]
    columns = ("tensor", "size", "rows/sample", "place", "why")
    out.print(table(title, columns, cells, right=("size", "rows/sample")))
    places = dict.fromkeys(entry.placement for entry in made.entries)
    parts = [f"{place} {format_bytes(made.bytes_in(place))}" for place in places]
    out.print(f"total {format_bytes(made.nbytes)}: " + ", ".join(parts), markup=False)
    out.print(in_flags(made.budget.explain()), markup=False)
    for note in made.notes:
        out.print(f"note: {in_flags(note)}", markup=False, soft_wrap=True)
    for warning in made.warnings:
        out.print(f"[yellow]warning:[/] {escape(in_flags(warning))}", soft_wrap=True)
