"""JASPER datasets for measuring: right in shape and bounds, cheap to make, their embeddings mere seeded noise.

Written by ``torch.save`` and by plain code, so that what is measured did not make what it reads.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Shape", "write"]

KEYWORDS = 20_000
CLUSTERS = 64
ALIGNMENT = 4096
STEERING = ("steering_centroid", "steering_keyword_weighted", "steering_residual")
DTYPES = {torch.float32: "F32", torch.int64: "I64"}


@dataclass(frozen=True)
class Shape:
    """Sizes of a dataset.

    Attributes:
        pairs: pairs; also the rows of each steering tensor.
        pairs_per_row: pairs that share one question row, and one source row.
        dim: of embeddings.
        n_neg: negatives a pair.
        seed: of the noise.
    """

    pairs: int
    pairs_per_row: int
    dim: int
    n_neg: int
    seed: int

    @classmethod
    def named(cls, name: str, pairs: int, dim: int, n_neg: int, seed: int) -> Shape:
        """Of ``jasper``; of ``jasper-shared``, where 4 pairs share a row; of ``jasper-shared-large``, 5 times as many."""
        return cls(pairs * (5 if name.endswith("-large") else 1), 4 if "-shared" in name else 1, dim, n_neg, seed)

    @property
    def rows(self) -> int:
        """Question rows, and source rows."""
        return max(self.pairs // self.pairs_per_row, self.n_neg + 2)

    @property
    def sizes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every dense tensor but the splits."""
        wide = (self.pairs, self.n_neg)
        return {
            "question_embs": ((self.rows, self.dim), torch.float32),
            "source_embs": ((self.rows, self.dim), torch.float32),
            "keyword_embs": ((KEYWORDS, self.dim), torch.float32),
            "centroid_embs": ((CLUSTERS, self.dim), torch.float32),
            "pair_index": ((self.pairs, 2), torch.int64),
            "pair_cluster_id": ((self.pairs,), torch.int64),
            "pair_relevance": ((self.pairs,), torch.float32),
            "hard_negatives": (wide, torch.int64),
            "negative_tiers": (wide, torch.int64),
            **dict.fromkeys(STEERING, ((self.pairs, self.dim), torch.float32)),
            "centroid_distances": ((self.pairs,), torch.float32),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.sizes.values())

    def splits(self) -> dict[str, torch.Tensor]:
        """96 % of the pairs to train on, the rest for the other two."""
        bounds = [0, int(self.pairs * 0.96), int(self.pairs * 0.98), self.pairs]
        names = ("train_idx", "val_idx", "test_idx")
        return {name: torch.arange(bounds[i], bounds[i + 1]) for i, name in enumerate(names)}


def write(layout: str, path: str, *, sparse: bool = False, **shape: int) -> dict[str, Any]:
    """Write a dataset as ``"pt"`` or ``"safetensors"``; runs in a child. Sparse: big tensors are holes of the file."""
    directory, facts = Path(path), Shape(**shape)
    directory.mkdir(parents=True)
    if sparse:
        for name, (size, dtype) in facts.sizes.items():
            _hole(directory / f"{name}.safetensors", name, size, dtype)
        for name, values in facts.splits().items():
            _save(directory, name, values, "safetensors")
        _hole_keywords(directory, facts)
    else:
        for name, values in _tensors(facts):
            _save(directory, name, values, layout)
        _save_keywords(directory, facts, layout)
    _config(directory, facts)
    return {"nbytes": sum(item.stat().st_size for item in directory.iterdir())}


def _config(directory: Path, shape: Shape) -> None:
    config = {
        "embedding_dim": shape.dim,
        "n_neg": shape.n_neg,
        "n_clusters": CLUSTERS,
        "dataset_name": "bench",
        "split_sizes": {name.removesuffix("_idx"): len(values) for name, values in shape.splits().items()},
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _tensors(shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor at a time, so that the generator needs the memory of one."""
    for number, (name, (size, dtype)) in enumerate(shape.sizes.items()):
        rng = np.random.default_rng([shape.seed, 100 + number])
        if name.endswith("_embs") or name in STEERING:
            values = rng.random(size, dtype=np.float32) - np.float32(0.5)
            values /= np.linalg.norm(values, axis=1, keepdims=True)
        elif dtype is torch.float32:
            values = rng.random(size, dtype=np.float32)
        elif name == "pair_index":
            values = np.stack([rng.permutation(shape.pairs) % shape.rows for _ in range(2)], axis=1)
        elif name == "hard_negatives":
            values = _negatives(shape, rng)
        else:
            values = rng.integers(0, CLUSTERS if name == "pair_cluster_id" else 3, size=size)
        yield name, torch.from_numpy(values)
    yield from shape.splits().items()


def _negatives(shape: Shape, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Rows far from each other and from the positive: never it, never one twice."""
    positives = np.random.default_rng([shape.seed, 100 + list(shape.sizes).index("pair_index")])
    positives.permutation(shape.pairs)
    sources = positives.permutation(shape.pairs) % shape.rows
    step = (shape.rows - 1) // shape.n_neg
    first = rng.integers(0, step, size=(shape.pairs, 1))
    return (sources[:, None] + 1 + first + np.arange(shape.n_neg) * step) % shape.rows


def _keyword_ids(pairs: int, shape: Shape) -> list[tuple[str, torch.Tensor]]:
    rng = np.random.default_rng([shape.seed, 99])
    counts = rng.integers(1, 4, size=pairs)
    values = rng.integers(0, KEYWORDS, size=int(counts.sum()))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    parts = {"values": torch.from_numpy(values), "offsets": torch.from_numpy(offsets.astype(np.int64))}
    return [(f"pair_keyword_ids.{part}", tensor) for part, tensor in parts.items()]


def _save_keywords(directory: Path, shape: Shape, layout: str) -> None:
    parts = _keyword_ids(shape.pairs, shape)
    if layout == "pt":
        values, offsets = parts[0][1].tolist(), parts[1][1].tolist()
        lists = [values[offsets[i] : offsets[i + 1]] for i in range(shape.pairs)]
        torch.save(lists, directory / "pair_keyword_ids.pt")
        return
    for name, tensor in parts:
        _save(directory, name, tensor, layout)


def _hole_keywords(directory: Path, shape: Shape) -> None:
    """No pair has a keyword: offsets are zeros, which is what a hole reads as."""
    for part, rows in (("offsets", shape.pairs + 1), ("values", 0)):
        name = f"pair_keyword_ids.{part}"
        _hole(directory / f"{name}.safetensors", name, (rows,), torch.int64)


def _save(directory: Path, name: str, values: torch.Tensor, layout: str) -> None:
    if layout == "pt":
        torch.save(values, directory / f"{name}.pt")
        return
    with (directory / f"{name}.safetensors").open("wb") as file:
        file.write(_header(name, tuple(values.shape), values.dtype))
        file.write(values.numpy().data)


def _hole(path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    header = _header(name, shape, dtype)
    with path.open("wb") as file:
        file.write(header)
        file.flush()
        os.truncate(file.fileno(), len(header) + int(np.prod(shape)) * dtype.itemsize)


def _header(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    nbytes = int(np.prod(shape)) * dtype.itemsize
    entry = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [0, nbytes]}
    header = json.dumps({name: entry}).encode().ljust(ALIGNMENT - 8)
    return len(header).to_bytes(8, "little") + header
