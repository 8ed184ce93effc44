"""The picture of a sample: which tensors it is looked up in, whose values name the rows, and the fields that come of it.

Exactly one index names the rows of each lookup, so the graph is a tree below the position of the sample. It is
drawn as one: a box for each lookup below the one that names its rows, and its fields to the right of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape

from jasper_store.report.page.svg import WIDTH, joined, picture, tag, text
from jasper_store.report.sample import FieldRow, LookupRow, SampleView

__all__ = ["lookups"]

_INDENT, _TRUNK, _LINE, _PADDING, _GAP = 18.0, 6.0, 17.0, 6.0, 11.0
_BOX_END, _FIELD = 270.0, 288.0
_BOLD, _PLAIN = 9.3, 7.8
"""Width of a letter at the size that narrow screens get, in a wide font."""


def lookups(found: SampleView) -> str:
    """Boxes for the lookups, arrows from an index to what it names rows of, and to the fields that are served."""
    fields = {field.name: field for field in found.fields}
    parts = [_box(0, _PADDING, _root(found), "index")]
    bottoms = {-1: _PADDING + _height(2)}  # of the boxes, by lookup; -1 is the position
    lefts = {-1: 0.0}
    ends: dict[int, float] = {}  # how far down the line from a box goes
    top = bottoms[-1] + _GAP
    for number, depth in _in_order(found):
        lookup = found.lookups[number]
        lines = [*lookup.tensors, _described(lookup)]
        height = max(_height(len(lines)), _height(2 * len(lookup.fields)))
        left, middle = depth * _INDENT, top + min(height, _height(2)) / 2
        is_index = any(other.parent == number for other in found.lookups)
        parts.append(_box(left, top, lines, "index" if is_index else "leaf"))
        parts.append(_arrow(lefts[lookup.parent] + _TRUNK, left, middle, "names"))
        ends[lookup.parent] = middle
        parts += _fields(lookup, fields, top)
        bottoms[number], lefts[number] = top + _height(len(lines)), left
        top += height + _GAP
    trunks = [
        tag("line", x1=lefts[number] + _TRUNK, x2=lefts[number] + _TRUNK, y1=bottoms[number], y2=end, class_="names")
        for number, end in ends.items()
    ]
    label = "Lookups of a sample: arrows lead from an index to the tensor whose rows it names, and on to the fields"
    return picture(top, label, *trunks, *parts)


def _root(found: SampleView) -> list[str]:
    of = "of the dataset" if found.split is None else f"of {found.split}"
    return ["i", f"position, 0 to {max(found.length - 1, 0):,} {of}"]


def _in_order(found: SampleView) -> Iterator[tuple[int, int]]:
    """Numbers of the lookups, each below the one that names its rows, with their depth in the tree."""

    def below(parent: int, depth: int) -> Iterator[tuple[int, int]]:
        for number, lookup in enumerate(found.lookups):
            if lookup.parent == parent:
                yield number, depth
                yield from below(number, depth + 1)

    yield from below(-1, 1)


def _described(found: LookupRow) -> str:
    """What is read of it, in one line: how many rows, by which column, of what."""
    rows = {None: "several rows", 1: ""}.get(found.rows, f"{found.rows} rows")
    by = "" if found.by_column is None else f"by column {found.by_column}"
    column = "" if found.column is None else f"column {found.column}"
    kind = f"{found.dtype} {list(found.row_shape)}" if found.row_shape else found.dtype
    return ", ".join(part for part in (by, rows, column, kind) if part)


def _height(lines: int) -> float:
    return _LINE * lines + _PADDING


def _box(left: float, top: float, lines: list[str], kind: str) -> str:
    width = _BOX_END - left
    title = tag("title", escape(", ".join(lines)))
    box = tag("rect", title, x=left, y=top, width=width, height=_height(len(lines)), rx=5, class_=f"box {kind}")
    room = width - 8
    names = [
        text(left + 8, top + _LINE * (index + 1) - 2, _cut(line, room / _BOLD), class_="strong")
        for index, line in enumerate(lines[:-1])
    ]
    last = text(left + 8, top + _LINE * len(lines) - 2, _cut(lines[-1], room / _PLAIN))
    return box + joined(names) + last


def _fields(found: LookupRow, fields: Mapping[str, FieldRow], top: float) -> Iterator[str]:
    """The fields that a lookup serves, each with an arrow from the box."""
    room = WIDTH - _FIELD
    for index, name in enumerate(found.fields):
        y = top + 2 * _LINE * index
        words = fields[name].described
        yield _arrow(_BOX_END, _FIELD - 5, y + _height(2) / 2, "serves")
        yield tag(
            "g",
            tag("title", escape(f"{name}: {words}, {fields[name].expression}"))
            + text(_FIELD, y + _LINE - 2, _cut(name, room / _BOLD), class_="strong")
            + text(_FIELD, y + 2 * _LINE - 2, _cut(words, room / _PLAIN)),
        )


def _arrow(start: float, stop: float, y: float, kind: str) -> str:
    line = tag("line", x1=start, x2=stop - 5, y1=y, y2=y, class_=kind)
    return line + tag(
        "polygon", points=f"{stop - 7:.1f},{y - 4:.1f} {stop:.1f},{y:.1f} {stop - 7:.1f},{y + 4:.1f}", class_=kind
    )


def _cut(words: str, letters: float) -> str:
    """Text that fits; all of it stands in the title."""
    return words if len(words) <= letters else f"{words[: max(int(letters) - 1, 1)]}\u2026"
