"""The page: what it says around the pictures, and how the parts are put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import jasper_store as js
from jasper_store.conversion.verify import Finding
from jasper_store.jasper.schema import SPLITS
from jasper_store.jasper.steering import VARIANTS
from jasper_store.memory.budget import format_bytes
from jasper_store.report.model import DatasetReport, Figures, Histogram, TensorRow
from jasper_store.report.page import charts
from jasper_store.report.page.svg import joined

__all__ = ["SECTIONS", "page"]

SECTIONS = (
    "placement",
    "curriculum",
    "negatives",
    "projection",
    "clusters",
    "relevance",
    "distance",
    "speed",
    "verify",
)
"""Identifiers of the page's parts, in their order."""

_STYLE = Path(__file__).with_name("style.css")
# The browser itself sees to it that the page fetches nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_PLACES = {
    "ram": "preloaded",
    "mmap": "mapped",
    "chunked": "read by chunks",
}


def page(report: DatasetReport) -> str:
    """The whole document."""
    style = _STYLE.read_text(encoding="utf-8")
    return joined(
        (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(report.name)} - jasper-store report</title><style>{style}</style></head><body><main>",
            _head(report),
            '<div class="cards">',
            _placement(report),
            _curriculum(report),
            _values(report),
            _speed(report),
            _verification(report),
            "</div>",
            _foot(report),
            "</main></body></html>\n",
        )
    )


def _section(name: str, title: str, note: str, *content: str, wide: bool = False) -> str:
    """A card; ``title`` and ``note`` are text, ``content`` is markup."""
    kind = ' class="wide"' if wide else ""
    return f'<section id="{name}"{kind}><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{joined(content)}</section>'


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    """Colours by class, and what they stand for."""
    items = joined(f'<li><i class="{colour}"></i>{escape(words)}</li>' for colour, words in entries)
    return f'<ul class="legend">{items}</ul>'


# ---- head and foot


def _head(report: DatasetReport) -> str:
    created = f", built {report.created}" if report.created else ""
    facts = f"{report.path}{created}"
    return (
        f"<header><h1>{escape(report.name)} {_badge(report)}</h1>"
        f'<p class="note">{escape(facts)}</p></header><dl class="tiles">{joined(_tiles(report))}</dl>'
    )


def _badge(report: DatasetReport) -> str:
    found = report.verification
    if found is None:
        kind, words = "unknown", "not verified"
    elif found.ok:
        kind, words = "ok", "verified"
    else:
        kind, words = "bad", _count(found.errors, "error")
    return f'<span class="badge {kind}">{words}</span>'


def _tiles(report: DatasetReport) -> list[str]:
    sizes = dict(report.figures.sizes) if report.figures is not None else {}
    splits = {split: sizes.pop(split) for split in SPLITS if split in sizes}
    order = {name: rank for rank, name in enumerate(("pairs", "questions", "sources", "keywords", "clusters"))}
    tiles = {name: f"{sizes[name]:,}" for name in sorted(sizes, key=lambda name: (order.get(name, len(order)), name))}
    tiles |= {"dimensions": f"{report.dim:,}", "negatives each": f"{report.n_neg:,}"}
    tiles |= {"format": report.format, "size": format_bytes(report.nbytes), "files": f"{report.files:,}"}
    plain = [_tile(name, value) for name, value in tiles.items()]
    return [*plain, *([_tile(" / ".join(splits), _numbers(splits.values()), double=True)] if splits else [])]


def _tile(name: str, value: str, *, double: bool = False) -> str:
    kind = ' class="double"' if double else ""
    return f"<div{kind}><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"


def _numbers(values: Iterable[int]) -> str:
    return " / ".join(f"{value:,}" for value in values)


def _foot(report: DatasetReport) -> str:
    words = f"Made {report.made_at} by jasper-store {js.__version__} on {report.machine}."
    return f"<footer>{escape(words)} The page holds everything it shows and fetches nothing.</footer>"


# ---- placement


