"""The pieces that the page is put together from."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from jasper_store.report.page.svg import joined

__all__ = ["legend", "section"]


def section(name: str, title: str, note: str, *content: str, wide: bool = False) -> str:
    """A card; ``title`` and ``note`` are text, ``content`` is markup."""
    kind = ' class="wide"' if wide else ""
    return f'<section id="{name}"{kind}><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{joined(content)}</section>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Colours by class, and what they stand for."""
    items = joined(f'<li><i class="{colour}"></i>{escape(words)}</li>' for colour, words in entries)
    return f'<ul class="legend">{items}</ul>'
