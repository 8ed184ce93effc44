"""The parts of the page that only a JASPER dataset has."""

from __future__ import annotations

from jasper_store.jasper.steering import VARIANTS
from jasper_store.report.histogram import Histogram
from jasper_store.report.model import Figures, JasperPart
from jasper_store.report.page import charts, ridges
from jasper_store.report.page.parts import legend, section
from jasper_store.report.page.ranking import TITLES, ranking_sections
from jasper_store.report.page.svg import joined

__all__ = ["jasper_sections"]


def jasper_sections(found: JasperPart) -> str:
    """Curriculum, negatives, embeddings, clusters and distributions, as cards."""
    return _curriculum(found) + _values(found)


def _curriculum(report: JasperPart) -> str:
    first, last = report.curriculum[0], report.curriculum[-1]
    words = [
        (charts.variant_class(number), f"{name} {first[number]:.0%} to {last[number]:.0%}")
        for number, name in enumerate(VARIANTS)
    ]
    note = "How likely a training sample gets each kind of steering, as the epochs go by."
    return section("curriculum", "Curriculum", note, charts.curriculum(report.curriculum), legend(words))


def _values(report: JasperPart) -> str:
    found = report.figures
    if found is None:
        titles = {
            **TITLES,
            "negatives": "Negative tiers",
            "projection": "Embeddings in two dimensions",
            "clusters": "Cluster sizes",
            "relevance": "Relevance",
            "distance": "Distance to the centroid",
        }
        note = f"Not drawn, because {report.why_no_figures}"
        return joined(section(name, title, note) for name, title in titles.items())
    return joined(
        (
            ranking_sections(found.ranking),
            _negatives(found),
            _projection(found),
            _clusters(found),
            _distribution("relevance", "Relevance", found.relevance, "relevance, 0 to 1", "v3"),
            _distribution("distance", "Distance to the centroid", found.distance, "cosine distance, 0 to 2", "v2"),
        )
    )


def _distribution(name: str, title: str, found: Histogram, label: str, colour: str) -> str:
    """A card of one distribution; where all values are alike, they are one number and no picture."""
    if found.constant:
        seen = "" if found.rows >= found.of else f" Looked at {found.rows:,} of them."
        note = f"{found.of:,} pairs.{seen}"
        return section(name, title, note, f'<p class="only">all are {_shortest(found.smallest)}</p>')
    return section(name, title, _counted(found), charts.distribution(found, label, colour))


def _shortest(value: float) -> str:
    """A number in at most four digits, of which one stands after the point."""
    said = f"{value:.4g}"
    return f"{said}.0" if said.lstrip("-").isdigit() else said


def _counted(found: Histogram) -> str:
    if not found.rows:
        return f"None of {found.of:,} pairs has a finite value."
    rows = f"{found.rows:,} pairs" if found.rows >= found.of else f"{found.rows:,} of {found.of:,} pairs"
    return f"{rows}; median {found.median:.3f} (dashed), from {found.smallest:.3f} to {found.largest:.3f}."


def _negatives(found: Figures) -> str:
    counted = sum(tier.similarity.rows for tier in found.tiers)
    of = max((tier.similarity.of for tier in found.tiers), default=0)
    seen = f"{counted:,} negatives" if counted >= of else f"A sample of {counted:,} of {of:,} negatives"
    note = (
        f"{seen}: the nearer to the positive, the harder. Each outline is scaled to its own peak; dashed is the median."
    )
    return section("negatives", "Negative tiers", note, ridges.of_the_positive(found))


def _projection(found: Figures) -> str:
    title = "Embeddings in two dimensions"
    shown = found.projection
    if shown is None:
        return section("projection", title, "Not drawn: there are not two dimensions in which the embeddings differ.")
    clusters = charts.by_size(shown)
    coloured = list(clusters)[: charts.COLOURED]
    words = [(f"k{rank}", f"{cluster} ({len(clusters[cluster]):,})") for rank, cluster in enumerate(coloured)]
    if len(clusters) > len(coloured):
        rest = sum(len(points) for points in clusters.values()) - sum(len(clusters[cluster]) for cluster in coloured)
        words.append(("k-other", f"{len(clusters) - len(coloured):,} more ({rest:,})"))
    note = (
        f"Sources of {len(shown.points):,} of {shown.of:,} pairs on their two principal axes, each with a scale of its "
        "own. Rings are centroids. Below: cluster (points)."
    )
    return section("projection", title, note, charts.projection(shown), legend(words))


def _clusters(found: Figures) -> str:
    ordered = sorted(found.clusters)
    empty = sum(1 for size in ordered if not size)
    without = {0: "none is empty", 1: "1 is empty"}.get(empty, f"{empty:,} are empty")
    pairs = found.sizes["pairs"]
    seen = "" if found.clusters_rows >= pairs else f" Counted among {found.clusters_rows:,} of {pairs:,} pairs."
    note = (
        f"{len(ordered):,} clusters hold from {ordered[0]:,} to {ordered[-1]:,} pairs, "
        f"the median {ordered[len(ordered) // 2]:,}; {without}.{seen}"
    )
    return section("clusters", "Cluster sizes", note, charts.cluster_sizes(found.clusters))
