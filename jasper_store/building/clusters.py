"""Clusters of sources: k-means on a sample, every source assigned, centroids as the mean of their members."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from jasper_store.building.faiss_library import faiss_in_one_thread
from jasper_store.building.rows import Matrix, unit
from jasper_store.errors import IncompatibleOptionsError, IntegrityError
from jasper_store.loading.order import order

__all__ = ["Clusters", "default_count", "given_of_pairs", "given_of_sources", "k_means", "sample_rows"]

_LARGEST = 4096
_SAMPLED = 128  # sources for each cluster; faiss recommends 39 to 256
_SAMPLE_NBYTES = 256 << 20
_ITERATIONS = 20
_EXACT_VALUES = 1 << 22  # of float64 that are compared at a time where float32 cannot tell which centroid is nearer

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Clusters:
    """Clusters and their members.

    Attributes:
        centroids: float32 [C, D] of length 1: the normalised mean of the members' directions.
        of_sources: cluster of each source, int64 [S].
        of_pairs: cluster of each pair, int64 [P].
    """

    centroids: torch.Tensor
    of_sources: torch.Tensor
    of_pairs: torch.Tensor


def default_count(sources: int) -> int:
    """How many clusters there are unless it is said: sqrt(S / 2), at least 2 and at most 4096.

    Number and size of clusters then grow alike, so that there are both members to mine in a cluster (about sqrt(2 S)) and
    neighbours to mine in; and assigning all sources takes S^1.5 products of vectors, less than mining them takes.
    """
    return min(max(round(math.sqrt(sources / 2)), 2), _LARGEST)


def k_means(
    sources: Matrix, pairs: torch.Tensor, count: int, *, seed: int, block_rows: int, progress: Progress
) -> Clusters:
    """Spherical k-means of the sources; a pair is in its source's cluster.

    Clusters that no source was assigned to are left out. The same in each process, with any number of threads and blocks
    of any size: k-means runs in one thread on a sample, and float64 decides between centroids that are about equally near.

    Args:
        sources: [S, D].
        pairs: rows int64 [P, 2].
        count: how many clusters.
        seed: of the sample and of the first centroids.
        block_rows: sources at a time.
        progress: called with the number of sources after each block of two passes.

    Raises:
        IncompatibleOptionsError: fewer sources than clusters, or faiss is missing.
        IntegrityError: all sources came into one cluster.
    """
    if count < 2:
        raise IncompatibleOptionsError(
            f"clusters={count}: expected at least 2, since negatives come from other clusters too; pass a larger number"
        )
    if count > len(sources):
        raise IncompatibleOptionsError(
            f"clusters={count}: expected at most one for each of the {len(sources)} sources; pass a smaller number"
        )
    centroids = _train(_sample(sources, count, seed, block_rows), count, seed)
    labels = torch.cat([_nearest(unit(block), centroids) for block in _followed(sources, block_rows, progress)])
    used, labels = torch.unique(labels, return_inverse=True)
    _require_several(len(used), "k-means put all sources into one cluster; are they all alike?")
    means = _means(sources, torch.arange(len(sources)), labels, len(used), block_rows, progress)
    return Clusters(means, labels, labels[pairs[:, 1]])


def given_of_sources(
    sources: Matrix, pairs: torch.Tensor, labels: torch.Tensor, *, block_rows: int, progress: Progress
) -> Clusters:
    """Clusters of known members: ``labels`` int64 [S]; arguments and errors as :func:`k_means`, and numbers with gaps."""
    count = _count(labels)
    means = _means(sources, torch.arange(len(sources)), labels, count, block_rows, progress)
    return Clusters(means, labels, labels[pairs[:, 1]])


def given_of_pairs(
    sources: Matrix, pairs: torch.Tensor, labels: torch.Tensor, *, block_rows: int, progress: Progress
) -> Clusters:
    """Clusters of known pairs: ``labels`` int64 [P]. Members of a cluster are the distinct sources of its pairs.

    A source is in the cluster of its first pair; without a pair, in that of the nearest centroid. Arguments and errors as
    :func:`given_of_sources`.
    """
    count = _count(labels)
    members = torch.unique(pairs[:, 1] * count + labels)
    means = _means(sources, members // count, members % count, count, block_rows, progress)
    of_sources = torch.full((len(sources),), -1)
    # Of several pairs of a source the last one written stays, so they are written from the last to the first. By numpy,
    # which writes them in order; torch does so with many threads.
    of_sources.numpy()[pairs[:, 1].numpy()[::-1]] = labels.numpy()[::-1]
    without = (of_sources < 0).nonzero().view(-1)
    for rows in torch.split(without, block_rows):
        of_sources[rows] = _nearest(unit(sources.take(rows)), means)
    return Clusters(means, of_sources, labels)


def _count(labels: torch.Tensor) -> int:
    """How many clusters some numbers name; refuses gaps."""
    if int(labels.min()) < 0:
        place = int((labels < 0).nonzero()[0])
        raise IntegrityError(
            f"clusters: expected numbers from 0, found {int(labels[place])} at position {place}", tensor="clusters"
        )
    count = int(labels.max()) + 1
    sizes = torch.bincount(labels, minlength=count) if count <= len(labels) else torch.zeros(1)
    if count > len(labels) or not bool((sizes > 0).all()):
        empty = int((sizes == 0).nonzero()[0]) if count <= len(labels) else "one"
        raise IntegrityError(
            f"clusters: expected the numbers 0 to {count - 1} without a gap, found no member of cluster {empty}; number them "
            "anew, np.unique(clusters, return_inverse=True)[1]",
            tensor="clusters",
        )
    _require_several(count, "clusters= names one")
    return count


def _require_several(count: int, why: str) -> None:
    if count < 2:
        raise IntegrityError(
            f"expected at least 2 clusters, since negatives come from other clusters too, found 1: {why}. Pass clusters= with "
            "several, or more varied sources",
            tensor="clusters",
        )


def sample_rows(sources: int, count: int, dim: int) -> int:
    """How many sources k-means is trained on. It depends on no budget, since centroids must not."""
    return min(sources, _SAMPLED * count, max(count, _SAMPLE_NBYTES // (4 * dim)))


def _sample(sources: Matrix, count: int, seed: int, block_rows: int) -> torch.Tensor:
    """Sources that k-means is trained on, float32 [n, D] of length 1, in the order of their rows."""
    rows = _sampled_rows(sources, count, seed)
    sample = torch.empty(len(rows), sources.shape[1])
    for out, part in zip(torch.split(sample, block_rows), torch.split(rows, block_rows), strict=True):
        out.copy_(unit(sources.take(part)))
    return sample


def _sampled_rows(sources: Matrix, count: int, seed: int) -> torch.Tensor:
    wanted = sample_rows(len(sources), count, sources.shape[1])
    if wanted == len(sources):
        return torch.arange(wanted)
    return order(len(sources), seed, 0)[torch.arange(wanted)].sort().values


def _train(sample: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Centroids float32 [count, D] of rows of length 1, by faiss in one thread."""
    with faiss_in_one_thread("clusters are computed", "clusters= with the cluster of each source") as faiss:
        # Bounds on the points, since the sample was taken already, and faiss would warn and sample again.
        kmeans: Any = faiss.Kmeans(
            sample.shape[1],
            count,
            niter=_ITERATIONS,
            spherical=True,
            seed=seed % (1 << 31),
            min_points_per_centroid=1,
            max_points_per_centroid=len(sample),
        )
        kmeans.train(sample.numpy())
    return torch.from_numpy(kmeans.centroids.copy())


