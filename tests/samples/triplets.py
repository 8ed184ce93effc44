"""A dataset of triplets with negatives and labels, declared in ``config.json``, and what its epochs must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

__all__ = ["FIELDS", "N_TRAIN", "SPLITS", "canonical", "expected", "tensors", "whole_of", "write"]

N, N_TRAIN = 230, 130
FIELDS = {
    "_pair": "pairs[row]",
    "id": "ids[row]",
    "anchor": "queries[pairs[row, 0]]",
    "positive": "passages[pairs[row, -1]]",
    "pair": "passages[_pair]",
    "negatives": "passages[negatives[row]]",
    "labels": "labels[negatives[row]]",
    "words": "words[row]",
    "weight": "weights[i]",
}
"""Ragged, nested, by row and by position."""
SPLITS = {"train": "train", "val": "val"}


def tensors() -> dict[str, torch.Tensor]:
    """The same tensors in every process."""
    g = torch.Generator().manual_seed(4)
    lengths = torch.randint(4, (N,), generator=g)
    return {
        "queries": torch.randn(90, 12, generator=g),
        "passages": torch.randn(110, 12, generator=g).bfloat16(),
        "pairs": torch.randint(90, (N, 2), generator=g),
        "negatives": torch.randint(110, (N, 3), generator=g).to(torch.int32),
        "labels": torch.randint(7, (110,), generator=g).to(torch.int8),
        "ids": torch.randperm(N, generator=g),
        "words.values": torch.randint(1000, (int(lengths.sum()),), generator=g),
        "words.offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        "weights": torch.rand(N_TRAIN, generator=g).double(),
        "train": torch.randperm(N, generator=g)[:N_TRAIN],
        "val": torch.randperm(N, generator=g)[:20],
    }


def write(directory: Path) -> Path:
    """Files of safetensors' own, and a declaration."""
    directory.mkdir(parents=True)
    for name, value in tensors().items():
        save_file({name: value}, directory / f"{name}.safetensors")
    (directory / "config.json").write_text(json.dumps({"samples": {"fields": FIELDS, "splits": SPLITS}}))
    return directory


def expected(positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """Samples of the training split at these positions, by plain indexing."""
    t = tensors()
    rows = t["train"][positions]
    ends = t["words.offsets"]
    words = [t["words.values"][int(ends[row]) : int(ends[row + 1])] for row in rows]
    return {
        "id": t["ids"][rows],
        "anchor": t["queries"][t["pairs"][rows, 0]],
        "positive": t["passages"][t["pairs"][rows, 1]],
        "pair": t["passages"][t["pairs"][rows]],
        "negatives": t["passages"][t["negatives"][rows].long()],
        "labels": t["labels"][t["negatives"][rows].long()],
        "words.values": torch.cat([*words, torch.empty(0, dtype=torch.int64)]),
        "words.offsets": torch.tensor([0, *map(len, words)]).cumsum(0),
        "weight": t["weights"][positions],
    }


def whole_of(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Batches one after the other."""
    whole: dict[str, Any] = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    lengths = torch.cat([batch["words.offsets"].diff() for batch in batches])
    whole["words.offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return whole


def canonical(samples: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In the order of their ids, which are another for every sample."""
    place = samples["id"].argsort()
    found = {key: value[place] for key, value in samples.items() if not key.startswith("words.")}
    rows = torch.split(samples["words.values"], samples["words.offsets"].diff().tolist())
    lengths = samples["words.offsets"].diff()[place]
    words = {
        "words.values": torch.cat([rows[number] for number in place.tolist()]),
        "words.offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
    }
    return {key: (found | words)[key] for key in samples}
