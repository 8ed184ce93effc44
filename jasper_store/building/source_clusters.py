"""Which cluster a source belongs to, where only pairs have clusters."""

from __future__ import annotations

import numpy as np
import torch

from jasper_store.building.inputs import MiningInputs
from jasper_store.building.similarity import cosines, dots, product_error, sort_keys
from jasper_store.building.vectors import Vectors

__all__ = ["centroids_of", "clusters_of_sources"]

_BLOCK = 1 << 12


def clusters_of_sources(
    inputs: MiningInputs, pair_source: np.ndarray, pair_clusters: np.ndarray, sources: Vectors
) -> np.ndarray:
    """Cluster of each source, int64 [S]; -1 where nothing says.

    As given; else that of the first pair that has the source, else that of the nearest centroid.
    """
    if inputs.source_clusters is not None:
        return inputs.source_clusters.astype(np.int64)
    found = np.full(sources.n_rows, -1, np.int64)
    found[pair_source[::-1]] = pair_clusters[::-1]  # of several the first stays
    rest = np.flatnonzero(found < 0)
    if inputs.centroids is not None:
        centroids = torch.from_numpy(np.ascontiguousarray(inputs.centroids))
        for start in range(0, len(rest), _BLOCK):
            rows = rest[start : start + _BLOCK]
            found[rows] = _nearest(sources, rows, centroids)
    return found


def _nearest(sources: Vectors, rows: np.ndarray, centroids: torch.Tensor) -> np.ndarray:
    """Nearest centroid of each source by cosine, ties by number."""
    norms = np.sqrt(dots(centroids, centroids))
    norms[norms == 0] = 1.0
    unit = (centroids.to(torch.float64) / torch.from_numpy(norms)[:, None]).to(torch.float32)
    near = sources.unit(rows) @ unit.T
    floor = near.amax(dim=1, keepdim=True) - 2 * product_error(sources.dim)
    at, cluster = (part.numpy() for part in (near >= floor).nonzero(as_tuple=True))
    exact = cosines(dots(sources.raw(rows[at]), centroids[cluster]), sources.norms[rows[at]], norms[cluster])
    order = np.lexsort((sort_keys(exact, cluster), at))
    return np.asarray(cluster[order][np.searchsorted(at[order], np.arange(len(rows)))])


def centroids_of(sources: Vectors, clusters: np.ndarray, count: int) -> torch.Tensor:
    """Mean of the sources of each cluster at length 1, float32 [C, D]; zeros for one without sources.

    Added up row after row in float64, so that blocks change no bit.
    """
    sums = torch.zeros((count, sources.dim), dtype=torch.float64)
    members = np.flatnonzero(clusters >= 0)
    for start in range(0, len(members), _BLOCK):
        rows = members[start : start + _BLOCK]
        np.add.at(sums.numpy(), clusters[rows], sources.unit(rows).numpy().astype(np.float64))
    sizes = np.maximum(np.bincount(clusters[members], minlength=count), 1)
    return (sums / torch.from_numpy(sizes)[:, None]).to(torch.float32)
