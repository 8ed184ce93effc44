"""Tensors that lie in several parts, as plain values: how many, in which files, and where one ends and the next begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from jasper_store.formats.base import Parts, TensorSpec

__all__ = ["Stretch", "TensorParts", "look_at_parts"]

_MOST_STRETCHES = 100


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring parts that are shown as one; of a tensor in few parts, one part each.

    Attributes:
        part: number of the first part, from 0.
        parts: how many.
        start: first row.
        stop: row after the last one.
        files: names of the first and the last file, one name where they are the same.
    """

    part: int
    parts: int
    start: int
    stop: int
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorParts:
    """One tensor in parts.

    Attributes:
        tensor: its name.
        parts: how many parts it has.
        files: how many files they lie in.
        rows: rows of all of them.
        fewest: rows of the smallest part.
        most: rows of the largest part.
        stretches: the parts in the order of their rows, at most a hundred stretches of them.
    """

    tensor: str
    parts: int
    files: int
    rows: int
    fewest: int
    most: int
    stretches: tuple[Stretch, ...]


def look_at_parts(specs: Iterable[TensorSpec]) -> tuple[TensorParts, ...]:
    """The tensors among these that lie in parts; of the others there is nothing to show."""
    return tuple(_view(spec.name, spec.location) for spec in specs if isinstance(spec.location, Parts))


def _view(name: str, location: Parts) -> TensorParts:
    rows = np.diff(location.starts)
    return TensorParts(
        tensor=name,
        parts=len(location),
        files=len(location.files),
        rows=int(location.starts[-1]),
        fewest=int(rows.min()),
        most=int(rows.max()),
        stretches=tuple(_stretches(location)),
    )


def _stretches(location: Parts) -> Iterator[Stretch]:
    together = -(-len(location) // _MOST_STRETCHES)
    for part in range(0, len(location), together):
        last = min(part + together, len(location)) - 1
        names = dict.fromkeys(location.files[location.file_of[number]].name for number in (part, last))
        yield Stretch(part, last - part + 1, int(location.starts[part]), int(location.starts[last + 1]), tuple(names))
