"""Datasets of no kind that the library knows: tensors and a declaration beside them, written by the library's writer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tools.bench.library import library

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tools.bench.settings import Settings

__all__ = ["KINDS", "PREFIX", "GenericShape", "largest_file", "write"]

PREFIX = "generic-"
"""What names of such assets begin with: ``generic-labels.safetensors``."""
CLASSES = 1000
BLOCK = 65_536
KINDS = {"labels": "embeddings and labels", "triplets": "query, positive and 8 negatives"}
FIELDS = {
    "labels": {"emb": "embeddings[i]", "label": "labels[i]"},
    "triplets": {
        "query": "query_embs[pairs[i, 0]]",
        "positive": "passage_embs[pairs[i, 1]]",
        "negatives": "passage_embs[hard_negatives[i]]",
    },
}


@dataclass(frozen=True)
class GenericShape:
    """Sizes of a dataset.

    Attributes:
        kind: one of :data:`KINDS`.
        rows: samples, and rows of every tensor.
        dim: of embeddings.
        seed: of the noise.
        n_neg: hard negatives of a triplet.
    """

    kind: str
    rows: int
    dim: int
    seed: int
    n_neg: int = 8

    @classmethod
    def of(cls, kind: str, settings: Settings) -> GenericShape:
        """Half as many triplets as embeddings with labels, so that their two matrices take as many bytes.

        A memory limit of a third of it then holds some of the largest batches and the pages that their rows lie on.
        """
        rows = settings.generic_rows if kind == "labels" else settings.generic_rows // 2
        return cls(kind, rows, settings.dim, settings.seed)

    @property
    def sizes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor."""
        embeddings = ((self.rows, self.dim), torch.float32)
        if self.kind == "labels":
            return {"embeddings": embeddings, "labels": ((self.rows,), torch.int64)}
        return {
            "query_embs": embeddings,
            "passage_embs": embeddings,
            "pairs": ((self.rows, 2), torch.int64),
            "hard_negatives": ((self.rows, self.n_neg), torch.int64),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.sizes.values())

    @property
    def embeddings_per_sample(self) -> int:
        """Embeddings that one sample reads; each is a read of the disk where all are cold."""
        return 1 if self.kind == "labels" else 2 + self.n_neg


def write(layout: str, path: str, **shape: Any) -> dict[str, Any]:
    """Write a dataset in a format of the library, block by block; runs in a child."""
    facts = GenericShape(**shape)
    config = {"dataset_name": f"bench, {KINDS[facts.kind]}", "samples": {"fields": FIELDS[facts.kind]}}
    with library().DatasetWriter(path, format=layout, config=config) as writer:
        for number, name in enumerate(facts.sizes):
            for block in _blocks(facts, name, np.random.default_rng([facts.seed, 200 + number])):
                writer.append(name, torch.from_numpy(block))
    return {"nbytes": facts.nbytes}


def _blocks(shape: GenericShape, name: str, rng: np.random.Generator) -> Iterator[np.ndarray[Any, Any]]:
    size, dtype = shape.sizes[name]
    if name == "pairs":
        yield np.stack([rng.permutation(shape.rows) for _ in range(2)], axis=1)
        return
    for start in range(0, shape.rows, BLOCK):
        here = (min(BLOCK, shape.rows - start), *size[1:])
        if dtype is torch.float32:
            values = rng.random(here, dtype=np.float32) - np.float32(0.5)
            yield values / np.linalg.norm(values, axis=1, keepdims=True)
        else:
            yield rng.integers(0, CLASSES if name == "labels" else shape.rows, size=here)


def largest_file(path: Path) -> Path:
    """The file of a dataset that the disk is asked about."""
    return max((item for item in path.iterdir() if item.is_file()), key=lambda item: item.stat().st_size)