def _placement(report: DatasetReport) -> str:
    by_place: dict[str, int] = {}
    for row in report.tensors:
        by_place[row.placement] = by_place.get(row.placement, 0) + row.nbytes
    total = max(report.nbytes, 1)
    words = {place: f"{_place(place)}: {format_bytes(size)}, {size / total:.0%}" for place, size in by_place.items()}
    rows = joined(_tensor(row) for row in sorted(report.tensors, key=lambda row: (-row.nbytes, row.name)))
    head = (
        '<tr><th>tensor</th><th class="right">size</th><th><span class="wide-only">place</span></th>'
        '<th><span class="wide-only">in the page </span>cache<span class="narrow-only">d</span></th>'
        '<th class="right wide-only">rows a sample</th><th class="wide-only">shape</th><th class="wide-only">why</th></tr>'
    )
    note = (
        "Where jasper-store would put each tensor on this machine now, and how much of it the page cache held before "
        "this report read anything."
    )
    return _section(
        "placement",
        "Placement and residency",
        note,
        charts.placements({place: (size / total, words[place]) for place, size in by_place.items()}),
        _legend((_place_class(place), words[place]) for place in by_place),
        f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>',
        f"<details><summary>What bounds preloading</summary><pre>{escape(report.budget)}</pre></details>",
        wide=True,
    )


def _place(placement: str) -> str:
    return _PLACES.get(placement, f"on {placement}")


def _place_class(placement: str) -> str:
    return f"p-{placement.split(':', maxsplit=1)[0]}"


def _tensor(row: TensorRow) -> str:
    shape = " x ".join(f"{size:,}" for size in row.shape) or "scalar"
    return (
        f'<tr><td class="tensor">{escape(row.name)}</td><td class="right">{format_bytes(row.nbytes)}</td>'
        f'<td class="place"><i class="{escape(_place_class(row.placement))}"></i>'
        f'<span class="wide-only">{escape(_place(row.placement))}</span></td>'
        f'<td class="cached">{_residency(row)}</td>'
        f'<td class="right wide-only">{row.reads_per_sample:.3g}</td>'
        f'<td class="wide-only soft shape">{escape(row.dtype)} {shape}</td>'
        f'<td class="wide-only soft">{escape(row.reason)}</td></tr>'
    )


def _residency(row: TensorRow) -> str:
    if row.resident_nbytes is None:
        return '<span class="soft">not known</span>'
    share = row.resident_nbytes / row.nbytes if row.nbytes else 1.0
    return f'<span class="bar" title="{share:.0%}"><i class="v1" style="width:{share:.0%}"></i></span>'


# ---- what the values look like


def _curriculum(report: DatasetReport) -> str:
    first, last = report.curriculum[0], report.curriculum[-1]
    legend = [
        (charts.variant_class(number), f"{name} {first[number]:.0%} to {last[number]:.0%}")
        for number, name in enumerate(VARIANTS)
    ]
    note = "How likely a training sample gets each kind of steering, as the epochs go by."
    return _section("curriculum", "Curriculum", note, charts.curriculum(report.curriculum), _legend(legend))


def _values(report: DatasetReport) -> str:
    found = report.figures
    if found is None:
        titles = {
            "negatives": "Negatives",
            "projection": "Embeddings in two dimensions",
            "clusters": "Cluster sizes",
            "relevance": "Relevance",
            "distance": "Distance to the centroid",
        }
        note = f"Not drawn, because the tensors contradict each other: {report.why_no_figures}"
        return joined(_section(name, title, note) for name, title in titles.items())
    return joined(
        (
            _negatives(found),
            _projection(found),
            _clusters(found),
            _section(
                "relevance",
                "Relevance",
                _counted(found.relevance),
                charts.distribution(found.relevance, "relevance", "v3"),
            ),
            _section(
                "distance",
                "Distance to the centroid",
                _counted(found.distance),
                charts.distribution(found.distance, "cosine distance", "v2"),
            ),
        )
    )


