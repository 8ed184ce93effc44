"""Steering and centroid distance of a block of pairs, by the formulas of docs/domain.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from jasper_store.building.rows import unit

__all__ = ["KeywordWeights", "Steering", "mean_keywords", "steer"]

KeywordWeights = Literal["equal", "softmax"]

_SAME = 1e-6
"""A question nearer to its centroid than the rounding of float32 has no direction towards it."""


@dataclass(frozen=True)
class Steering:
    """Of a block of pairs, in float64.

    Attributes:
        centroid: [n, D], of length 1; zeros where the question is the centroid.
        keyword_weighted: [n, D], of length 1; that of the centroid where a pair has no keywords.
        residual: [n, D].
        distances: [n], 0 to 2.
    """

    centroid: torch.Tensor
    keyword_weighted: torch.Tensor
    residual: torch.Tensor
    distances: torch.Tensor


def steer(
    questions: torch.Tensor, centroids: torch.Tensor, keywords: torch.Tensor | None, *, normalize_residual: bool
) -> Steering:
    """Steering of n pairs.

    Args:
        questions: float64 [n, D] of length 1.
        centroids: float64 [n, D] of length 1, of the pairs' clusters.
        keywords: float64 [n, D]: normalised mean of each pair's keywords, NaN where it has none; ``None``: no pair has any.
        normalize_residual: make the residual of length 1, too.
    """
    residual = questions - centroids
    same = torch.linalg.vector_norm(residual, dim=1, keepdim=True) <= _SAME
    residual = torch.where(same, 0.0, residual)
    centroid = unit(-residual)
    weighted = centroid
    if keywords is not None:
        weighted = torch.where(torch.isnan(keywords[:, :1]), centroid, keywords)
    cosines = (questions * centroids).sum(dim=1).clamp(-1, 1)
    return Steering(centroid, weighted, unit(residual) if normalize_residual else residual, 1 - cosines)


def mean_keywords(
    questions: torch.Tensor, keywords: torch.Tensor, lengths: torch.Tensor, weights: KeywordWeights
) -> torch.Tensor:
    """Normalised mean of the keywords of each pair, float64 [n, D]; NaN for a pair without any.

    Args:
        questions: float64 [n, D] of length 1.
        keywords: float64 [total, D] of length 1: those of the first pair, then of the second, ...
        lengths: int64 [n], keywords of each pair.
        weights: ``"equal"``, or ``"softmax"`` of their cosines with the question.
    """
    pair = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    if weights == "softmax":
        # Cosines are at most 1, so their exponentials need no maximum subtracted; the sum cancels in the norm.
        keywords = keywords * (keywords * questions[pair]).sum(dim=1, keepdim=True).exp()
    sums = torch.zeros_like(questions).index_add_(0, pair, keywords)
    sums = torch.where(torch.linalg.vector_norm(sums, dim=1, keepdim=True) <= _SAME, 0.0, sums)
    return torch.where((lengths > 0)[:, None], unit(sums), torch.nan)
