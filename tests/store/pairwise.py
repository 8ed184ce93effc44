"""A small covering-array generator: few combinations that contain every pair of values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence

__all__ = ["pairs_of", "pairwise"]

Combination = tuple[Hashable, ...]
Pair = tuple[int, Hashable, int, Hashable]


def pairs_of(combination: Combination) -> set[Pair]:
    """The pairs of values of different dimensions, each value with the number of its dimension."""
    numbered = list(enumerate(combination))
    return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(numbered, 2)}


def pairwise(*dimensions: Sequence[Hashable], allowed: Callable[..., bool] = lambda *_: True) -> list[Combination]:
    """Combinations in which every pair of values of two dimensions occurs that occurs in an allowed combination.

    Greedy: each step takes the first combination with the most new pairs. The result depends on the arguments only.

    Args:
        dimensions: the values of each dimension.
        allowed: whether a combination may be chosen; called with one value per dimension.
    """
    left = [(each, pairs_of(each)) for each in itertools.product(*dimensions) if allowed(*each)]
    chosen: list[Combination] = []
    while left:
        best, covered = max(left, key=lambda one: len(one[1]))
        chosen.append(best)
        left = [(each, new) for each, pairs in left if (new := pairs - covered)]
    return chosen
