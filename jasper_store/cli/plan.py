"""``jasper-store plan``: what would be preloaded and what mapped, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

import jasper_store as js
from jasper_store.cli.console import print_json, results, table
from jasper_store.cli.errors import AlreadyShown, error_entry
from jasper_store.cli.flags import in_flags
from jasper_store.cli.options import Device, Directory, FormatOption, Json, MemoryLimit, Mmap, Preload, use_mmap
from jasper_store.memory.sizes import format_bytes

if TYPE_CHECKING:
    from jasper_store.store.placement import Plan

__all__ = ["plan", "show_plan"]


def plan(
    path: Directory,
    storage_format: FormatOption = "auto",
    device: Device = None,
    memory_limit: MemoryLimit = None,
    *,
    mmap: Mmap = False,
    preload: Preload = False,
    json: Json = False,
) -> None:
    """Show where each tensor would live, and which bound on memory decides. Loads nothing.

    If the declaration in config.json does not fit the tensors, or tensors are missing, the exit code says so.

    Examples:
      jasper-store plan data/
      jasper-store plan data/ --memory-limit 8GiB
      jasper-store plan data/ --device cuda
    """
    from jasper_store.cli.known import manifest_says, samples_of
    from jasper_store.formats.registry import locate
    from jasper_store.jasper.recognise import known_at

    asked = use_mmap(mmap=mmap, preload=preload)
    made = js.plan(path, format=storage_format, device=device, use_mmap=asked, memory_limit=memory_limit)
    located = locate(path, storage_format, known_at(path).schema)
    warnings = manifest_says(path, located)
    _, problem = samples_of(path, located.specs)
    if json:
        error = None if problem is None else error_entry(problem)
        print_json({**made.to_dict(), "manifest": warnings, "error": error})
    else:
        show_plan(made, str(path))
        for warning in warnings:
            results().print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    if problem is not None:
        raise AlreadyShown(problem) if json else problem


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
