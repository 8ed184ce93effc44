"""How a command ends: exit codes, and errors in one line with the remedy, as JSON too where JSON was asked for."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.markup import escape

from jasper_store.cli.console import errors, print_json
from jasper_store.cli.exit_codes import ExitCode, code_of
from jasper_store.cli.flags import in_flags
from jasper_store.errors import InsufficientMemoryError, JasperStoreError, JasperStoreWarning

__all__ = ["EXIT_CODES", "AlreadyShown", "error_entry", "reported"]

EXIT_CODES = "Exit codes: " + "; ".join(f"{code.value} {code.meaning}" for code in ExitCode) + "."
"""The table of exit codes in a line, for ``--help``."""

# Typer's own copy of Click, or Click: whichever Typer raises its errors of usage from.
_UsageError: type[BaseException] = typer.BadParameter.__bases__[0]
# Kinds that not every Click has: programs that read the JSON are given the one that all have.
_RENAMED = {"NoSuchCommand": "UsageError"}


class AlreadyShown(Exception):  # noqa: N818 (no error of its own: it carries one)
    """An error that is part of the JSON document on stdout already; ends the command as the error itself would."""

    def __init__(self, error: JasperStoreError) -> None:
        super().__init__(str(error))
        self.error = error


def error_entry(error: BaseException, known: Container[str] | None = None) -> dict[str, Any]:
    """An error in plain values, for JSON: kind, message, exit code, and the path and tensor concerned."""
    path = getattr(error, "path", None)
    return {
        "type": _RENAMED.get(type(error).__name__, type(error).__name__),
        "message": _message(error, known),
        "exit_code": int(ExitCode.USAGE if isinstance(error, _UsageError) else code_of(error)),
        "path": None if path is None else str(path),
        "tensor": getattr(error, "tensor", None),
    }


def _message(error: BaseException, known: Container[str] | None) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, _UsageError):
        return str(error.format_message())  # type: ignore[attr-defined]
    if isinstance(error, InsufficientMemoryError):
        return _briefly(str(error), known)
    if isinstance(error, OSError) and not isinstance(error, JasperStoreError) and error.strerror:
        # Python's own text begins with an errno, which says nothing to the user.
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return in_flags(str(error) or type(error).__name__, known)


def _briefly(text: str, known: Container[str] | None) -> str:
    """What does not fit, and the remedy in this program's words; the whole table is for Python, and for --debug."""
    said = in_flags(text.splitlines()[0], known)
    remedies = []
    # Only what this command would take: --mmap and --device exclude each other.
    if "--device" in said:
        remedies.append("leave out --device, so that the data stays in host memory")
    elif "--preload" in said:
        remedies.append("leave out --preload, so that what does not fit is mapped")
    else:
        remedies.append("convert what cannot be mapped (jasper-store convert)")
    remedies.append("convert float32 data with jasper-store convert --dtype bfloat16")
    if known is None or "--memory-limit" in known:
        remedies.append("raise the bound, if it is yours (--memory-limit)")
    return f"{said} To go on: {'; or '.join(remedies)}. jasper-store plan shows the tensors and the bounds."


@contextmanager
def reported(*, debug: bool, json: bool = False, known: Container[str] | None = None) -> Iterator[None]:
    """Turn the library's errors into one line on stderr and an exit code, and its warnings into one line each.

    Args:
        debug: let exceptions through, for the traceback.
        json: print an error as a JSON document on stdout, too.
        known: flags of the command at work, for messages that name options; ``None``: all.
    """

    def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        errors().print(f"[yellow]warning:[/] {escape(in_flags(str(message), known))}", soft_wrap=True)

    def tell(error: BaseException, *, shown: bool = False) -> None:
        entry = error_entry(error, known)
        if json and not shown:
            print_json({"error": entry})
        mark = "" if isinstance(error, KeyboardInterrupt) else "[bold red]error:[/] "
        errors().print(f"{mark}{escape(entry['message'])}", soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", JasperStoreWarning)
        warnings.showwarning = show_warning
        try:
            yield
            sys.stdout.flush()  # here, where a closed pipe is still caught
        except BrokenPipeError:
            # The reader of the output (head, less) has ended; Python's own flush at exit must not fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(ExitCode.DONE) from None
        except _UsageError as exc:
            if json:
                print_json({"error": error_entry(exc)})
            raise  # Typer prints it with the usage of the command
        except KeyboardInterrupt as exc:
            tell(exc)
            raise typer.Exit(ExitCode.INTERRUPTED) from None
        except AlreadyShown as exc:
            if debug:
                raise exc.error from None
            tell(exc.error, shown=True)
            raise typer.Exit(code_of(exc.error)) from exc.error
        except (JasperStoreError, OSError, MemoryError) as exc:
            if debug:
                raise
            tell(exc)
            raise typer.Exit(code_of(exc)) from exc
