"""What the values of a JASPER dataset mean: the second half of ``js.verify``.

Two kinds of checks. *Visitors* look at every block of a tensor while its checksum is computed, so that the data is
read once. *Relations* compare the small index tensors with each other, in blocks, on an open store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from jasper_store.conversion.verify import Finding, Visitor
from jasper_store.jasper.integrity import unread_bounds
from jasper_store.jasper.schema import NOUNS, SPLITS, TENSORS, declaration_for, split_tensor
from jasper_store.jasper.steering import default_curriculum
from jasper_store.samples.audit import Tally, bound_findings
from jasper_store.samples.compiler import build_graph
from jasper_store.store.store import TensorStore

__all__ = ["relations", "visitor"]

_BLOCK_ROWS = 1 << 20


@dataclass(slots=True)
class EmbeddingVisitor:
    """NaN, Inf and zero rows, from one reduction: the largest magnitude of a row tells all three."""

    tensor: str
    not_finite: Tally = field(default_factory=Tally)
    zero: Tally = field(default_factory=Tally)

    def visit(self, start: int, rows: torch.Tensor) -> None:
        """Check a block of rows [n, D]; another shape or dtype, or no columns, is ignored here, because it is reported elsewhere."""
        if rows.ndim != 2 or not rows.shape[1] or not rows.is_floating_point():
            return
        wide = rows.float() if rows.dtype.itemsize < 4 else rows  # half precision has no norm on every CPU
        largest = torch.linalg.vector_norm(wide, ord=float("inf"), dim=1)
        self.not_finite.add(start, ~torch.isfinite(largest))
        self.zero.add(start, largest == 0)

    def findings(self) -> list[Finding]:
        """An error for rows that are not finite, a warning for zero rows."""
        found = []
        if self.not_finite.count:
            text = f"{self.not_finite.count} rows hold NaN or Inf, the first is row {self.not_finite.first}; embed them again"
            found.append(Finding("error", self.tensor, "finite", text, self.not_finite.first))
        if self.zero.count:
            text = f"{self.zero.count} rows are all zero, the first is row {self.zero.first}; they have no direction"
            found.append(Finding("warning", self.tensor, "zero rows", text, self.zero.first))
        return found


@dataclass(slots=True)
class RangeVisitor:
    """Values outside a closed range; NaN is outside of every range."""

    tensor: str
    low: float
    high: float
    outside: Tally = field(default_factory=Tally)

    def visit(self, start: int, rows: torch.Tensor) -> None:
        """See a block of any shape [n, ...]."""
        if not rows.ndim:
            return
        flat = rows.reshape(len(rows), -1)
        self.outside.add(start, ~((flat >= self.low) & (flat <= self.high)).all(dim=1))

    def findings(self) -> list[Finding]:
        """An error if anything was outside."""
        if not self.outside.count:
            return []
        text = (
            f"{self.outside.count} rows lie outside [{self.low:g}, {self.high:g}],"
            f" the first is row {self.outside.first}; compute them again"
        )
        return [Finding("error", self.tensor, "range", text, self.outside.first)]


_ROUNDING = 1e-3
"""Cosine distances of rounded unit vectors leave 0..2, and relevances 0..1, by about this much in half precision."""


_RANGES = {
    "pair_relevance": (-_ROUNDING, 1 + _ROUNDING),
    "centroid_distances": (-_ROUNDING, 2 + _ROUNDING),
    "negative_tiers": (0, 4),  # 0 to 2 here, 1 to 4 by other builders
}


def visitor(name: str) -> Visitor | None:
    """A fresh visitor for a tensor whose values have a meaning by themselves; ``None`` for any other."""
    if name in _RANGES:
        return RangeVisitor(name, *_RANGES[name])
    rule = TENSORS.get(name)
    return EmbeddingVisitor(name) if rule is not None and rule.kind == "float" and rule.shape[-1] == "D" else None


def relations(store: TensorStore, sizes: Mapping[str, int]) -> Iterator[Finding]:
    """Every relation between two tensors: bounds, splits, positives among negatives, repeats.

    Args:
        store: an open store whose structure was checked.
        sizes: as ``integrity.check_structure`` returned them.
    """
    bounded = True
    for finding in _bounds(store, sizes):
        bounded = False
        yield finding
    yield from _negatives(store)
    if bounded:
        # Counting needs indices that are within bounds.
        yield from _splits(store, sizes)


def _bounds(store: TensorStore, sizes: Mapping[str, int]) -> Iterator[Finding]:
    splits = [split for split in SPLITS if split in sizes]
    declaration = declaration_for(default_curriculum())
    bounds = [bound for split in splits for bound in build_graph(declaration, store, split).bounds]
    yield from bound_findings(store, [*bounds, *unread_bounds(store)], NOUNS)


def _negatives(store: TensorStore) -> Iterator[Finding]:
    positive, repeated = Tally(), Tally()
    start = 0
    index_blocks = store["pair_index"].blocks(_BLOCK_ROWS)
    for negatives, index in zip(store["hard_negatives"].blocks(_BLOCK_ROWS), index_blocks, strict=True):
        positive.add(start, (negatives == index[:, 1:2].to(negatives.dtype)).any(dim=1))
        ordered = negatives.sort(dim=1).values
        repeated.add(start, (ordered[:, 1:] == ordered[:, :-1]).any(dim=1))
        start += len(negatives)
    if positive.count:
        text = (
            f"{positive.count} pairs have their own positive among the hard negatives, the first is pair"
            f" {positive.first}; training would push away what it should find; mine them again"
        )
        yield Finding("error", "hard_negatives", "positive among negatives", text, positive.first)
    if repeated.count:
        text = f"{repeated.count} pairs have a negative more than once, the first is pair {repeated.first}"
        yield Finding("warning", "hard_negatives", "repeated negatives", text, repeated.first)


def _splits(store: TensorStore, sizes: Mapping[str, int]) -> Iterator[Finding]:
    """Splits that overlap, repeat or miss pairs, and questions that stand in two splits. A byte per pair of memory."""
    owners = torch.zeros(sizes["pairs"], dtype=torch.uint8)
    asked = torch.zeros(sizes["questions"], dtype=torch.uint8)
    for bit, split in enumerate(SPLITS):
        if split not in sizes:
            continue
        mine = torch.zeros(sizes["pairs"], dtype=torch.uint8)
        repeats = 0
        for block in store[split_tensor(split)].blocks(_BLOCK_ROWS):
            rows = block.to(torch.int64)
            mine.index_add_(0, rows, torch.ones(len(rows), dtype=torch.uint8))
            repeats += len(rows)
            questions = store["pair_index"].take(rows)[:, 0].to(torch.int64)
            asked[questions] |= 1 << bit
        distinct = int((mine > 0).sum())
        if repeats != distinct:
            text = f"{repeats - distinct} entries repeat a pair that the split already has"
            yield Finding("warning", split_tensor(split), "repeated pairs", text, None)
        owners |= (mine > 0).to(torch.uint8) << bit
    yield from _shared("pairs", owners, "error", "overlap", "evaluation would see what training saw")
    yield from _shared("questions", asked, "warning", "leakage", "the same question is asked in both")
    missed = owners == 0
    if bool(missed.any()):
        text = f"{int(missed.sum())} pairs belong to no split, the first is pair {int(missed.nonzero()[0])}"
        yield Finding("warning", "train_idx", "missed pairs", text, int(missed.nonzero()[0]))


def _shared(
    what: str, owners: torch.Tensor, severity: Literal["error", "warning"], check: str, why: str
) -> Iterator[Finding]:
    for one, first in enumerate(SPLITS):
        for two in range(one + 1, len(SPLITS)):
            both = (1 << one) | (1 << two)
            rows = owners.bitwise_and(both) == both
            if bool(rows.any()):
                position = int(rows.nonzero()[0])
                text = (
                    f"{int(rows.sum())} {what} stand in both {first} and {SPLITS[two]}, the first is {position}; {why}"
                )
                yield Finding(severity, split_tensor(SPLITS[two]), f"split {check}", text, position)
