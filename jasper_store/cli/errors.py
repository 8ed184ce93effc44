"""How a command ends: exit codes, and errors in one line with the remedy."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.markup import escape

from jasper_store.cli.console import errors
from jasper_store.errors import (
    ConversionError,
    CorruptFileError,
    DatasetNotFoundError,
    IncompatibleOptionsError,
    InsufficientMemoryError,
    IntegrityError,
    JasperStoreError,
    JasperStoreWarning,
)

__all__ = ["EXIT_CODES", "FINDINGS", "reported"]

FINDINGS = 4
"""Exit code of a command that found the data at fault."""

_USAGE, _NOT_FOUND, _MEMORY, _WRITE = 2, 3, 5, 6
_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (IncompatibleOptionsError, _USAGE),
    (DatasetNotFoundError, _NOT_FOUND),
    (CorruptFileError, FINDINGS),
    (IntegrityError, FINDINGS),
    (InsufficientMemoryError, _MEMORY),
    (ConversionError, _WRITE),
)

EXIT_CODES = (
    "Exit codes: 0 done; 1 unexpected failure; 2 wrong usage or incompatible options; 3 not found; "
    "4 damaged or contradictory data; 5 does not fit in memory; 6 could not be written; 130 interrupted."
)


def _code(error: BaseException) -> int:
    return next((code for kind, code in _CODES if isinstance(error, kind)), 1)


def _briefly(text: str) -> str:
    """What does not fit, and the remedy in this program's words; the whole table is for Python, and for --debug."""
    remedies = (
        "leave out --preload (or pass --mmap), so that what does not fit is mapped; convert with --dtype bfloat16; or "
        "raise the bound, if it is yours (--memory-limit). jasper-store plan shows the tensors and the bounds"
    )
    return f"{text.splitlines()[0]} To go on: {remedies}."


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    errors().print(f"[yellow]warning:[/] {escape(str(message))}", soft_wrap=True)


@contextmanager
def reported(*, debug: bool) -> Iterator[None]:
    """Turn the library's errors into one line on stderr and an exit code, and its warnings into one line each.

    Args:
        debug: let exceptions through, for the traceback.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", JasperStoreWarning)
        warnings.showwarning = _show_warning
        try:
            yield
        except BrokenPipeError:
            # The reader of the output (head, less) has ended; Python's own flush at exit must not fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            errors().print("interrupted")
            raise typer.Exit(130) from None
        except (JasperStoreError, OSError, MemoryError) as exc:
            if debug:
                raise
            text = str(exc) or type(exc).__name__
            if isinstance(exc, InsufficientMemoryError):
                text = _briefly(text)
            errors().print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)
            raise typer.Exit(_code(exc)) from exc