def _counted(found: Histogram) -> str:
    rows = f"{found.rows:,} pairs" if found.rows >= found.of else f"{found.rows:,} of {found.of:,} pairs"
    return f"{rows}; median {found.median:.3f} (dashed), from {found.low:.3f} to {found.high:.3f}."


def _negatives(found: Figures) -> str:
    counted = sum(tier.similarity.rows for tier in found.tiers)
    of = max((tier.similarity.of for tier in found.tiers), default=0)
    seen = f"{counted:,} negatives" if counted >= of else f"A sample of {counted:,} of {of:,} negatives"
    note = (
        f"{seen}: the nearer to the positive, the harder. Each outline is scaled to its own peak; dashed is the median."
    )
    return _section("negatives", "Negative tiers", note, charts.negatives(found))


def _projection(found: Figures) -> str:
    title = "Embeddings in two dimensions"
    shown = found.projection
    if shown is None:
        return _section("projection", title, "Not drawn: there are not two dimensions in which the embeddings differ.")
    clusters = charts.by_size(shown)
    coloured = list(clusters)[: charts.COLOURED]
    legend = [(f"k{rank}", f"{cluster} ({len(clusters[cluster]):,})") for rank, cluster in enumerate(coloured)]
    if len(clusters) > len(coloured):
        rest = sum(len(points) for points in clusters.values()) - sum(len(clusters[cluster]) for cluster in coloured)
        legend.append(("k-other", f"{len(clusters) - len(coloured):,} more ({rest:,})"))
    note = (
        f"Sources of {len(shown.points):,} of {shown.of:,} pairs on their two principal axes, each with a scale of its "
        "own. Rings are centroids. Below: cluster (points)."
    )
    return _section("projection", title, note, charts.projection(shown), _legend(legend))


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
    return _section("clusters", "Cluster sizes", note, charts.cluster_sizes(found.clusters))


# ---- speed and verify


def _speed(report: DatasetReport) -> str:
    title = "Loader speed"
    if not report.speed:
        return _section("speed", title, f"Not measured: {report.why_no_speed}")
    note = (
        "Samples per second of create_loader in one process, data in the page cache; a short measurement, beside "
        "whatever else ran. jasper-store bench measures more, cold too."
    )
    return _section("speed", title, note, charts.speed(report.speed), _epoch_takes(report))


def _epoch_takes(report: DatasetReport) -> str:
    """What the best rate means for an epoch; nothing where the epoch's length is not known."""
    samples = (report.figures.sizes if report.figures is not None else {}).get("train", 0)
    fastest = max(rate.samples_per_second for rate in report.speed)
    if not samples or not fastest > 0:
        return ""
    words = f"At the best of these, serving the {samples:,} samples of an epoch takes {samples / fastest:.2g} s."
    return f'<p class="note under">{escape(words)}</p>'


def _verification(report: DatasetReport) -> str:
    title, found = "Verification", report.verification
    if found is None:
        return _section("verify", title, "Not run for this report. jasper-store verify reads all data once.")
    groups: Mapping[str, list[Finding]] = {"error": found.errors, "warning": found.warnings, "fact": found.facts}
    counts = f"{_count(found.errors, 'error')}, {_count(found.warnings, 'warning')}; every tensor was read."
    items = joined(_finding(kind, finding) for kind, findings in groups.items() for finding in findings)
    return _section("verify", title, counts, f'<ul class="findings">{items}</ul>', wide=True)


def _count(findings: Sequence[Finding], word: str) -> str:
    return f"{len(findings)} {word}{'s' * (len(findings) != 1)}"


def _finding(kind: str, found: Finding) -> str:
    where = f" {found.tensor}" if found.tensor else ""
    row = f" (row {found.position:,})" if found.position is not None else ""
    label = {"fact": "held"}.get(kind, kind)
    return (
        f'<li class="{kind}"><b>{label}: {escape(found.check)}{escape(where)}</b>{row}<br>'
        f'<span class="soft">{escape(found.message)}</span></li>'
    )
