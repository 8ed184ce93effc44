"""``jasper-store compact``: one part of many."""

from __future__ import annotations

from typing import Annotated

import typer

import jasper_store as js
from jasper_store.cli.console import print_json, progress, results
from jasper_store.cli.convert import follow_bytes
from jasper_store.cli.options import Json, LocalDirectory

__all__ = ["compact"]


def compact(
    path: LocalDirectory,
    *,
    remove_old: Annotated[
        bool,
        typer.Option("--remove-old", help="Also remove files that only older generations have; readers of these fail."),
    ] = False,
    json: Json = False,
) -> None:
    """Make one part of many after appends, in one step and bounded memory, proven by checksums.

    Readers keep the generation that they opened, as long as its files are not removed.

    Examples:
      jasper-store compact data/
      jasper-store compact data/ --remove-old
    """
    with progress() as bars:
        report = js.compact(path, remove_old=remove_old, progress=follow_bytes(bars, "compacting"))
    if json:
        print_json(report.to_dict())
    else:
        results().print(str(report), markup=False, soft_wrap=True)
