"""The page: what it says around the pictures, and how the parts are put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from jasper_store.conversion.verify import Finding
from jasper_store.jasper.schema import SPLITS
from jasper_store.memory.budget import format_bytes
from jasper_store.report.model import DatasetReport, JasperPart
from jasper_store.report.page import charts
from jasper_store.report.page.jasper import jasper_sections
from jasper_store.report.page.parts import section
from jasper_store.report.page.placement import placement_section, plan_in_words
from jasper_store.report.page.sample import sample_section
from jasper_store.report.page.svg import joined
from jasper_store.report.page.tensor_parts import parts_section

__all__ = ["COMMON_SECTIONS", "SECTIONS", "page"]

SECTIONS = (
    "placement",
    "sample",
    "curriculum",
    "questions",
    "margin",
    "recall",
    "suspects",
    "negatives",
    "projection",
    "clusters",
    "relevance",
    "distance",
    "speed",
    "verify",
)
"""Identifiers of the page's parts, in their order."""

COMMON_SECTIONS = ("placement", "sample", "speed", "verify")
"""Those that every dataset has."""

_STYLE = Path(__file__).with_name("style.css")
# The browser itself sees to it that the page fetches nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(report: DatasetReport, version: str) -> str:
    """The whole document; ``version`` is that of this package."""
    style = _STYLE.read_text(encoding="utf-8")
    return joined(
        (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(report.name)} - jasper-store report</title><style>{style}</style></head><body><main>",
            _head(report),
            '<div class="cards">',
            placement_section(report),
            parts_section(report.parts),
            sample_section(report.samples, report.why_no_samples),
            jasper_sections(report.jasper) if report.jasper is not None else "",
            _speed(report),
            _verification(report),
            "</div>",
            _foot(report, version),
            "</main></body></html>\n",
        )
    )


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
    if report.misdeclared:
        kind, words = "bad", "the declaration does not fit"
    elif found is None:
        kind, words = "unknown", "not verified"
    elif found.ok:
        kind, words = "ok", "verified"
    else:
        kind, words = "bad", _count(found.errors, "error")
    return f'<span class="badge {kind}">{words}</span>'


def _tiles(report: DatasetReport) -> list[str]:
    tiles = _sample_tiles(report) if report.jasper is None else _jasper_tiles(report.jasper)
    splits = {} if report.samples is None else report.samples.splits
    tiles |= {"format": report.format, "size": format_bytes(report.nbytes), "files": f"{report.files:,}"}
    plain = [_tile(name, value) for name, value in tiles.items()]
    return [*plain, *([_tile(" / ".join(splits), _numbers(splits.values()), double=True)] if splits else [])]


def _sample_tiles(report: DatasetReport) -> dict[str, str]:
    found = report.samples
    tiles = {"tensors": f"{len(report.tensors):,}"}
    if found is None:
        return tiles
    samples = {} if found.splits else {"samples": f"{found.length:,}"}
    return {**samples, "fields": f"{len(found.fields):,}", "a sample": format_bytes(found.nbytes), **tiles}


def _jasper_tiles(found: JasperPart) -> dict[str, str]:
    sizes = {} if found.figures is None else {k: v for k, v in found.figures.sizes.items() if k not in SPLITS}
    order = {name: rank for rank, name in enumerate(("pairs", "questions", "sources", "keywords", "clusters"))}
    tiles = {name: f"{sizes[name]:,}" for name in sorted(sizes, key=lambda name: (order.get(name, len(order)), name))}
    return tiles | {"dimensions": f"{found.dim:,}", "negatives each": f"{found.n_neg:,}"}


def _tile(name: str, value: str, *, double: bool = False) -> str:
    kind = ' class="double"' if double else ""
    return f"<div{kind}><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"


def _numbers(values: Iterable[int]) -> str:
    return " / ".join(f"{value:,}" for value in values)


def _foot(report: DatasetReport, version: str) -> str:
    words = f"Made {report.made_at} by jasper-store {version} on {report.machine}."
    return f"<footer>{escape(words)} The page holds everything it shows and fetches nothing.</footer>"


# ---- speed and verify


def _speed(report: DatasetReport) -> str:
    title = "Loader speed"
    if not report.speed:
        return section("speed", title, f"Not measured: {report.why_no_speed}")
    note = (
        "Samples per second of create_loader in one process, data in the page cache; a short measurement, beside "
        "whatever else ran. jasper-store bench measures more, cold too."
    )
    mixed = len({row.placement for row in report.tensors if row.name in report.reads}) > 1
    planned = f"planned ({plan_in_words(report)})" if mixed else "planned"
    drawn = charts.speed(report.speed, planned, "p-mixed" if mixed else "p-ram")
    return section("speed", title, note, drawn, _epoch_takes(report))


def _epoch_takes(report: DatasetReport) -> str:
    """What the best rate means for an epoch; nothing where the epoch's length is not known."""
    samples = 0 if report.samples is None else report.samples.length
    fastest = max(rate.samples_per_second for rate in report.speed)
    if not samples or not fastest > 0:
        return ""
    words = f"At the best of these, serving the {samples:,} samples of an epoch takes {samples / fastest:.2g} s."
    return f'<p class="note under">{escape(words)}</p>'


def _verification(report: DatasetReport) -> str:
    title, found = "Verification", report.verification
    if found is None:
        return section("verify", title, "Not run for this report. jasper-store verify reads all data once.")
    groups: Mapping[str, list[Finding]] = {"error": found.errors, "warning": found.warnings, "fact": found.facts}
    counts = f"{_count(found.errors, 'error')}, {_count(found.warnings, 'warning')}; every tensor was read."
    items = joined(_finding(kind, finding) for kind, findings in groups.items() for finding in findings)
    return section("verify", title, counts, f'<ul class="findings">{items}</ul>', wide=True)


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
