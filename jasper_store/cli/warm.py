"""``jasper-store warm``: bring a dataset into the page cache before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import DownloadColumn

import jasper_store as js
from jasper_store.cli.console import print_json, progress, results, table
from jasper_store.cli.options import Directory, Json
from jasper_store.cli.sizes import parse_size
from jasper_store.memory.sizes import format_bytes

if TYPE_CHECKING:
    from jasper_store.store.warmup import WarmupReport

__all__ = ["warm"]


def warm(
    path: Directory,
    tensors: Annotated[
        list[str] | None,
        typer.Option("--tensor", metavar="NAME", help="Only this tensor; may be repeated, the first one first."),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            parser=parse_size, metavar="SIZE", help="Read at most this much; by default what memory can hold."
        ),
    ] = None,
    *,
    json: Json = False,
) -> None:
    """Read a dataset into the page cache, so that the first epoch runs at memory speed.

    Examples:
      jasper-store warm data/
      jasper-store warm data/ --tensor source_embs --budget 4GiB
    """
    with progress(DownloadColumn(binary_units=True)) as bars:
        task = bars.add_task("warming", total=None)
        report = js.warm_up(
            path,
            tensors=tensors,
            budget=budget,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    if json:
        print_json(report.to_dict())
    else:
        _show(report)


def _show(report: WarmupReport) -> None:
    cells = [
        (
            escape(entry.name),
            format_bytes(entry.nbytes),
            _share(entry.before, entry.nbytes),
            _share(entry.after, entry.nbytes),
            entry.note,
        )
        for entry in report.tensors
    ]
    columns = ("tensor", "size", "before", "after", "why not all of it")
    out = results()
    out.print(table("In the page cache", columns, cells, right=columns[1:4]))
    out.print(report.summary(), markup=False, soft_wrap=True)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
