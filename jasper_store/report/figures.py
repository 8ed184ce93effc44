"""What the values of a dataset look like, from samples of bounded size.

Scalars are read in runs of neighbouring rows spread over the tensor, which costs a disk little; embeddings as rows at
random, a few thousand of them. Memory and time do not grow with the dataset.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from jasper_store.report.histogram import Histogram, Tier, by_tier, histogram
from jasper_store.report.model import Figures, Point, Projection
from jasper_store.report.ranking import look_at_ranking
from jasper_store.report.rows import distinct, random_rows, spread, unit
from jasper_store.store.store import TensorStore
from jasper_store.store.tensors import StoredTensor

__all__ = ["figures", "project"]

_PAIRS = 2048
_POINTS = 1500
_PAIRS_AT_A_TIME = 128


def figures(store: TensorStore, sizes: Mapping[str, int]) -> Figures:
    """Look at a dataset whose structure and indices were checked.

    Args:
        store: the open dataset.
        sizes: as ``integrity.check_structure`` returned them.
    """
    ids = spread(store["pair_cluster_id"])
    counts = torch.bincount(ids.long(), minlength=sizes.get("clusters", 0))
    rows = random_rows(sizes["pairs"], _PAIRS)
    tiers, positive = _negatives(store, rows, sizes["pairs"])
    return Figures(
        sizes={name: sizes[name] for name in sorted(sizes) if name not in {"D", "n_neg"}},
        clusters=tuple(counts.tolist()),
        clusters_rows=len(ids),
        tiers=tiers,
        positive=positive,
        ranking=look_at_ranking(store, sizes["pairs"]),
        relevance=_of_scalars(store["pair_relevance"]),
        distance=_of_scalars(store["centroid_distances"]),
        projection=_projection(store, sizes["pairs"]),
    )


def _of_scalars(tensor: StoredTensor) -> Histogram:
    return histogram(spread(tensor), tensor.n_rows)


def _negatives(store: TensorStore, rows: torch.Tensor, pairs: int) -> tuple[tuple[Tier, ...], Histogram]:
    """Negatives by tier with their similarity to the positive, and the similarity of questions to it."""
    similarities, tiers, positives = [], [], []
    for start in range(0, len(rows), _PAIRS_AT_A_TIME):
        part = rows[start : start + _PAIRS_AT_A_TIME]
        index = store["pair_index"].take(part).long()
        positive = unit(store["source_embs"].take(index[:, 1]))
        question = unit(store["question_embs"].take(index[:, 0]))
        chosen = store["hard_negatives"].take(part).long()
        negative = unit(store["source_embs"].take(chosen.flatten())).reshape(*chosen.shape, -1)
        similarities.append(torch.einsum("nd,nkd->nk", positive, negative).flatten())
        tiers.append(store["negative_tiers"].take(part).long().flatten())
        positives.append((question * positive).sum(dim=1))
    similarity, tier = torch.cat(similarities), torch.cat(tiers)
    finite = similarity[similarity.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (-1.0, 1.0)
    found = by_tier(similarity, tier, pairs * chosen.shape[1], low, high)
    return found, histogram(torch.cat(positives), pairs)


def _projection(store: TensorStore, pairs: int) -> Projection | None:
    rows = random_rows(pairs, _POINTS)
    sources = store["pair_index"].take(rows)[:, 1].long()
    clusters = store["pair_cluster_id"].take(rows).long()
    values = store["source_embs"].take(sources).float()
    # A dataset may lack the centroids, since no sample reads them.
    present = distinct(clusters) if "centroid_embs" in store else clusters[:0]
    centroids = store["centroid_embs"].take(present).float() if len(present) else values[:0]
    return project(values, clusters, centroids, present, pairs)


def project(
    values: torch.Tensor, clusters: torch.Tensor, centroids: torch.Tensor, numbers: torch.Tensor, of: int
) -> Projection | None:
    """Principal components of embeddings; ``None`` where there are not two of them.

    Args:
        values: embeddings [n, D].
        clusters: cluster of each [n].
        centroids: embeddings of some clusters [k, D].
        numbers: their numbers [k].
        of: how many embeddings these were drawn from.
    """
    finite = values.isfinite().all(dim=1)
    values, clusters = values[finite], clusters[finite]
    if min(values.shape) < 2:
        return None
    known = centroids.isfinite().all(dim=1)
    centroids, numbers = centroids[known], numbers[known]
    mean = values.mean(dim=0)
    centred = values - mean
    total = float(centred.square().sum())
    if not total > 0:
        return None
    with torch.random.fork_rng(devices=[]):  # the caller's stream of random numbers stays where it is
        torch.manual_seed(0)
        _, strength, axes = torch.pca_lowrank(centred, q=min(6, *values.shape), center=False)
    axes = axes[:, :2]
    # The sign of an axis is arbitrary: make its largest component positive, so that pictures can be compared.
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    return Projection(
        points=_points(centred @ axes, clusters),
        centroids=_points((centroids - mean) @ axes, numbers),
        explained=(float(strength[0] ** 2) / total, float(strength[1] ** 2) / total),
        of=of,
    )


def _points(places: torch.Tensor, clusters: torch.Tensor) -> tuple[Point, ...]:
    return tuple(
        Point(round(x, 5), round(y, 5), cluster)
        for (x, y), cluster in zip(places.tolist(), clusters.tolist(), strict=True)
    )
