"""``jasper-store warm``: bring a dataset into the page cache before training."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import DownloadColumn

import jasper_store as js
from jasper_store.cli.console import print_json, progress, results
from jasper_store.cli.options import Directory, Json
from jasper_store.cli.sizes import parse_size

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
        results().print(str(report), markup=False, soft_wrap=True)
