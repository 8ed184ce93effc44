"""``jasper-store push``: a dataset to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jasper_store.cli.console import print_json, progress, results
from jasper_store.cli.options import Json

__all__ = ["push"]


def push(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="A dataset directory.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; it is made if it is not there.")],
    *,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Branch to push to; main by default.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", metavar="TEXT", help="Message of the commit.")] = None,
    json: Json = False,
) -> None:
    """Verify a dataset, and publish it on the Hugging Face Hub with a card, in one commit.

    Reads all data once. A dataset that does not verify is refused, and so is one that is being written. Run it again
    after an interruption: what was uploaded is not sent a second time. Log in before, with hf auth login or HF_TOKEN.

    Examples:
      jasper-store push data/ owner/name
      jasper-store push data/ owner/name --private --revision v2
    """
    from jasper_store.hub.push import push as push_dataset

    with progress() as bars:
        task = bars.add_task("looking", total=None)
        report = push_dataset(
            path,
            repo,
            private=private,
            revision=revision,
            message=message,
            step=lambda what, done, total: bars.update(task, description=what, completed=done, total=total),
        )
    if json:
        print_json(report.to_dict())
    else:
        results().print(str(report), markup=False, soft_wrap=True)
