"""Counts as people write them: ``10M``, ``200k``, ``1_000``."""

from __future__ import annotations

import re
from fractions import Fraction

import typer

__all__ = ["parse_count"]

_COUNT = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmg]?)", re.IGNORECASE | re.ASCII)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3}
_LARGEST = 2**48


def parse_count(text: str | int) -> int:
    """How many a count means: ``k``, ``M`` and ``G`` are powers of 1000; ``_`` and ``,`` may part the digits.

    A number is itself: Typer passes an option's default, too.

    Raises:
        typer.BadParameter: not a count, not a whole number, or more than 2**48.
    """
    match = _COUNT.fullmatch(str(text).strip().replace("_", "").replace(",", ""))
    if match is None:
        raise typer.BadParameter(f"expected a count such as 10M, 200k or 1000, found {text!r}")
    count = Fraction(match["number"]) * 1000 ** _POWERS[match["unit"].lower()]
    if count.denominator != 1:
        raise typer.BadParameter(f"expected a whole number, found {text!r}")
    if count > _LARGEST:
        raise typer.BadParameter(f"expected at most {_LARGEST}, found {text!r}")
    return int(count)
