"""``config.json`` of a built dataset: what a JASPER dataset says of itself, and what it was built from."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from jasper_store.building.gathered import Facts, Inputs
from jasper_store.building.mining import MiningSettings
from jasper_store.building.settings import BuildSettings
from jasper_store.building.target import BUILT
from jasper_store.building.write import Derived

__all__ = ["make_config", "plain"]


def make_config(
    key: str,
    name: str,
    *,
    inputs: Inputs,
    settings: BuildSettings,
    mining: MiningSettings,
    facts: Facts,
    derived: Derived,
    counts: dict[str, Any],
) -> dict[str, Any]:
    """The configuration, in plain values. It holds no time of day: the same inputs and settings give the same file.

    Args:
        key: of inputs and settings; a build that finds it has nothing to do.
        name: of the dataset.
        inputs: what it is built from.
        settings: options of the build.
        mining: options of the miner.
        facts: hashes and counts of the inputs.
        derived: what was computed.
        counts: what the miner counted.
    """
    sizes = {
        "questions": len(inputs.questions),
        "sources": len(inputs.sources),
        "pairs": len(inputs.pairs),
        "keywords": 0 if inputs.keywords is None else len(inputs.keywords),
        "clusters": len(derived.clusters.centroids),
        "dimensions": inputs.dim,
        "negatives_per_pair": settings.n_neg,
        **facts.duplicates,
    }
    return {
        "embedding_dim": inputs.dim,
        "n_neg": settings.n_neg,
        "n_clusters": sizes["clusters"],
        "dataset_name": name,
        "split_sizes": {name: len(rows) for name, rows in derived.splits.items()},
        BUILT: {
            "by": f"jasper_store {metadata.version('jasper-store')}",
            "key": key,
            "settings": {**settings.to_dict(), "mining": mining.to_dict()},
            "clusters": inputs.clusters[0] if isinstance(inputs.clusters, tuple) else "k-means",
            "splits": {name: plain(part) for name, part in inputs.splits.items()},
            "inputs": facts.digests,
            "counts": sizes,
            "mining": counts,
            "notes": _notes(inputs, derived),
        },
    }


def _notes(inputs: Inputs, derived: Derived) -> list[str]:
    found = []
    if inputs.relevance is None:
        found.append("relevance: none was given, so all are 1.0")
    if inputs.pair_keywords is None:
        found.append("keywords: none were given, so steering_keyword_weighted is steering_centroid")
    left = len(inputs.pairs) - sum(len(rows) for rows in derived.splits.values())
    if left:
        found.append(f"splits: {left} pairs are in none of those given")
    return found


def plain(part: float | torch.Tensor) -> float | str:
    """What ``config.json`` says of a split: its share, or how many pairs were given."""
    return part if isinstance(part, float) else f"{len(part)} pairs"
