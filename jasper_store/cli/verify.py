"""``jasper-store verify``: do the files hold what was written, and do the values mean what they should."""

from __future__ import annotations

import typer

import jasper_store as js
from jasper_store.cli.console import print_json, progress, results
from jasper_store.cli.convert import follow_bytes
from jasper_store.cli.exit_codes import ExitCode
from jasper_store.cli.flags import in_flags
from jasper_store.cli.options import Directory, Json

__all__ = ["verify"]


def verify(path: Directory, *, json: Json = False) -> None:
    """Check checksums, shapes, index bounds, NaN, splits that overlap, positives among negatives.

    Reads all data once. Exits with 4 if there are errors; warnings do not count.

    Examples:
      jasper-store verify data/
      jasper-store verify data/ --json | jq '.errors'
    """
    with progress() as bars:
        report = js.verify(path, progress=follow_bytes(bars, "verifying"))
    if json:
        print_json(report.to_dict())
    else:
        results().print(in_flags(str(report)), markup=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(ExitCode.DATA)
