"""What is asked of the order that a loader chooses by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["AUTO", "against_orders"]

AUTO = '`order="auto"`'
LEAST = 0.9


def against_orders(rates: Mapping[str, float]) -> tuple[str, float, float, float]:
    """What a target says of the rate in ``auto``: against what, both rates, and the least ratio."""
    return "the better of global and block order", rates["auto"], max(rates["global"], rates["block"]), LEAST
