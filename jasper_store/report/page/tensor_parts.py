"""The part of the page that shows tensors in several parts; a dataset of whole tensors has none."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from jasper_store.report.page.parts import section
from jasper_store.report.page.svg import WIDTH, picture, tag, text
from jasper_store.report.parts import Stretch, TensorParts

__all__ = ["PARTS_SECTION", "parts_section"]

PARTS_SECTION = "parts"
"""Identifier of this part of the page."""

_MOST_TENSORS = 12
_ROW = 46.0
_LETTERS = 52  # that fit beside each other at the size that narrow screens get


def parts_section(found: Sequence[TensorParts]) -> str:
    """A bar of rows for each tensor in parts, those with most parts first; nothing where there is none."""
    if not found:
        return ""
    shown = sorted(found, key=lambda tensor: (-tensor.parts, tensor.tensor))[:_MOST_TENSORS]
    left = len(found) - len(shown)
    more = f" {left} more tensors in parts are not drawn." if left else ""
    note = (
        "Tensors whose rows lie in several places, one part after another. Each bar is all rows of a tensor, from the "
        f"first to the last; shades alternate from part to part.{more}"
    )
    return section(PARTS_SECTION, "Tensors in parts", note, _bars(shown), wide=True)


def _bars(shown: Sequence[TensorParts]) -> str:
    parts = []
    for index, tensor in enumerate(shown):
        top = index * _ROW
        files = f"{tensor.files:,} file{'s' * (tensor.files != 1)}"
        words = f"{tensor.parts:,} parts in {files}, {tensor.rows:,} rows"
        parts.append(text(0, top + 14, _cut(tensor.tensor, _LETTERS - len(words)), class_="strong"))
        parts.append(text(WIDTH, top + 14, words, text_anchor="end"))
        parts += [_bar(tensor, number, stretch, top + 20) for number, stretch in enumerate(tensor.stretches)]
    label = "Rows of tensors in parts: where one part ends and the next begins"
    height = _ROW * len(shown) + 16
    axis = text(WIDTH / 2, height - 4, "rows, the first to the last", text_anchor="middle", class_="name")
    return picture(height, label, *parts, axis)


def _bar(tensor: TensorParts, number: int, found: Stretch, top: float) -> str:
    left, right = (WIDTH * row / max(tensor.rows, 1) for row in (found.start, found.stop))
    last = found.part + found.parts
    which = f"part {last:,}" if found.parts == 1 else f"parts {found.part + 1:,} to {last:,}"
    title = f"{which} of {tensor.parts:,}: rows {found.start:,} to {found.stop - 1:,}, {' to '.join(found.files)}"
    kind = "v1" if number % 2 else "v3"
    return tag("rect", tag("title", escape(title)), x=left, y=top, width=max(right - left, 0.5), height=16, class_=kind)


def _cut(words: str, letters: int) -> str:
    return words if len(words) <= letters else f"{words[: max(letters - 1, 1)]}\u2026"
