"""A plan as values: where each tensor lives and why, as a table and as JSON.

:mod:`jasper_store.store.assignment` makes plans. Nothing in either file touches a file or asks the machine, so a plan
can be made, printed and tested anywhere.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jasper_store.memory.budget import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jasper_store.memory.budget import Budget

__all__ = ["CHUNKED", "MMAP", "RAM", "Entry", "Item", "Plan", "table"]

MMAP = "mmap"
RAM = "ram"
CHUNKED = "chunked"


@dataclass(frozen=True, slots=True)
class Item:
    """What the planner needs to know of one tensor.

    Attributes:
        name: the tensor's name.
        nbytes: bytes that it takes once loaded, in C order and in the dtype that it is opened with.
        reads_per_sample: rows of it that one training sample reads, on average.
        row_nbytes: bytes of one row, as ``nbytes``.
        mappable: whether rows can be read through a map of its file.
        chunked: whether it needs its own reader (chunked or compressed HDF5), so that it cannot be mapped.
        inline: whether its values came with the file's header and are in memory already.
        together: whether it is read in runs with other such tensors, so that it is loaded with all of them or not at all.
        remark: what is special about it in a few words, e.g. ``"gzip chunks of 109 MiB"``; ``""`` if nothing is.
    """

    name: str
    nbytes: int
    reads_per_sample: float = 1.0
    row_nbytes: int = 0
    mappable: bool = True
    chunked: bool = False
    inline: bool = False
    together: bool = False
    remark: str = ""

    @property
    def bytes_per_sample(self) -> float:
        """Bytes of it that one sample reads, on average."""
        return self.reads_per_sample * self.row_nbytes

    @property
    def priority(self) -> float:
        """Bytes read per sample over bytes held: what a byte of memory spent on it saves."""
        return self.bytes_per_sample / self.nbytes if self.nbytes else self.reads_per_sample


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor's place, and why.

    Attributes:
        name: the tensor's name.
        nbytes: bytes of its values.
        reads_per_sample: rows of it that one sample reads, on average.
        placement: ``"mmap"``, ``"ram"``, ``"chunked"`` or a device such as ``"cuda:0"``.
        reason: why, in a few words.
    """

    name: str
    nbytes: int
    reads_per_sample: float
    placement: str
    reason: str


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """Where every tensor lives, and what decided it. ``str(plan)`` is a table, and so is its ``repr``.

    Attributes:
        entries: one per tensor, in the order they were given.
        budget: what was measured; of the device where ``device`` is one.
        device: ``None`` for host memory, else the device that holds what is preloaded, e.g. ``"cuda:0"``.
        use_mmap: what was asked for: ``None`` plan, ``True`` map everything, ``False`` preload everything.
        notes: what a reader of the plan should know, e.g. that the files lie on a network file system.
        warnings: texts that opening a store by this plan warns of.
    """

    entries: tuple[Entry, ...]
    budget: Budget
    device: str | None = None
    use_mmap: bool | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def placement(self, name: str) -> str:
        """Place of one tensor; KeyError for a name that the plan does not have."""
        for entry in self.entries:
            if entry.name == name:
                return entry.placement
        raise KeyError(name)

    def bytes_in(self, *placements: str) -> int:
        """Bytes of all tensors in these places."""
        return sum(entry.nbytes for entry in self.entries if entry.placement in placements)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def mapped_nbytes(self) -> int:
        """Bytes of the tensors that stay mapped."""
        return self.bytes_in(MMAP)

    @property
    def chunked_nbytes(self) -> int:
        """Bytes (uncompressed) of the tensors that stay behind a chunk reader."""
        return self.bytes_in(CHUNKED)

    @property
    def preloaded_nbytes(self) -> int:
        """Bytes of the tensors in memory, on the host or the device."""
        return self.nbytes - self.mapped_nbytes - self.chunked_nbytes

    @property
    def any_mapped(self) -> bool:
        """Whether any tensor is mapped."""
        return any(entry.placement == MMAP for entry in self.entries)

    @property
    def reads_maps(self) -> bool:
        """Whether anything that a sample reads is mapped; what no sample reads may be, on any device."""
        return any(entry.placement == MMAP and entry.reads_per_sample > 0 for entry in self.entries)

    def __str__(self) -> str:
        lines = table(self.entries)
        totals = [f"{len(self.entries)} tensors, {format_bytes(self.nbytes)}"]
        places = dict.fromkeys(entry.placement for entry in self.entries)
        totals += [f"{place} {format_bytes(self.bytes_in(place))}" for place in places]
        lines += ["", "total: " + "; ".join(totals), self.budget.explain()]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """The plan in plain values, ready for JSON."""
        return {
            "device": self.device,
            "use_mmap": self.use_mmap,
            "nbytes": self.nbytes,
            "preloaded_nbytes": self.preloaded_nbytes,
            "mapped_nbytes": self.mapped_nbytes,
            "chunked_nbytes": self.chunked_nbytes,
            "tensors": [
                {
                    "name": entry.name,
                    "nbytes": entry.nbytes,
                    "reads_per_sample": entry.reads_per_sample,
                    "placement": entry.placement,
                    "reason": entry.reason,
                }
                for entry in self.entries
            ],
            "budget": {
                "nbytes": self.budget.nbytes,
                "fraction": self.budget.fraction,
                "ranks": self.budget.ranks,
                "winner": self.budget.winner.name,
                "bounds": [
                    {"name": bound.name, "nbytes": bound.nbytes, "detail": bound.detail} for bound in self.budget.bounds
                ],
            },
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


def table(entries: Sequence[Entry]) -> list[str]:
    """Lines of a table of entries, columns padded to their widest cell."""
    rows = [("tensor", "size", "rows/sample", "place", "why")]
    rows += [
        (entry.name, format_bytes(entry.nbytes), f"{entry.reads_per_sample:.4g}", entry.placement, entry.reason)
        for entry in entries
    ]
    name, size, reads, place = (max(len(row[column]) for row in rows) for column in range(4))
    lines = [f"{r[0]:<{name}}  {r[1]:>{size}}  {r[2]:>{reads}}  {r[3]:<{place}}  {r[4]}".rstrip() for r in rows]
    lines.insert(1, "  ".join("-" * width for width in (name, size, reads, place, 3)))
    return lines
