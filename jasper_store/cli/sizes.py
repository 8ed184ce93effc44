"""Sizes on the command line."""

from __future__ import annotations

import typer

from jasper_store.memory import sizes

__all__ = ["parse_size"]


def parse_size(text: str) -> int:
    """:func:`jasper_store.memory.sizes.parse_size`, as a parser of Typer's.

    Raises:
        typer.BadParameter: not a size, or more than 2**63 - 1 bytes.
    """
    try:
        return sizes.parse_size(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc
