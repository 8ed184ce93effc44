"""Sizes as people write them: ``8 * 2**30``, ``"8GiB"``, ``"500 MB"``, ``"1.5g"``."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from jasper_store.errors import IncompatibleOptionsError

__all__ = ["format_bytes", "nbytes_of", "parse_size"]

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmgtp]?)(?P<kind>ib|b|)", re.IGNORECASE | re.ASCII)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_LARGEST = 2**63 - 1


def format_bytes(nbytes: int) -> str:
    """Bytes for people: ``"512 B"``, ``"1.50 GiB"``."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{nbytes} B" if unit == "B" else f"{size:.2f} {unit}"


def nbytes_of(value: int | str, name: str) -> int:
    """A size option in bytes.

    Args:
        value: bytes, or a text that :func:`parse_size` reads.
        name: the option, for the message.

    Raises:
        IncompatibleOptionsError: neither of them, negative, or more than 2**63 - 1 bytes.
    """
    if isinstance(value, str):
        try:
            return parse_size(value)
        except ValueError as exc:
            msg = f"{name}={value!r}: {exc}"
            raise IncompatibleOptionsError(msg) from None
    number: Any = value  # what a caller without type checks hands in
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= _LARGEST:
        msg = f"{name}={value!r}: expected a number of bytes from 0 to 2**63 - 1, or a text such as '8GiB' or '500MB'"
        raise IncompatibleOptionsError(msg)
    return number


def parse_size(text: str) -> int:
    """Bytes that a size means, rounded down to whole ones.

    ``KiB``, ``MiB``, ... are powers of 1024 and ``kB``, ``MB``, ... powers of 1000. A bare letter (``8G``) is a power
    of 1024, as SLURM and Docker read it; a bare number is bytes. Case and spaces do not matter.

    Raises:
        ValueError: not a size, or more than 2**63 - 1 bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        msg = f"expected a size such as 8GiB, 500MB or 1073741824 (bytes), found {text!r}"
        raise ValueError(msg)
    base = 1000 if match["unit"] and match["kind"].lower() == "b" else 1024
    nbytes = int(Fraction(match["number"]) * base ** _POWERS[match["unit"].lower()])
    if nbytes > _LARGEST:
        msg = f"expected at most {_LARGEST} bytes, found {text!r}"
        raise ValueError(msg)
    return nbytes
