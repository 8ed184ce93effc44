"""The pictures of a report, from its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from jasper_store.bench.serving import LoaderRate
from jasper_store.jasper.steering import VARIANTS
from jasper_store.report.histogram import Histogram
from jasper_store.report.model import Point, Projection
from jasper_store.report.page.svg import WIDTH, Axis, Frame, joined, number, picture, polygon, tag, text, ticks

__all__ = [
    "COLOURED",
    "by_size",
    "cluster_sizes",
    "curriculum",
    "distribution",
    "placements",
    "projection",
    "speed",
    "variant_class",
]

COLOURED = 10
"""Clusters that get a separate colour; more colours than this cannot be told apart."""

_MOST_EPOCHS, _MOST_BARS = 400, 110


def variant_class(variant: int) -> str:
    """The class that colours a steering variant."""
    return f"v{variant}"


def placements(shares: Mapping[str, tuple[float, str]], label: str) -> str:
    """One bar parted by place: place -> (share, words); ``label`` says of what."""
    parts, start = [], 0.0
    for place, (share, words) in shares.items():
        width = share * WIDTH
        kind = place.split(":", maxsplit=1)[0]
        title = tag("title", escape(words))
        parts.append(tag("rect", title, x=start, y=0, width=max(width, 1.0), height=22, class_=f"p-{kind}"))
        start += width
    return picture(22, label, *parts, stretched=True)


def curriculum(stages: Sequence[Sequence[float]]) -> str:
    """How likely each steering is, by epoch: a stacked area that steps as the epochs do."""
    epochs = len(stages)
    stride = -(-epochs // _MOST_EPOCHS)
    shown = range(0, epochs, stride)
    frame = Frame(300, (0, epochs), (0, 1))
    base = [0.0] * len(shown)
    areas = []
    for variant, name in enumerate(VARIANTS):
        top = [below + stages[epoch][variant] for below, epoch in zip(base, shown, strict=True)]
        upper = _steps(frame, shown, stride, epochs, top)
        lower = _steps(frame, shown, stride, epochs, base)
        first, last = stages[0][variant], stages[-1][variant]
        title = f"{name}: {first:.0%} at first, {last:.0%} at last"
        areas.append(polygon([*upper, *reversed(lower)], title, class_=variant_class(variant)))
        base = top
    grid = frame.grid(
        "epoch",
        "probability",
        [(value, f"{value:.0%}") for value in (0, 0.25, 0.5, 0.75, 1)],
        [(value, f"{value:g}") for value in ticks(0, epochs, 6) if value == int(value)],
    )
    return picture(frame.height, "Probability of each steering variant by epoch, stacked", *areas, grid)


def _steps(
    frame: Frame, epochs: Sequence[int], stride: int, end: int, values: Sequence[float]
) -> list[tuple[float, float]]:
    places = []
    for epoch, value in zip(epochs, values, strict=True):
        places.append((frame.x(epoch), frame.y(value)))
        places.append((frame.x(min(epoch + stride, end)), frame.y(value)))
    return places


def distribution(found: Histogram, label: str, colour: str, *, below: str = "") -> str:
    """Bars of a histogram, with its median; ``label`` names the values and their unit.

    Bars below 0 have the colour ``below``, if there is one.
    """
    most = max(found.counts) or 1
    frame = Frame(240, (found.low, found.high), (0, most))
    width = (found.high - found.low) / len(found.counts)
    bars = []
    for index, count in enumerate(found.counts):
        if not count:
            continue
        low = found.low + index * width
        left, top = frame.x(low), frame.y(count)
        span = f"{low:.3f} to {low + width:.3f}" if found.smallest < found.largest else f"{found.smallest:.3f}"
        title = tag("title", f"{span}: {count:,}")
        wide = max(frame.x(low + width) - left - 0.8, 0.5)
        kind = below if below and low + width / 2 < 0 else colour
        bars.append(tag("rect", title, x=left, y=top, width=wide, height=frame.bottom - top, class_=kind))
    middle = frame.x(found.median)
    median = tag("line", x1=middle, x2=middle, y1=frame.top, y2=frame.bottom, class_="median")
    grid = frame.grid(
        label, "pairs per bar", _counts(most), [(value, f"{value:g}") for value in ticks(found.low, found.high, 6)]
    )
    return picture(frame.height, f"Distribution of {label}, median {found.median:.3f}", grid, *bars, median)


def _counts(most: float) -> list[tuple[float, str]]:
    return [(value, _short(value)) for value in ticks(0, most, 4) if value == int(value)]


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def cluster_sizes(sizes: Sequence[int]) -> str:
    """Pairs per cluster, the largest first; of very many clusters, the mean of neighbours in that order."""
    ordered = sorted(sizes, reverse=True)
    together = -(-len(ordered) // _MOST_BARS)
    groups = [ordered[start : start + together] for start in range(0, len(ordered), together)]
    frame = Frame(240, (0, len(ordered)), (0, max(ordered, default=1) or 1))
    bars = []
    for index, group in enumerate(groups):
        height = sum(group) / len(group)
        left, right = frame.x(index * together), frame.x(index * together + len(group))
        ranks = f"rank {index * together + 1}" if len(group) == 1 else f"ranks from {index * together + 1}, mean"
        title = tag("title", f"{ranks}: {height:,.0f} pairs")
        top = frame.y(height)
        wide = max((right - left) * 0.86, 0.8)
        bars.append(tag("rect", title, x=left, y=top, width=wide, height=frame.bottom - top, class_="v1"))
    x_texts = [(value, f"{value:g}") for value in ticks(0, len(ordered), 6) if value == int(value)]
    grid = frame.grid("clusters, the largest first", "pairs per cluster", _counts(frame.y.high), x_texts)
    return picture(frame.height, "Pairs per cluster, the largest first", grid, *bars)


def by_size(found: Projection) -> dict[int, list[Point]]:
    """The points of each cluster, those with most points first; the first ``COLOURED`` have a colour each."""
    clusters: dict[int, list[Point]] = {}
    for point in found.points:
        clusters.setdefault(point.cluster, []).append(point)
    return dict(sorted(clusters.items(), key=lambda item: (-len(item[1]), item[0])))


def projection(found: Projection) -> str:
    """Embeddings as dots; the clusters with most dots have a colour each, and a ring where their centroid lies."""
    by_cluster = by_size(found)
    ordered = list(by_cluster)
    colours = {cluster: f"k{rank}" for rank, cluster in enumerate(ordered[:COLOURED])}
    drawn = (*found.points, *(point for point in found.centroids if point.cluster in colours))
    margin, size = 10.0, 440.0
    x = Axis(min(point.x for point in drawn), max(point.x for point in drawn), margin, WIDTH - margin)
    y = Axis(min(point.y for point in drawn), max(point.y for point in drawn), size - margin, margin)

    def place(point: Point) -> tuple[float, float]:
        return x(point.x), y(point.y)

    groups = [tag("rect", x=0.5, y=0.5, width=WIDTH - 1, height=size - 1, rx=6, class_="frame")]
    for cluster in reversed(ordered):  # colours over grey
        dots = joined(_dot(*place(point)) for point in by_cluster[cluster])
        title = tag("title", f"cluster {cluster}: {len(by_cluster[cluster])} of these points")
        groups.append(tag("g", title + dots, class_=f"dots {colours.get(cluster, 'k-other')}"))
    rings = [
        tag("circle", tag("title", f"centroid of cluster {point.cluster}"), cx=x, cy=y, r=5, class_=f"ring {colour}")
        for point in found.centroids
        if (colour := colours.get(point.cluster))
        for x, y in (place(point),)
    ]
    first, second = found.explained
    words = f"across: {first:.0%} of the variance; up: {second:.0%}; no unit"
    axes = text(WIDTH / 2, size + 18, words, text_anchor="middle")
    return picture(size + 24, "Source embeddings in two dimensions, coloured by cluster", *groups, *rings, axes)


def _dot(x: float, y: float) -> str:
    return f'<circle cx="{number(x)}" cy="{number(y)}" r="2.2"></circle>'


def speed(rates: Sequence[LoaderRate], planned: str, colour: str) -> str:
    """Bars of samples per second, in groups of one way of placing the data.

    Args:
        rates: what was measured.
        planned: what to call the placement of the plan.
        colour: of its bars.
    """
    fastest = max(rate.samples_per_second for rate in rates) or 1.0
    axis = Axis(0, fastest, 0, WIDTH - 118)  # beside the longest bar stand up to 12 letters
    row = 44
    parts = []
    for index, rate in enumerate(rates):
        top = 8 + index * row
        value = f"{rate.samples_per_second:,.0f}/s"
        placement = planned if rate.placement == "planned" else rate.placement
        parts.append(text(0, top + 14, f"{placement}, batches of {rate.batch_size}"))
        end = max(axis(rate.samples_per_second), 2.0)
        kind = "p-mmap" if rate.placement == "mapped" else colour
        parts.append(tag("rect", tag("title", value), x=0, y=top + 20, width=end, height=15, rx=2, class_=kind))
        parts.append(text(end + 7, top + 32, value, class_="strong"))
    height = 8 + row * len(rates) + 20
    parts.append(text(0, height - 4, "samples per second (/s), from 0", class_="name"))
    return picture(height, "Samples per second of the loader", *parts)
