"""``jasper-store report``: one page with pictures of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import jasper_store as js
from jasper_store.cli.console import print_json, progress, results
from jasper_store.cli.exit_codes import ExitCode
from jasper_store.cli.options import Directory, FormatOption, Json, MemoryLimit
from jasper_store.cli.outputs import require_file

__all__ = ["report"]


def report(
    path: Directory,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Page to write.")] = Path("report.html"),
    storage_format: FormatOption = "auto",
    *,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read all data once for its checksums and values.")
    ] = True,
    memory_limit: MemoryLimit = None,
    json: Json = False,
) -> None:
    """Draw a dataset: placement, what a sample reads, speed, findings.

    One HTML page that holds everything it shows and fetches nothing; for a browser, also a phone's. Of a JASPER
    dataset it also shows curriculum, negatives, clusters, distributions and embeddings.
    Nothing is written but the page; with --json its values go to stdout, and no page is written either.
    Exits with 4 if verification found errors, or the declaration in config.json does not fit the tensors; the page is
    written all the same, and shows them.

    Examples:
      jasper-store report data/
      jasper-store report data/ --out report.html --no-verify
      jasper-store report data/ --memory-limit 8GiB
    """
    from jasper_store.files.atomic import write_bytes
    from jasper_store.report.gather import make_report
    from jasper_store.report.page.document import page

    if not json:
        require_file(out)
    with progress() as bars:
        task = bars.add_task("looking", total=None)
        found = make_report(
            path,
            storage_format=storage_format,
            verify=verify,
            memory_limit=memory_limit,
            step=lambda what, done, total: bars.update(task, description=what, completed=done, total=total),
        )
    if json:
        print_json(found.to_dict())
    else:
        write_bytes(out, page(found, js.__version__).encode("utf-8", "replace"))
        results().print(f"{out}: open it in a browser", markup=False, soft_wrap=True)
    if not found.ok:
        raise typer.Exit(ExitCode.DATA)
