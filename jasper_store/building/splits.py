"""Splits: a share of each cluster, and no question, nor an exact duplicate of one, in two of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from jasper_store.errors import IncompatibleOptionsError, IntegrityError
from jasper_store.jasper.schema import SPLITS

__all__ = ["DEFAULT_SHARES", "check_shares", "divide", "group_pairs", "require_apart", "require_filled"]

DEFAULT_SHARES: Mapping[str, float] = {"train": 0.8, "val": 0.1, "test": 0.1}


def check_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares of the splits, in the order of the splits.

    Raises:
        IncompatibleOptionsError: unknown names, a share that is not above 0, or a sum that is not 1.
    """
    given: list[object] = list(shares.values())
    values = [share for share in given if isinstance(share, (int, float)) and not isinstance(share, bool)]
    known = bool(shares) and shares.keys() <= set(SPLITS) and len(values) == len(shares)
    if not known or min(values) <= 0 or not math.isclose(sum(values), 1, abs_tol=1e-6):
        raise IncompatibleOptionsError(
            f"splits={shares!r}: expected shares above 0 that add up to 1 of {', '.join(SPLITS)}, such as 0.8, 0.1, 0.1; a split "
            "that is not wanted is left out of a dictionary"
        )
    return {split: float(shares[split]) for split in SPLITS if split in shares}


def group_pairs(pairs: torch.Tensor, hashes: NDArray[np.uint64], *, shared: bool) -> NDArray[np.int64]:
    """A number for each pair [P]: equal for pairs of one question, or of questions with the same bytes.

    Args:
        pairs: rows int64 [P, 2].
        hashes: of the bytes of each question.
        shared: each pair is alone, since questions may be in several splits.
    """
    if shared:
        return np.arange(len(pairs))
    groups: NDArray[np.int64] = np.unique(hashes[pairs[:, 0].numpy()], return_inverse=True)[1]
    return groups.astype(np.int64, copy=False)


def divide(
    groups: NDArray[np.int64], clusters: NDArray[np.int64], shares: Mapping[str, float], seed: int
) -> dict[str, torch.Tensor]:
    """Divide pairs so that each cluster is in every split by its share, and no group is in two.

    Groups are ordered by the cluster of their first pair, and at random within it; along this order a split takes each time
    that its share of the groups has grown by one. So a split has its share of every run of groups, to one group.

    Args:
        groups: group of each pair [P], 0 to n - 1: pairs of one group stay together.
        clusters: cluster of each pair [P].
        shares: of :func:`check_shares`.
        seed: of the random order.

    Returns:
        Pairs of each split, int64, ascending.
    """
    count = int(groups.max()) + 1
    first = np.full(count, len(groups), np.int64)
    np.minimum.at(first, groups, np.arange(len(groups)))
    chance = np.random.default_rng([seed, 1]).random(count)
    left = np.lexsort((chance, clusters[first]))
    owner = np.zeros(count, np.int64)
    names = list(shares)
    remaining = 1.0
    # The largest first split takes what the others leave.
    for number, name in reversed(list(enumerate(names))[1:]):
        share = shares[name] / remaining
        edges = np.floor(np.arange(len(left) + 1) * share + 0.5)
        chosen = edges[1:] > edges[:-1]
        owner[left[chosen]] = number
        left = left[~chosen]
        remaining -= shares[name]
    of_pairs = owner[groups]
    return {name: torch.from_numpy(np.flatnonzero(of_pairs == number)) for number, name in enumerate(names)}


def require_filled(splits: Mapping[str, torch.Tensor], groups: int) -> None:
    """Refuse an empty split.

    Raises:
        IntegrityError: names it.
    """
    for name, rows in splits.items():
        if not len(rows):
            raise IntegrityError(
                f"splits: expected at least one pair in each split, found none in {name}: there are {groups} questions that "
                "can be divided (equal ones stay together); pass more pairs, or splits= without this split",
                tensor=f"{name}_idx",
            )


def require_apart(splits: Mapping[str, torch.Tensor], groups: NDArray[np.int64]) -> None:
    """Refuse splits that were given and share a question.

    Raises:
        IntegrityError: names the splits and a pair of each.
    """
    owner = np.full(int(groups.max()) + 1, -1, np.int64)
    names = list(splits)
    for number, name in enumerate(names):
        mine = groups[splits[name].numpy()]
        before = owner[mine]
        shared = np.flatnonzero((before >= 0) & (before != number))
        if len(shared):
            other = names[int(before[shared[0]])]
            pair = int(splits[name][int(shared[0])])
            raise IntegrityError(
                f"splits: expected no question in two splits, found that of pair {pair} ({name}) in {other} too, itself or an "
                f"exact duplicate, and {len(shared)} such pairs in all; move them, or pass shared_questions=True",
                tensor=f"{name}_idx",
            )
        owner[mine] = number
