"""Four kinds of negatives: of the question's cluster, of adjacent clusters, of other clusters, and random ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch

from jasper_store.building.similarity import cosines, dots, product_error, sort_keys
from jasper_store.errors import IncompatibleOptionsError

__all__ = [
    "ADJACENT",
    "IN_CLUSTER",
    "KINDS",
    "OTHER",
    "PROPORTIONS",
    "RANDOM",
    "Clusters",
    "TierNumbers",
    "adjacent_clusters",
    "quotas",
    "tier_numbers",
]

TierNumbers = Literal["jasper", "builder"]

IN_CLUSTER, ADJACENT, OTHER, RANDOM = range(4)
KINDS: Final = ("in cluster", "adjacent", "other", "random")
"""What a kind is called in reports."""

PROPORTIONS: Final = (3.0, 4.0, 3.0, 2.0)
"""Parts of each kind, as the public builder of such datasets takes them for 12 negatives."""

N_ADJACENT: Final = 3

_NUMBERS: Final = {"jasper": (1, 1, 2, 0), "builder": (1, 2, 3, 4)}
_BLOCK: Final = 1024


def tier_numbers(kind: str) -> np.ndarray:
    """What is written for each kind, uint8 [4]: 0 easy, 1 medium, 2 hard (``"jasper"``), or 1 to 4 (``"builder"``).

    Raises:
        IncompatibleOptionsError: neither of them.
    """
    if kind not in _NUMBERS:
        msg = f"tier_numbers={kind!r}: expected 'jasper' (0 easy, 1 medium, 2 hard) or 'builder' (1 to 4)"
        raise IncompatibleOptionsError(msg)
    return np.array(_NUMBERS[kind], np.uint8)


def quotas(n_neg: int, proportions: Sequence[float], *, clustered: bool) -> tuple[int, int, int, int]:
    """How many negatives of each kind, by the largest remainder; of equal remainders the earlier kind gets one.

    Without clusters the three kinds that go by similarity are one, that of the most similar sources.

    Args:
        n_neg: negatives per pair, at least 1.
        proportions: four numbers of at least 0.
        clustered: whether there are clusters.

    Raises:
        IncompatibleOptionsError: proportions that are none.
    """
    values = [float(value) for value in proportions] if len(proportions) == 4 else []
    if not values or not all(np.isfinite(values)) or min(values) < 0 or sum(values) <= 0:
        msg = f"tiers={tuple(proportions)!r}: expected four numbers of at least 0, such as (3, 4, 3, 2), not all of them 0"
        raise IncompatibleOptionsError(msg)
    if not clustered:
        values = [0.0, 0.0, sum(values[:3]), values[3]]
    exact = [n_neg * value / sum(values) for value in values]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(4), key=lambda kind: (counts[kind] - exact[kind], kind))
    for kind in by_remainder[: n_neg - sum(counts)]:
        counts[kind] += 1
    return counts[0], counts[1], counts[2], counts[3]


@dataclass(frozen=True, slots=True)
class Clusters:
    """Sources in the order of their clusters, so that those of a cluster are one run of positions.

    Attributes:
        rows: source row at each position, int64 [S].
        position: position of each source row, int64 [S].
        starts: where the run of each cluster begins, int64 [C + 1]; sources of no cluster come last.
        adjacent: the nearest clusters of each cluster, int64 [C, 3]; -1 where there are fewer.
    """

    rows: np.ndarray
    position: np.ndarray
    starts: np.ndarray
    adjacent: np.ndarray

    @classmethod
    def of(cls, source_clusters: np.ndarray | None, adjacent: np.ndarray, n_sources: int) -> Clusters:
        """The order of these clusters; without clusters that of the rows."""
        count = len(adjacent)
        if source_clusters is None:
            rows = np.arange(n_sources)
            return cls(rows, rows, np.zeros(1, np.int64), adjacent)
        known = np.where(source_clusters < 0, count, source_clusters)
        rows = np.argsort(known, kind="stable").astype(np.int64)
        position = np.empty(n_sources, np.int64)
        position[rows] = np.arange(n_sources)
        sizes = np.bincount(known, minlength=count + 1)[:count]
        return cls(rows, position, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), adjacent)

    def runs(self, cluster: int) -> list[tuple[int, int, int]]:
        """Kind, first and last position of the runs that are in the cluster or adjacent to it; none of them empty."""
        if cluster < 0:
            return []
        near = [(IN_CLUSTER, cluster), *((ADJACENT, int(other)) for other in self.adjacent[cluster] if other >= 0)]
        found = [(kind, int(self.starts[each]), int(self.starts[each + 1])) for kind, each in near]
        return [run for run in found if run[1] < run[2]]

    def far(self, clusters: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Positions of random sources of far clusters: neither the own nor an adjacent one; of any where there is none.

        Args:
            clusters: cluster of each draw [n]; -1 for none.
            numbers: random numbers uint64 [n].
        """
        total = len(self.rows)
        if not len(self.adjacent):
            found: np.ndarray = (numbers % np.uint64(total)).astype(np.int64)
            return found
        near = np.concatenate([clusters[:, None], self.adjacent[clusters]], axis=1)
        near[clusters < 0] = -1
        near = np.sort(near, axis=1)  # runs of higher clusters lie behind
        there = near >= 0
        starts = np.where(there, self.starts[near], total)
        sizes = np.where(there, self.starts[near + 1] - starts, 0)
        count = total - sizes.sum(axis=1)
        nowhere = count == 0
        found = (numbers % np.where(nowhere, total, count).astype(np.uint64)).astype(np.int64)
        for column in range(near.shape[1]):
            behind = there[:, column] & (found >= starts[:, column]) & ~nowhere
            found += np.where(behind, sizes[:, column], 0)
        return found


def adjacent_clusters(centroids: torch.Tensor) -> np.ndarray:
    """The three nearest other clusters of each cluster by cosine, ties by number; -1 where there are fewer.

    Args:
        centroids: float32 [C, D].

    Returns:
        int64 [C, 3].
    """
    count, dim = centroids.shape
    norms = np.sqrt(dots(centroids, centroids))
    norms[norms == 0] = 1.0  # members that cancel out have no centroid, and a cosine of 0 with every other
    unit = (centroids.to(torch.float64) / torch.from_numpy(norms)[:, None]).to(torch.float32)
    found = np.full((count, N_ADJACENT), -1, np.int64)
    wanted = min(N_ADJACENT, count - 1)
    for start in range(0, count if wanted else 0, _BLOCK):
        block = unit[start : start + _BLOCK]
        near = block @ unit.T
        near[torch.arange(len(block)), torch.arange(start, start + len(block))] = -torch.inf
        floor = near.topk(wanted, dim=1).values[:, -1:] - 2 * product_error(dim)
        rows, columns = (part.numpy() for part in (near >= floor).nonzero(as_tuple=True))
        own = rows + start
        exact = cosines(dots(centroids[own], centroids[columns]), norms[own], norms[columns])
        order = np.lexsort((sort_keys(exact, columns), rows))
        first = np.searchsorted(rows[order], np.arange(len(block)))
        for rank in range(wanted):
            found[start : start + len(block), rank] = columns[order[first + rank]]
    return found
