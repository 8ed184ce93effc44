"""The part of the page that says what a sample is made of."""

from __future__ import annotations

from html import escape

from jasper_store.memory.budget import format_bytes
from jasper_store.report.page.lookups import lookups
from jasper_store.report.page.parts import legend, section
from jasper_store.report.page.svg import joined
from jasper_store.report.sample import SampleView

__all__ = ["sample_section"]

_NAME, _TITLE = "sample", "What a sample reads"


def sample_section(found: SampleView | None, why_not: str) -> str:
    """The picture of the lookups, the fields as a table, and what is read of each tensor."""
    if found is None:
        return section(_NAME, _TITLE, f"Not known: {why_not}", wide=True)
    said = "" if found.declared else " Nothing is declared, so every tensor of the common number of rows is a field."
    split = "" if found.split is None else f" of the split {found.split}"
    note = (
        f"One sample{split} is {format_bytes(found.nbytes)} in a batch. To make it, {found.rows_read:,.4g} rows of "
        f"{_count(len(found.reads), 'tensor')} are read, {format_bytes(round(found.nbytes_read))} on average.{said}"
    )
    words = legend([("v1", "names rows of"), ("v3", "served as the field")])
    return section(
        _NAME,
        _TITLE,
        note,
        f'<div class="halves"><div>{lookups(found)}{words}</div><div>{_fields(found)}{_reads(found)}</div></div>',
        wide=True,
    )


def _count(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _fields(found: SampleView) -> str:
    rows = joined(
        f'<tr><td class="tensor">{escape(field.name)}</td><td class="soft">{escape(field.described)}</td>'
        f'<td class="tensor soft">{escape(field.expression)}</td></tr>'
        for field in found.fields
    )
    head = "<tr><th>field</th><th>for one sample</th><th>read by</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _reads(found: SampleView) -> str:
    rows = joined(
        f'<tr><td class="tensor">{escape(row.tensor)}</td><td class="right">{row.rows:,.3g}</td>'
        f'<td class="right">{format_bytes(round(row.nbytes))}</td></tr>'
        for row in sorted(found.reads, key=lambda row: -row.nbytes)
    )
    head = '<tr><th>tensor</th><th class="right">rows a sample</th><th class="right">bytes a sample</th></tr>'
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"
