"""The tensors of a built dataset, block by block, into a hidden directory that is published whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from jasper_store.building.clusters import Clusters
from jasper_store.building.finder import Ragged
from jasper_store.building.gathered import Inputs
from jasper_store.building.rows import Matrix, unit
from jasper_store.building.settings import BuildSettings
from jasper_store.building.steering import mean_keywords, steer
from jasper_store.conversion.writer import DirectoryWriter
from jasper_store.formats.registry import writable
from jasper_store.jasper.schema import PAIR_KEYWORDS, split_tensor

__all__ = ["Derived", "output_nbytes", "write_tensors"]


@dataclass(frozen=True)
class Derived:
    """What was computed from the inputs before steering, which is computed while it is written.

    Attributes:
        clusters: see :class:`Clusters`.
        negatives: rows of sources, int64 [P, n_neg].
        tiers: of each negative, int64 [P, n_neg].
        splits: pairs of each split.
        more: further tensors of the miner, by name.
    """

    clusters: Clusters
    negatives: torch.Tensor
    tiers: torch.Tensor
    splits: Mapping[str, torch.Tensor]
    more: Mapping[str, torch.Tensor]


def output_nbytes(inputs: Inputs, settings: BuildSettings, clusters: int) -> int:
    """Bytes that writing takes on the disk, from the shapes alone: HDF5 holds everything twice until it is published."""
    pairs, item = len(inputs.pairs), inputs.questions.dtype.itemsize
    embeddings = sum(matrix.nbytes for matrix in inputs.embeddings)
    steering = 3 * pairs * inputs.dim * item
    each = 16 + 8 + 4 + 4 + 16 * settings.n_neg + 8 + (4 + 4 * settings.n_neg) * settings.keep_similarities
    lists = 0
    if inputs.pair_keywords is not None:
        lists = 8 * (len(inputs.pair_keywords.values) + pairs + 1)
    whole = embeddings + steering + pairs * each + lists + clusters * inputs.dim * 4
    fmt = writable(settings.format)
    return whole * 2 if fmt.one_file is not None else whole + lists * (fmt.name == "pt")


def write_tensors(
    writer: DirectoryWriter,
    inputs: Inputs,
    derived: Derived,
    settings: BuildSettings,
    block_rows: int,
    progress: Callable[[int], None],
) -> None:
    """Append every tensor of the dataset; ``progress`` is called with the number of pairs, or of embeddings, of a block.

    Raises:
        ConversionError: no room.
    """
    names = {"questions": "question_embs", "sources": "source_embs", "keywords": "keyword_embs"}
    for matrix in inputs.embeddings:
        for block in matrix.blocks(block_rows):
            writer.append(names[matrix.role], block)
            progress(len(block))
    writer.append("centroid_embs", derived.clusters.centroids)
    for start in range(0, len(inputs.pairs), block_rows):
        rows = slice(start, min(start + block_rows, len(inputs.pairs)))
        for name, values in _pair_tensors(inputs, derived, rows):
            writer.append(name, values)
        for name, values in _steering(inputs, derived.clusters, settings, rows):
            writer.append(name, values)
        if inputs.pair_keywords is not None:
            _append_lists(writer, *inputs.pair_keywords.part(rows.start, rows.stop))
        progress(rows.stop - rows.start)
    for split, pairs in derived.splits.items():
        writer.append(split_tensor(split), pairs)  # type: ignore[arg-type]


def _pair_tensors(inputs: Inputs, derived: Derived, rows: slice) -> Iterator[tuple[str, torch.Tensor]]:
    count = rows.stop - rows.start
    yield "pair_index", inputs.pairs[rows]
    yield "pair_cluster_id", derived.clusters.of_pairs[rows]
    yield "pair_relevance", torch.ones(count) if inputs.relevance is None else inputs.relevance[rows]
    yield "hard_negatives", derived.negatives[rows]
    yield "negative_tiers", derived.tiers[rows]
    for name, values in derived.more.items():
        yield name, values[rows]


def _steering(
    inputs: Inputs, clusters: Clusters, settings: BuildSettings, rows: slice
) -> Iterator[tuple[str, torch.Tensor]]:
    questions = unit(inputs.questions.take(inputs.pairs[rows, 0]))
    centroids = clusters.centroids[clusters.of_pairs[rows]].double()
    keywords = _keyword_means(inputs, settings, questions, rows)
    found = steer(questions, centroids, keywords, normalize_residual=settings.normalize_residual)
    dtype = inputs.questions.dtype
    yield "steering_centroid", found.centroid.to(dtype)
    yield "steering_keyword_weighted", found.keyword_weighted.to(dtype)
    yield "steering_residual", found.residual.to(dtype)
    yield "centroid_distances", found.distances.float()


def _keyword_means(
    inputs: Inputs, settings: BuildSettings, questions: torch.Tensor, rows: slice
) -> torch.Tensor | None:
    if inputs.pair_keywords is None or inputs.keywords is None:
        return None
    means = []
    # Lists may be long, so that their embeddings are taken for a few pairs at a time.
    for start in range(rows.start, rows.stop, _pairs_at_once(inputs.pair_keywords, rows)):
        stop = min(start + _pairs_at_once(inputs.pair_keywords, rows), rows.stop)
        values, lengths = inputs.pair_keywords.part(start, stop)
        part = questions[start - rows.start : stop - rows.start]
        means.append(mean_keywords(part, _unit_rows(inputs.keywords, values), lengths, settings.keyword_weights))
    return torch.cat(means)


def _pairs_at_once(lists: Ragged, rows: slice) -> int:
    """Pairs of which about as many keywords are taken as the block has pairs."""
    longest = int(lists.offsets.part(rows.start, rows.stop + 1).long().diff().max())
    count: int = rows.stop - rows.start
    return max(1, count // max(longest, 1))


def _unit_rows(keywords: Matrix, rows: torch.Tensor) -> torch.Tensor:
    return unit(keywords.take(rows))


def _append_lists(writer: DirectoryWriter, values: torch.Tensor, lengths: torch.Tensor) -> None:
    ends, flat = lengths.cumsum(0).tolist(), values.tolist()
    writer.append_ragged(PAIR_KEYWORDS, [flat[a:b] for a, b in pairwise([0, *ends])])
