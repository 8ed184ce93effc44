"""Hard negatives that may be positives: listed as such, the same embedding, or too similar to the question."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["REASONS", "SUSPICIOUS", "Suspect", "Suspects", "find_suspects"]

SUSPICIOUS = 0.95
"""A negative above this share of the positive's cosine is suspected, as in NV-Retriever (arXiv 2407.15831)."""

REASONS = ("listed", "same", "similar")
"""Why a negative is suspected, the surest first: another pair has it as a positive of the same question; its embedding
is that of its positive, bit for bit; its cosine with the question is above :data:`SUSPICIOUS` times the positive's."""

_MOST_LISTED = 25


@dataclass(frozen=True, slots=True)
class Suspect:
    """One negative that may be a positive.

    Attributes:
        pair: row of the pair.
        column: which of its negatives.
        source: row of the negative among the sources.
        positive: row of the positive among the sources.
        tier: of the negative, as stored.
        similarity: cosine of the question with the negative.
        positive_similarity: cosine of the question with the positive.
        reason: the first of :data:`REASONS` that holds.
    """

    pair: int
    column: int
    source: int
    positive: int
    tier: int
    similarity: float
    positive_similarity: float
    reason: str


@dataclass(frozen=True, slots=True)
class Suspects:
    """All that are suspected, among the negatives that were looked at.

    Attributes:
        negatives: how many were looked at.
        counts: suspected negatives by reason, each counted once.
        pairs: pairs that have one.
        threshold: share of the positive's cosine above which a negative is suspected.
        first: the first of them: by reason, then those that are furthest above their positive.
    """

    negatives: int
    counts: dict[str, int]
    pairs: int
    threshold: float
    first: tuple[Suspect, ...]

    @property
    def count(self) -> int:
        """How many negatives are suspected."""
        return sum(self.counts.values())


def find_suspects(
    *,
    pairs: torch.Tensor,
    index: torch.Tensor,
    chosen: torch.Tensor,
    tier: torch.Tensor,
    cosines: torch.Tensor,
    same: torch.Tensor,
    listed: torch.Tensor,
) -> Suspects:
    """Find what may be a positive.

    Args:
        pairs: rows of n pairs [n].
        index: their question and positive [n, 2].
        chosen: their negatives [n, k].
        tier: of these [n, k].
        cosines: of the question with the positive and each negative [n, 1 + k].
        same: whether a negative has the positive's embedding [n, k].
        listed: whether a negative is a known positive of the question [n, k].
    """
    positive, negative = cosines[:, :1], cosines[:, 1:]
    reason = torch.full(chosen.shape, len(REASONS))
    for number, holds in reversed(list(enumerate((listed, same, negative > SUSPICIOUS * positive)))):
        reason[holds] = number
    place, column = (reason < len(REASONS)).nonzero(as_tuple=True)
    why, above = reason[place, column], (negative - positive)[place, column]
    counts = torch.bincount(why, minlength=len(REASONS)).tolist()
    # Stable, so that equals stay in the order of their pairs.
    order = above.argsort(descending=True, stable=True)
    order = order[why[order].argsort(stable=True)][:_MOST_LISTED]
    return Suspects(
        negatives=chosen.numel(),
        counts=dict(zip(REASONS, counts, strict=True)),
        pairs=len(torch.unique(place)),
        threshold=SUSPICIOUS,
        first=tuple(
            Suspect(
                pair=int(pairs[row]),
                column=k,
                source=int(chosen[row, k]),
                positive=int(index[row, 1]),
                tier=int(tier[row, k]),
                similarity=round(float(negative[row, k]), 6),
                positive_similarity=round(float(positive[row, 0]), 6),
                reason=REASONS[int(reason[row, k])],
            )
            for row, k in zip(place[order].tolist(), column[order].tolist(), strict=True)
        ),
    )
