"""What each order of a dataset reads from the disk for a sample, and the samples a second that this allows.

A model with two figures of the disk: bytes a second in long runs, and single reads of a page a second. It leaves out
the processor, so it bounds what is reached from above. Rows of tensors in memory cost nothing. Of a mapped tensor that
is read at random, as much is taken to be in the page cache as fits there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from jasper_store.loading.order import BLOCK, WINDOW
from jasper_store.loading.prefetcher import stageable_nodes
from jasper_store.loading.window_prefetcher import READERS, WINDOWS
from jasper_store.native.reads import READER_NBYTES

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from jasper_store.samples.graph import SampleGraph
    from jasper_store.store.placement import Plan

__all__ = ["FEW_READS", "DiskRates", "Estimate", "estimates", "packed_nbytes", "windows_nbytes"]

FEW_READS: Final = 0.1
"""Rows named at random that a sample may read from maps beside a block order through the page cache."""

_PAGE: Final = 4096
_MEMORY_RATE: Final = 500_000
"""Samples a second that are served from memory, about: what no order exceeds."""
_SHOWN: Final = 0.05
_WINDOWS: Final = 0.5
"""Share of the memory left that a block order's windows take from the page cache."""


@dataclass(frozen=True)
class DiskRates:
    """What a disk gives.

    Attributes:
        bytes_per_s: in long runs.
        reads_per_s: single reads of 4 KiB, many in flight.
        source: where the figures are from.
    """

    bytes_per_s: float = 1.5e9
    reads_per_s: float = 100_000.0
    source: str = "assumed"


@dataclass(frozen=True)
class Estimate:
    """What an order costs.

    Attributes:
        order: ``"global"``, ``"block"`` or ``"packed"``.
        nbytes: bytes that the disk reads for a sample.
        reads: single reads for a sample, beside long runs.
        samples_per_s: that the disk allows.
        total_nbytes: room on the disk that packed samples would take; 0 for the other orders.
    """

    order: str
    nbytes: float
    reads: float
    samples_per_s: float
    total_nbytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dict(vars(self))

    def __str__(self) -> str:
        reads = f" in {self.reads:.2g} single reads" if self.reads >= _SHOWN else ""
        return (
            f"{self.order} {self.samples_per_s / 1000:,.0f} k samples/s ({self.nbytes / 1024:,.1f} KiB a sample{reads})"
        )


def packed_nbytes(graph: SampleGraph) -> float:
    """Bytes that a packed sample takes: of a choice the rows of all its tensors."""
    total = 0.0
    for number in dict.fromkeys(out.node for out in graph.outputs if not out.variant):
        node = graph.nodes[number]
        count = graph.reads[node.tensor] if node.ragged else 1.0
        total += count * math.prod(node.shape) * node.dtype.itemsize * len(node.tensors)
    return total


def windows_nbytes(graph: SampleGraph, mapped: AbstractSet[str]) -> int:
    """Most memory that windows of a block order take, those that are being read among them, and what they are read into.

    Args:
        graph: what a sample reads.
        mapped: names of the tensors that are mapped.
    """
    rows = [
        math.prod(node.shape) * node.dtype.itemsize for node in (graph.nodes[n] for n in stageable_nodes(graph, mapped))
    ]
    return sum(WINDOWS * BLOCK * WINDOW * nbytes + READERS * READER_NBYTES for nbytes in rows)


def estimates(graph: SampleGraph, plan: Plan, disk: DiskRates | None = None) -> list[Estimate]:
    """What each way of reading a dataset that is not packed costs, the fastest first.

    Args:
        graph: what a sample reads.
        plan: where its tensors live.
        disk: the disk; typical figures by default.

    Returns:
        Without the block order where there is no memory for its windows beside rows that are named at random.
    """
    disk = disk or DiskRates()
    mapped = [entry for entry in plan.entries if entry.placement == "mmap" and entry.reads_per_sample > 0]
    left = max(plan.budget.nbytes - plan.preloaded_nbytes, 0)
    rows = {name: node.n_rows for node in graph.nodes for name in node.tensors}
    read = [_Read(each.nbytes, each.reads_per_sample, each.nbytes / max(rows.get(each.name, 1), 1)) for each in mapped]
    runs = {entry.name for entry in mapped} & graph.in_row_order
    rest = [each for entry, each in zip(mapped, read, strict=True) if entry.name not in runs]
    in_runs = sum(each.reads * each.row_nbytes for entry, each in zip(mapped, read, strict=True) if entry.name in runs)
    packed = packed_nbytes(graph)
    total = packed * graph.length
    found = [_estimate("global", 0.0, read, left, disk)]
    if left >= windows_nbytes(graph, {entry.name for entry in mapped}) or sum(each.reads for each in rest) <= FEW_READS:
        found.append(_estimate("block", in_runs, rest, left * (_WINDOWS if runs else 1), disk))
    found.append(
        replace(
            _estimate("packed", 0.0 if total <= plan.budget.nbytes else packed, [], left, disk),
            total_nbytes=math.ceil(total),
        )
    )
    return sorted(found, key=lambda each: -each.samples_per_s)


class _Read(NamedTuple):
    """A mapped tensor: its bytes, rows that a sample reads, and bytes of a row."""

    nbytes: int
    reads: float
    row_nbytes: float


def _estimate(order: str, in_runs: float, rest: list[_Read], left: float, disk: DiskRates) -> Estimate:
    held = min(1.0, left / max(sum(each.nbytes for each in rest), 1))
    reads = sum(each.reads for each in rest) * (1 - held)
    pages = sum(each.reads * _pages(each.row_nbytes) for each in rest) * (1 - held)
    nbytes = in_runs + pages * _PAGE
    seconds = max(reads / disk.reads_per_s + in_runs / disk.bytes_per_s, nbytes / disk.bytes_per_s, 1 / _MEMORY_RATE)
    return Estimate(order, nbytes, reads, 1 / seconds)


def _pages(row_nbytes: float) -> float:
    """Pages that a row lies on, on average over where it begins."""
    return (max(row_nbytes, 1) - 1) / _PAGE + 1
