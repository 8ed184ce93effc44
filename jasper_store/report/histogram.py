"""Histograms, as plain values: what most figures of a report are drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["BINS", "Histogram", "Tier", "by_tier", "histogram"]

BINS = 40
"""Bins of every histogram."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts in bins of equal width.

    Attributes:
        low: left edge of the first bin.
        high: right edge of the last one.
        counts: values per bin.
        median: of the values; 0 where there are none.
        rows: values that were counted.
        of: values that there are; more where a sample was looked at.
        smallest: of the values; the edges differ where all values are alike, since a bar needs a width.
        largest: of the values.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    median: float
    rows: int
    of: int
    smallest: float = 0.0
    largest: float = 0.0

    @property
    def constant(self) -> bool:
        """Whether all values that were counted are the same one."""
        return self.rows > 0 and self.smallest == self.largest


@dataclass(frozen=True, slots=True)
class Tier:
    """Negatives of one tier.

    Attributes:
        tier: its number as stored.
        share: of all negatives in the sample.
        similarity: cosines of these negatives, each with the positive, or with the question, of its pair.
    """

    tier: int
    share: float
    similarity: Histogram


def histogram(values: torch.Tensor, of: int, low: float | None = None, high: float | None = None) -> Histogram:
    """Count the finite values; the edges are the smallest and the largest unless given."""
    values = values.flatten().double()
    values = values[values.isfinite()]
    if not len(values):
        return Histogram(low or 0.0, high if high is not None else 1.0, (0,) * BINS, 0.0, 0, of)
    smallest, largest = float(values.min()), float(values.max())
    low = smallest if low is None else low
    high = largest if high is None else high
    if high <= low:  # all alike: one bar needs a width
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(values.clamp(low, high), BINS, low, high).long()
    return Histogram(low, high, tuple(counts.tolist()), float(values.median()), len(values), of, smallest, largest)


def by_tier(values: torch.Tensor, tiers: torch.Tensor, of: int, low: float, high: float) -> tuple[Tier, ...]:
    """Values by the tier that each belongs to, lowest number first.

    Args:
        values: of any shape.
        tiers: of the same shape.
        of: how many there are; more where a sample was looked at.
        low: left edge of all histograms.
        high: their right edge.
    """
    return tuple(
        Tier(int(tier), float((tiers == tier).double().mean()), histogram(values[tiers == tier], of, low, high))
        for tier in torch.unique(tiers).tolist()
    )