def _followed(sources: Matrix, block_rows: int, progress: Progress) -> Iterator[torch.Tensor]:
    for block in sources.blocks(block_rows):
        yield block
        progress(len(block))


def _nearest(rows: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The centroid of largest cosine for each row [n, D] of length 1, int64 [n]; of equal ones the first.

    A product in float32 is rounded differently by other blocks and numbers of threads. So centroids that are nearer to the
    best than its error bound are compared again in float64, summed in one order.
    """
    products = rows.float() @ centroids.T
    best, nearest = products.max(dim=1)
    bound = 4 * rows.shape[1] * torch.finfo(torch.float32).eps
    close = products >= (best - bound)[:, None]
    unsure = (close.sum(dim=1) > 1).nonzero().view(-1)
    for part in torch.split(unsure, max(1, _EXACT_VALUES // (rows.shape[1] * len(centroids)))):
        place, candidate = close[part].nonzero(as_tuple=True)
        exact = (rows[part][place] * centroids[candidate].double()).sum(dim=1)
        scores = torch.full((len(part), len(centroids)), -torch.inf, dtype=torch.float64)
        scores[place, candidate] = exact
        # argmax gives any of equal ones; the first is wanted.
        top = scores == scores.amax(dim=1, keepdim=True)
        nearest[part] = top.int().argmax(dim=1)
    return nearest


def _means(
    sources: Matrix, rows: torch.Tensor, labels: torch.Tensor, count: int, block_rows: int, progress: Progress
) -> torch.Tensor:
    """Normalised mean of the directions of each cluster's members, float32 [count, D]; summed in the order of ``rows``."""
    sums = torch.zeros(count, sources.shape[1], dtype=torch.float64)
    for part, to in zip(torch.split(rows, block_rows), torch.split(labels, block_rows), strict=True):
        sums.index_add_(0, to, unit(sources.take(part)))
        progress(len(part))
    cancelled = (torch.linalg.vector_norm(sums, dim=1) < 1e-6).nonzero()
    if len(cancelled):
        raise IntegrityError(
            f"clusters: the members of cluster {int(cancelled[0])} cancel each other out, so their mean has no direction; "
            "cluster them otherwise",
            tensor="clusters",
        )
    return unit(sums).float()
