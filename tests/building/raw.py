"""Raw embeddings and pairs for tests of ``build``, and every derived tensor computed again by numpy alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import jasper_store as js

__all__ = ["DERIVED", "expected", "raw", "values"]

DERIVED = ("centroid_embs", "steering_centroid", "steering_keyword_weighted", "steering_residual", "centroid_distances")


def raw(
    questions: int = 40, sources: int = 60, pairs: int = 80, dim: int = 12, clusters: int = 4, seed: int = 0
) -> dict[str, Any]:
    """Arguments of ``build``: clustered embeddings, pairs without repeats, keywords with lists, of which some are empty."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, dim))
    own = rng.integers(0, clusters, sources)
    source = centres[own] + 0.4 * rng.standard_normal((sources, dim))
    # Each question is asked once at least, near one of its sources; no pair is there twice.
    first = np.arange(questions) * sources + rng.integers(0, sources, questions)
    others = np.setdiff1d(rng.permutation(questions * sources)[: 2 * pairs], first)
    every = np.concatenate([first, rng.permutation(others)])[:pairs]
    index = np.stack((every // sources, every % sources), axis=1)
    question = rng.standard_normal((questions, dim)) * 0.3
    question[index[:, 0]] += source[index[:, 1]]
    lists = [rng.integers(0, 15, rng.integers(0, 4)).tolist() for _ in index]
    return {
        "questions": question.astype(np.float32),
        "sources": source.astype(np.float32),
        "pairs": rng.permutation(index),
        "keywords": rng.standard_normal((15, dim)).astype(np.float32),
        "pair_keywords": lists,
        "n_neg": 3,
    }


def normalized(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, zeros stay zeros."""
    rows = rows.astype(np.float64)
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    found: np.ndarray = np.divide(rows, length, out=np.zeros_like(rows), where=length > 1e-12)
    return found


def expected(given: dict[str, Any], cluster_of_source: np.ndarray, *, softmax: bool = False) -> dict[str, np.ndarray]:
    """Every tensor of :data:`DERIVED`, pair by pair, by the formulas of docs/domain.md, in float64."""
    question, source = normalized(given["questions"]), normalized(given["sources"])
    centroids = np.stack(
        [normalized(source[cluster_of_source == c].mean(axis=0)) for c in range(cluster_of_source.max() + 1)]
    )
    found: dict[str, list[Any]] = {name: [] for name in DERIVED[1:]}
    keyword = normalized(given["keywords"]) if given.get("keywords") is not None else None
    for p, (q_row, s_row) in enumerate(given["pairs"]):
        # Centroids are stored in float32, and steering is computed from those that are stored.
        q, c = question[q_row], centroids[cluster_of_source[s_row]].astype(np.float32).astype(np.float64)
        towards = c - q if np.linalg.norm(c - q) > 1e-6 else np.zeros_like(q)
        centroid = normalized(towards)
        weighted = centroid
        if keyword is not None and len(given["pair_keywords"][p]):
            own = keyword[given["pair_keywords"][p]]
            weights = np.exp(own @ q) if softmax else np.ones(len(own))
            weighted = normalized((weights[:, None] * own).sum(axis=0) / weights.sum())
        found["steering_centroid"].append(centroid)
        found["steering_keyword_weighted"].append(weighted)
        found["steering_residual"].append(-towards)
        found["centroid_distances"].append(1 - q @ c)
    return {"centroid_embs": centroids, **{name: np.array(rows) for name, rows in found.items()}}


def values(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a dataset, in memory."""
    with js.open(path, use_mmap=True) as store:
        return {name: store[name].tensor().clone() for name in store}
