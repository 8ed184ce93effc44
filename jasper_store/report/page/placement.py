"""The part of the page that shows where each tensor would live, and how much of it the page cache holds."""

from __future__ import annotations

from html import escape

from jasper_store.memory.budget import format_bytes
from jasper_store.report.model import DatasetReport, PlaceRow, TensorRow
from jasper_store.report.page import charts
from jasper_store.report.page.parts import legend, section
from jasper_store.report.page.svg import joined

__all__ = ["placement_section", "plan_in_words"]

_PLACES = {
    "ram": "preloaded",
    "mmap": "mapped",
    "chunked": "read by chunks",
}


def placement_section(report: DatasetReport) -> str:
    """Bytes by place, of all tensors and of what a sample reads, and a table of the tensors."""
    rows = joined(_tensor(row) for row in sorted(report.tensors, key=lambda row: (-row.nbytes, row.name)))
    head = (
        '<tr><th>tensor</th><th class="right">size</th><th><span class="wide-only">place</span></th>'
        '<th><span class="wide-only">in the page </span>cache<span class="narrow-only">d</span></th>'
        '<th class="right wide-only">rows a sample</th><th class="wide-only">shape</th><th class="wide-only">why</th></tr>'
    )
    limit = "" if report.memory_limit is None else f", preloading at most {format_bytes(report.memory_limit)}"
    note = (
        f"Where jasper-store would put each tensor on this machine now{limit}, and how much of it the page cache held "
        "before this report read anything."
    )
    return section(
        "placement",
        "Placement and residency",
        note,
        _bars(report.places),
        f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>',
        f"<details><summary>What bounds preloading</summary><pre>{escape(report.budget)}</pre></details>",
        wide=True,
    )


def plan_in_words(report: DatasetReport) -> str:
    """How many tensors are where, of those that a sample reads."""
    read: dict[str, int] = {}
    for row in report.tensors:
        if row.name in report.reads:
            read[_place(row.placement)] = read.get(_place(row.placement), 0) + 1
    return ", ".join(f"{count} {place}" for place, count in read.items())


def _bars(places: tuple[PlaceRow, ...]) -> str:
    """All bytes by place; where there are several places, also the bytes that a sample reads."""
    total = max(sum(each.nbytes for each in places), 1)
    held = {
        each.placement: (
            each.nbytes / total,
            f"{_place(each.placement)}: {format_bytes(each.nbytes)}, {each.nbytes / total:.0%}",
        )
        for each in places
    }
    drawn = charts.placements(held, "Share of all bytes by place") + _legend(held)
    sample = sum(each.sample_nbytes for each in places)
    if len(places) == 1 or not sample > 0:
        return drawn
    read = {
        each.placement: (
            each.sample_nbytes / sample,
            f"{_place(each.placement)}: {format_bytes(round(each.sample_nbytes))}, {each.sample_nbytes / sample:.0%}",
        )
        for each in places
    }
    return (
        f'<p class="note under">All bytes</p>{drawn}<p class="note under">Bytes that a sample reads</p>'
        f"{charts.placements(read, 'Share of the bytes that a sample reads, by place')}{_legend(read)}"
    )


def _legend(shares: dict[str, tuple[float, str]]) -> str:
    return legend((_place_class(place), words) for place, (_, words) in shares.items())


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
