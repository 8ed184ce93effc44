"""``jasper-store``: the commands, and what they share.

The files of the commands import torch, and whatever imports it, inside the functions that need it: ``--help``,
``--version`` and completion answer before torch would be there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import jasper_store as js
from jasper_store.cli.bench import bench
from jasper_store.cli.build import build
from jasper_store.cli.compact import compact
from jasper_store.cli.console import results
from jasper_store.cli.convert import convert
from jasper_store.cli.demo import demo
from jasper_store.cli.errors import EXIT_CODES, reported
from jasper_store.cli.inspect import inspect
from jasper_store.cli.mine import mine
from jasper_store.cli.pack import pack
from jasper_store.cli.plan import plan
from jasper_store.cli.push import push
from jasper_store.cli.report import report
from jasper_store.cli.sample import sample
from jasper_store.cli.synth import synth
from jasper_store.cli.train import train
from jasper_store.cli.verify import verify
from jasper_store.cli.warm import warm

__all__ = ["app", "main"]


class _Flags:
    """The flags of the command that is at work, which is known only once it was parsed."""

    def __init__(self, group: TyperGroup, ctx: Any) -> None:
        self._group, self._ctx = group, ctx

    def __contains__(self, flag: object) -> bool:
        command = self._group.commands.get(self._ctx.invoked_subcommand or "")
        return command is None or any(flag in {*param.opts, *param.secondary_opts} for param in command.params)


class _Commands(TyperGroup):
    """Reports the library's errors the same way for every command, also under a test's runner."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        self._json = "--json" in (sys.argv[1:] if args is None else args)
        return super().main(args, *more, **options)

    def invoke(self, ctx: Any) -> Any:
        with reported(debug=bool(ctx.params.get("debug")), json=self._json, known=_Flags(self, ctx)):
            return super().invoke(ctx)


app = typer.Typer(
    name="jasper-store",
    cls=_Commands,
    help="Train from pre-computed embeddings, from disk, memory or GPU, whichever holds them.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _command in (
    demo,
    sample,
    build,
    mine,
    inspect,
    plan,
    convert,
    compact,
    pack,
    warm,
    verify,
    train,
    synth,
    report,
    push,
    bench,
):
    app.command(epilog=EXIT_CODES)(_command)


def _print_version(asked: bool) -> None:
    if not asked:
        return
    results().print(js.__version__)
    raise typer.Exit


@app.callback()
def _options(
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train from pre-computed embeddings, from disk, memory or GPU, whichever holds them.

    Start with: jasper-store demo
    """


def main() -> None:
    """Entry point of the ``jasper-store`` script, and of ``python -m jasper_store``."""
    app(prog_name="jasper-store")
