"""The dataset that a user writes first: tensors in RAM, one row of each by ``__getitem__``, default collation.

The measure of "per-sample access": it shares no line with this library.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["PlainDataset", "PlainLabels", "PlainTriplets"]

STEERING = ("steering_centroid", "steering_keyword_weighted", "steering_residual")
FIRST_EPOCH = (0.7, 0.2, 0.1, 0.0)


class PlainDataset(Dataset[dict[str, torch.Tensor]]):
    """Train split of a JASPER dataset in ``.pt`` or ``.safetensors`` files, everything in memory."""

    def __init__(self, directory: Path) -> None:
        self.data: dict[str, torch.Tensor] = {}
        for path in sorted(directory.glob("*.pt")):
            if not path.stem.startswith("pair_keyword_ids"):
                self.data[path.stem] = torch.load(path, weights_only=True)
        for path in sorted(directory.glob("*.safetensors")):
            self.data |= load_file(path)
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self.none = torch.zeros(config["embedding_dim"])
        self.rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.data["train_idx"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample."""
        data = self.data
        pair = int(data["train_idx"][index])
        question, source = data["pair_index"][pair].tolist()
        variant = int(self.rng.choice(4, p=FIRST_EPOCH))
        return {
            "question_emb": data["question_embs"][question],
            "target_source_emb": data["source_embs"][source],
            "steering": self.none if variant == 0 else data[STEERING[variant - 1]][pair],
            "negative_embs": data["source_embs"][data["hard_negatives"][pair]],
            "cluster_id": data["pair_cluster_id"][pair],
            "relevance": data["pair_relevance"][pair],
            "centroid_distance": data["centroid_distances"][pair],
            "steering_variant": torch.tensor(variant),
            "negative_tiers": data["negative_tiers"][pair],
        }


class PlainLabels(Dataset[dict[str, torch.Tensor]]):
    """Embeddings and labels in ``.safetensors`` files, everything in memory."""

    def __init__(self, directory: Path) -> None:
        self.data: dict[str, torch.Tensor] = {}
        for path in sorted(directory.glob("*.safetensors")):
            self.data |= load_file(path)

    def __len__(self) -> int:
        return len(self.data["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample."""
        return {"emb": self.data["embeddings"][index], "label": self.data["labels"][index]}


class PlainTriplets(PlainLabels):
    """Queries, positives and negatives in ``.safetensors`` files, everything in memory."""

    def __len__(self) -> int:
        return len(self.data["pairs"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample."""
        query, passage = self.data["pairs"][index].tolist()
        return {
            "query": self.data["query_embs"][query],
            "positive": self.data["passage_embs"][passage],
            "negatives": self.data["passage_embs"][self.data["hard_negatives"][index]],
        }
