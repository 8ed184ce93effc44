"""A synthetic JASPER dataset of any size: clustered embeddings from which everything else is really computed.

Clusters are random directions; a source lies near its cluster, a question near its source. Steering, distances,
tiers and negatives are then computed from these embeddings as a builder would, so a model that trains on them
learns. Made block by block: memory does not grow with the number of pairs.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch

from jasper_store.conversion.writer import DirectoryWriter
from jasper_store.errors import IncompatibleOptionsError
from jasper_store.jasper.schema import PAIR_KEYWORDS, SCHEMA
from jasper_store.loading.order import order

__all__ = ["SynthOptions", "synthesize"]

_BLOCK = 1 << 15
_KEYWORDS_PER_CLUSTER = 16
_KEYWORDS_PER_PAIR = 3
_NEAR_SPREAD, _SOURCE_SPREAD = 0.6, 0.9


@dataclass(frozen=True, slots=True)
class SynthOptions:
    """What to make.

    Attributes:
        pairs: number of (question, source) pairs; there are as many questions and sources.
        dim: embedding dimension.
        n_neg: hard negatives per pair.
        clusters: number of clusters.
        seed: the dataset is a pure function of all options.
        dtype: floating dtype of the embeddings.
        val_share: share of the validation split; the test split gets as much.
    """

    pairs: int
    dim: int = 384
    n_neg: int = 5
    clusters: int = 64
    seed: int = 0
    dtype: torch.dtype = torch.float32
    val_share: float = 0.1

    def __post_init__(self) -> None:
        if self.pairs < 2 * self.clusters or self.clusters < 2 or self.dim < 1 or self.n_neg < 1:
            raise IncompatibleOptionsError(
                "a synthetic dataset needs at least 2 clusters, 2 pairs per cluster, 1 dimension and 1 negative;"
                f" found pairs={self.pairs}, clusters={self.clusters}, dim={self.dim}, n_neg={self.n_neg}"
            )
        if self.pairs // self.clusters <= self.n_neg:
            raise IncompatibleOptionsError(
                f"{self.pairs} pairs in {self.clusters} clusters leave fewer than n_neg={self.n_neg} other sources"
                " in a cluster; use more pairs, fewer clusters or fewer negatives"
            )
        if not 0 < self.val_share < 0.5:  # two such splits have to leave something to train on
            raise IncompatibleOptionsError(f"val_share should lie between 0 and 0.5, found {self.val_share}")


def synthesize(
    path: str | PathLike[str],
    options: SynthOptions,
    *,
    format: str = "safetensors",  # noqa: A002 (the library's word for it)
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a synthetic dataset, published atomically with its manifest.

    Args:
        path: directory to make.
        options: sizes and seed.
        format: storage format.
        overwrite: replace a dataset that is there.
        progress: called with pairs done and pairs in all.

    Returns:
        The directory.

    Raises:
        ConversionError: it could not be written; nothing was left behind.
    """
    target = Path(path)
    world = _World(options)
    with DirectoryWriter(target, format=format, config=_config(options), schema=SCHEMA, overwrite=overwrite) as writer:
        writer.append("centroid_embs", world.centroids.to(options.dtype))
        writer.append("keyword_embs", world.keywords.to(options.dtype))
        for block in range(world.blocks):
            rows = world.rows(block)
            for name, values in _block(world, block):
                writer.append(name, values)
            writer.append_ragged(PAIR_KEYWORDS, world.keyword_ids(rows).tolist())
            if progress is not None:
                progress(int(rows[-1]) + 1, options.pairs)
        for name, values in _splits(options):
            writer.append(name, values)
    return target


