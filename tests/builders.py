"""Small, valid JASPER datasets for tests, written by torch.save alone so that they owe nothing to the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SPLITS = ("train", "val", "test")


def jasper_tensors(
    n_pairs: int = 50,
    dim: int = 16,
    n_neg: int = 3,
    n_questions: int = 40,
    n_sources: int = 45,
    n_keywords: int = 20,
    n_clusters: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Every tensor of a valid dataset by name; ``pair_keyword_ids`` is a list of lists."""
    g = torch.Generator().manual_seed(seed)

    def embeddings(n: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(n, dim, generator=g), dim=1).to(dtype)

    pair_index = torch.stack(
        [torch.randint(n_questions, (n_pairs,), generator=g), torch.randint(n_sources, (n_pairs,), generator=g)], dim=1
    )
    # A negative is the positive's row plus a non-zero step, so it never is the positive and never repeats.
    steps = torch.stack([torch.randperm(n_sources - 1, generator=g)[:n_neg] + 1 for _ in range(n_pairs)])
    shuffled = torch.randperm(n_pairs, generator=g)
    n_train, n_val = int(n_pairs * 0.7), int(n_pairs * 0.15)
    return {
        "question_embs": embeddings(n_questions),
        "source_embs": embeddings(n_sources),
        "keyword_embs": embeddings(n_keywords),
        "centroid_embs": embeddings(n_clusters),
        "pair_index": pair_index,
        "pair_cluster_id": torch.randint(n_clusters, (n_pairs,), generator=g),
        "pair_relevance": torch.rand(n_pairs, generator=g),
        "pair_keyword_ids": [
            torch.randint(n_keywords, (int(k),), generator=g).tolist()
            for k in torch.randint(0, 4, (n_pairs,), generator=g)
        ],
        "hard_negatives": (pair_index[:, 1:] + steps) % n_sources,
        "negative_tiers": torch.randint(3, (n_pairs, n_neg), generator=g),
        "steering_centroid": embeddings(n_pairs),
        "steering_keyword_weighted": embeddings(n_pairs),
        "steering_residual": embeddings(n_pairs),
        "centroid_distances": torch.rand(n_pairs, generator=g) * 2,
        "train_idx": shuffled[:n_train].sort().values,
        "val_idx": shuffled[n_train : n_train + n_val].sort().values,
        "test_idx": shuffled[n_train + n_val :].sort().values,
    }


def write_pt(path: Path, tensors: dict[str, Any], **config: Any) -> Path:
    """Write tensors as ``<name>.pt`` with a ``config.json`` that agrees with them, unless overridden."""
    path.mkdir(parents=True, exist_ok=True)
    for name, values in tensors.items():
        torch.save(values, path / f"{name}.pt")
    facts = {
        "embedding_dim": tensors["question_embs"].shape[1],
        "n_neg": tensors["hard_negatives"].shape[1],
        "n_clusters": len(tensors["centroid_embs"]),
        "dataset_name": "tests",
        "split_sizes": {split: len(tensors[f"{split}_idx"]) for split in SPLITS},
    }
    (path / "config.json").write_text(json.dumps(facts | config))
    return path


def build_pt_dataset(path: Path, *, config: dict[str, Any] | None = None, **sizes: Any) -> Path:
    """Write a valid PT dataset under ``path``; ``sizes`` as in :func:`jasper_tensors`."""
    return write_pt(path, jasper_tensors(**sizes), **(config or {}))
