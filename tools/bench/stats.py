"""The few statistics that the tables need, over repeats of one measurement."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["median", "ratio", "spread"]


def median(values: Sequence[float]) -> float:
    """Median of the repeats; NaN where there are none (a reader that failed every time)."""
    return statistics.median(values) if values else math.nan


def spread(values: Sequence[float]) -> float:
    """Half of (largest - smallest) over the median: how far repeats disagree, 0.05 being five per cent either way."""
    middle = median(values)
    if len(values) < 2 or not middle:
        return 0.0
    return (max(values) - min(values)) / 2 / middle


def ratio(value: float | None, base: float | None) -> float | None:
    """``value / base``, or None where either is missing or the base is nothing to divide by."""
    if value is None or base is None or not math.isfinite(value) or not math.isfinite(base) or base == 0:
        return None
    return value / base
