"""Distributions above one another on one axis, to be compared: what negatives are like, by tier."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jasper_store.report.histogram import Histogram, Tier
from jasper_store.report.model import Figures
from jasper_store.report.page.svg import WIDTH, Axis, picture, polygon, tag, text, ticks
from jasper_store.report.ranking import Ranking

__all__ = ["of_the_positive", "of_the_question"]

_ROW = 68.0
_TOP = 8.0


@dataclass(frozen=True, slots=True)
class _Row:
    """One distribution: its name on the left, words on the right, and the class that colours it."""

    name: str
    words: str
    found: Histogram
    colour: str


def of_the_positive(found: Figures) -> str:
    """How similar negatives are to the positive of their pair, by tier; the question itself for comparison."""
    rows = [*_tiers(found.tiers), _Row("the question itself", "for comparison", found.positive, "v0")]
    label = "Similarity of negatives to the positive of their pair, by tier"
    return _ridges(rows, "cosine similarity with the pair's positive, -1 to 1", label)


def of_the_question(found: Ranking) -> str:
    """How similar a question is to its positive and to its negatives, by tier."""
    rows = [_Row("the positive", "one a pair", found.positive, "v3"), *_tiers(found.tiers)]
    label = "Similarity of questions to their positives and negatives, by tier"
    return _ridges(rows, "cosine similarity with the question, -1 to 1", label)


def _tiers(found: Iterable[Tier]) -> list[_Row]:
    return [
        _Row(f"tier {tier.tier}", f"{tier.share:.0%} of negatives", tier.similarity, f"t{index % 5}")
        for index, tier in enumerate(found)
    ]


def _ridges(rows: Sequence[_Row], x_name: str, label: str) -> str:
    counted = [row.found for row in rows if row.found.rows]
    low = min((found.low for found in counted), default=0.0)
    high = max((found.high for found in counted), default=1.0)
    axis, bottom = Axis(low, high, 12, WIDTH - 12), _TOP + _ROW * len(rows)
    height = bottom + 36
    parts = []
    for value in ticks(low, high, 6):
        x = axis(value)
        parts.append(tag("line", x1=x, x2=x, y1=_TOP, y2=bottom, class_="grid"))
        parts.append(text(x, bottom + 16, f"{value:g}", text_anchor="middle"))
    parts.append(text(WIDTH / 2, height - 4, x_name, text_anchor="middle", class_="name"))
    for index, row in enumerate(rows):
        top = _TOP + _ROW * index
        parts.append(_ridge(axis, top + _ROW, _ROW - 26, row.found, row.colour))
        median = f"median {row.found.median:.2f}" if row.found.rows else "none"
        parts.append(text(14, top + 15, row.name, class_="strong"))
        parts.append(text(WIDTH - 14, top + 15, f"{row.words}, {median}", text_anchor="end"))
    return picture(height, label, *parts)


def _ridge(axis: Axis, base: float, height: float, found: Histogram, colour: str) -> str:
    most = max(found.counts) or 1
    width = (found.high - found.low) / len(found.counts)
    places = [(axis(found.low), base)]
    for index, count in enumerate(found.counts):
        top = base - count / most * height
        places += [(axis(found.low + index * width), top), (axis(found.low + (index + 1) * width), top)]
    places.append((axis(found.high), base))
    title = f"median {found.median:.3f} of {found.rows:,}"
    middle = axis(found.median)
    mark = tag("line", x1=middle, x2=middle, y1=base - height, y2=base, class_="median") if found.rows else ""
    line = tag("line", x1=axis.start, x2=axis.stop, y1=base, y2=base, class_="grid")
    return line + polygon(places, title, class_=colour) + mark
