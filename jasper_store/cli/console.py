"""What every command prints with: results to stdout, everything else to stderr, JSON when asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["bar", "errors", "print_json", "progress", "results", "table"]

# A pipe has no window width; full-width tables can be cut and searched by other programs.
_PIPE_WIDTH = 240


class _Console(Console):
    """Leaves a closed pipe to :func:`jasper_store.cli.errors.reported`; Rich would end the process with 1."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 (Rich calls this while it handles the BrokenPipeError)


def _console(*, stderr: bool) -> Console:
    console = _Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def results() -> Console:
    """Where results go: stdout, as it is at the time of the call."""
    return _console(stderr=False)


def errors() -> Console:
    """Where warnings, errors and progress go: stderr."""
    return _console(stderr=True)


def print_json(value: object) -> None:
    """One JSON document on stdout, and nothing else there."""
    # stdout may be a pipe in an encoding that lacks a letter of a path; escapes survive every one.
    print(json.dumps(value, indent=2, default=str))  # noqa: T201 (rich would wrap and colour it)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = ()) -> Group:
    """A table under its title, the same for every command; where it is too wide, the cells of text fold.

    Args:
        title: text.
        columns: heads of the columns.
        rows: cells, as markup.
        right: columns of numbers: aligned to the right, and never folded.
    """
    made = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    numbers = set(right)
    for column in columns:
        if column in numbers:
            made.add_column(column, justify="right", no_wrap=True)
        else:
            made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*row)
    # Rich would wrap a title of the table at the table's width.
    return Group(Text(title, style="bold"), made)


def bar(share: float, width: int = 10) -> str:
    """A share of 0 to 1 as a bar of text, for cells of tables."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    return "█" * filled + "·" * (width - filled)


@contextmanager
def progress(*more: ProgressColumn) -> Iterator[Progress]:
    """Progress bars on stderr, gone when done; none at all where stderr is not a terminal."""
    console = errors()
    if not console.is_terminal:
        console = Console(quiet=True)  # rich before 14.2 ends even bars that were never shown with a line
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        *more,
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=console.quiet) as bars:
        yield bars
