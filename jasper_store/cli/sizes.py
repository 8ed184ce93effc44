"""Sizes as people write them: ``8GiB``, ``500 MB``, ``1.5g``."""

from __future__ import annotations

import re
from fractions import Fraction

import typer

__all__ = ["parse_size"]

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmgtp]?)(?P<kind>ib|b|)", re.IGNORECASE | re.ASCII)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_LARGEST = 2**63 - 1


def parse_size(text: str) -> int:
    """Bytes that a size means, rounded down to whole ones.

    ``KiB``, ``MiB``, ... are powers of 1024 and ``kB``, ``MB``, ... powers of 1000. A bare letter (``8G``) is a power
    of 1024, as SLURM and Docker read it; a bare number is bytes. Case and spaces do not matter.

    Raises:
        typer.BadParameter: not a size, or more than 2**63 - 1 bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"expected a size such as 8GiB, 500MB or 1073741824 (bytes), found {text!r}")
    base = 1000 if match["unit"] and match["kind"].lower() == "b" else 1024
    nbytes = int(Fraction(match["number"]) * base ** _POWERS[match["unit"].lower()])
    if nbytes > _LARGEST:
        raise typer.BadParameter(f"expected at most {_LARGEST} bytes, found {text!r}")
    return nbytes