class _World:
    """Embeddings by row, computed where they are needed: a source is a function of its row."""

    def __init__(self, options: SynthOptions) -> None:
        self.options = options
        generator = torch.Generator().manual_seed(options.seed)
        self.centroids = _unit(torch.randn(options.clusters, options.dim, generator=generator))
        spread = torch.randn(options.clusters, _KEYWORDS_PER_CLUSTER, options.dim, generator=generator)
        near = self.centroids[:, None, :] + _noise(spread, _NEAR_SPREAD)
        self.keywords = _unit(near.reshape(-1, options.dim))
        self.blocks = -(-options.pairs // _BLOCK)

    def clusters(self, rows: torch.Tensor) -> torch.Tensor:
        """Cluster of each row: blocks of rows deal them out in turn, so a block holds all of them."""
        return rows % self.options.clusters

    def sources(self, block: int) -> torch.Tensor:
        """Source embeddings of one block of rows."""
        rows = self.rows(block)
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + 2 * block + 1)
        noise = torch.randn(len(rows), self.options.dim, generator=generator)
        return _unit(self.centroids[self.clusters(rows)] + _noise(noise, _SOURCE_SPREAD))

    def questions(self, block: int, sources: torch.Tensor) -> torch.Tensor:
        """Question embeddings: near their source, yet not on it."""
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + 2 * block + 2)
        return _unit(sources + _noise(torch.randn(sources.shape, generator=generator), _SOURCE_SPREAD))

    def rows(self, block: int) -> torch.Tensor:
        """Rows of a block; all blocks are of about one size, so that the last has neighbours to mine too."""
        pairs = self.options.pairs
        return torch.arange(pairs * block // self.blocks, pairs * (block + 1) // self.blocks)

    def keyword_ids(self, rows: torch.Tensor) -> torch.Tensor:
        """Keyword rows [n, k] of each pair: some of its cluster's."""
        steps = torch.arange(_KEYWORDS_PER_PAIR)
        within = (rows[:, None] // self.options.clusters + steps) % _KEYWORDS_PER_CLUSTER
        return self.clusters(rows)[:, None] * _KEYWORDS_PER_CLUSTER + within


def _unit(values: torch.Tensor) -> torch.Tensor:
    unit: torch.Tensor = torch.nn.functional.normalize(values, dim=-1)
    return unit


def _noise(normal: torch.Tensor, length: float) -> torch.Tensor:
    """Gaussian noise of about this length, whatever the dimension."""
    return normal.mul(length / normal.shape[-1] ** 0.5)


def _block(world: _World, block: int) -> Iterator[tuple[str, torch.Tensor]]:
    options = world.options
    rows = world.rows(block)
    clusters = world.clusters(rows)
    sources = world.sources(block)
    questions = world.questions(block, sources)
    negatives, tiers = _mine(world, rows, questions, sources)
    centroids = world.centroids[clusters]
    keywords = world.keywords[world.keyword_ids(rows)]
    weights = torch.softmax(torch.einsum("nd,nkd->nk", questions, keywords), dim=1)
    cosine = (questions * centroids).sum(dim=1)
    yield "question_embs", questions.to(options.dtype)
    yield "source_embs", sources.to(options.dtype)
    yield "pair_index", torch.stack((rows, rows), dim=1)
    yield "pair_cluster_id", clusters
    yield "pair_relevance", ((questions * sources).sum(dim=1).clamp(-1, 1) + 1) / 2
    yield "hard_negatives", negatives
    yield "negative_tiers", tiers
    yield "steering_centroid", centroids.to(options.dtype)
    yield "steering_keyword_weighted", _unit(torch.einsum("nk,nkd->nd", weights, keywords)).to(options.dtype)
    yield "steering_residual", (questions - centroids).to(options.dtype)
    yield "centroid_distances", 1 - cosine.clamp(-1, 1)


def _mine(
    world: _World, rows: torch.Tensor, questions: torch.Tensor, sources: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hard negatives and tiers: the most similar of some candidates of the block, by thirds of the similarity order.

    Candidates are other rows of the block at distances that grow, half of them of the same cluster, so that each is
    another source and none repeats; the tier of the chosen says how similar it is to the question.
    """
    options = world.options
    step = options.clusters
    count = min(4 * options.n_neg, len(rows) - 1)
    same = torch.arange(1, count + 1) * step
    offsets = torch.unique(torch.cat((same, torch.arange(1, count + 1))) % len(rows))
    offsets = offsets[offsets != 0]
    places = (torch.arange(len(rows))[:, None] + offsets) % len(rows)
    similarity = torch.empty(places.shape)
    for column in range(places.shape[1]):
        similarity[:, column] = (questions * sources[places[:, column]]).sum(dim=1)
    hardest = similarity.topk(options.n_neg, dim=1).indices
    chosen = places.gather(1, hardest)
    rank = similarity.gather(1, hardest)
    low, high = torch.quantile(rank[: 1 << 12].flatten(), torch.tensor([1 / 3, 2 / 3]))
    return rows[0] + chosen, (rank >= low).long() + (rank >= high).long()


def _splits(options: SynthOptions) -> Iterator[tuple[str, torch.Tensor]]:
    """A random partition of the pairs, by the keyed bijection, each part sorted."""
    shuffled = order(options.pairs, options.seed, 0)
    held = max(1, int(options.pairs * options.val_share))
    bounds = {"val_idx": (0, held), "test_idx": (held, 2 * held), "train_idx": (2 * held, options.pairs)}
    for name, (start, stop) in bounds.items():
        yield name, shuffled[torch.arange(start, stop)].sort().values


def _config(options: SynthOptions) -> dict[str, object]:
    held = max(1, int(options.pairs * options.val_share))
    return {
        "embedding_dim": options.dim,
        "n_neg": options.n_neg,
        "n_clusters": options.clusters,
        "dataset_name": f"synthetic-{options.pairs}",
        "created_at": dt.datetime.now(tz=dt.timezone.utc).isoformat(timespec="seconds"),
        "split_sizes": {"train": options.pairs - 2 * held, "val": held, "test": held},
    }
