"""How well a question finds its positive: cosines, margin, recall@1 and suspected false negatives, of a sample of pairs.

Rows are taken in blocks of bounded bytes, so data may be mapped and larger than memory. The same pairs and the same
sources are looked at each time, whatever the placement.

A query is ``normalize(question + steering)``, the question being normalised and the steering as it is stored: what the
predictor of :mod:`jasper_store.model` computes with its gate fully open and without a correction. Recall@1 has two
definitions, since each hides something. Among the pair's own hard negatives it is what training reports, and compares
only with what the miner found; among a sample of sources it says what a search would find, but grows easier the fewer
sources are drawn. There, what is as good as the positive is no competitor: known positives of the same question, and
sources of the same embedding as the positive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from jasper_store.jasper.schema import STEERING_TENSORS
from jasper_store.jasper.steering import VARIANTS
from jasper_store.model.predictor import SAME_SOURCE, recall_at_1
from jasper_store.report.histogram import BINS, Histogram, Tier, by_tier, histogram
from jasper_store.report.positives import KnownPositives
from jasper_store.report.rows import random_rows, unit
from jasper_store.report.suspects import Suspects, find_suspects
from jasper_store.store.store import TensorStore

__all__ = ["Ranking", "Recall", "look_at_ranking"]

_PAIRS = 4096
_BLOCK_PAIRS = 128
_BLOCK_NBYTES = 32 << 20
_SOURCES = 8192
_SOURCES_NBYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Recall:
    """Share of queries that find their positive first, 0 to 1; a tie is a miss.

    Attributes:
        steering: name of the steering variant that was added to the question; ``"none"`` for the question alone.
        negatives: among the positive and the hard negatives of its pair.
        sources: among the positive and a sample of all sources.
    """

    steering: str
    negatives: float
    sources: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """How questions compare with positives and negatives.

    Attributes:
        pairs: pairs that were looked at.
        of: pairs that there are.
        not_finite: pairs that were drawn and left out, because an embedding of theirs is not finite.
        positive: cosine of the question with its positive.
        tiers: cosine of the question with its negatives, by tier.
        margin: cosine of the positive minus that of the most similar negative; 0 is an edge of its bins.
        not_above: share of pairs with a margin of 0 or less.
        sources: sources that were drawn for recall.
        of_sources: sources that there are.
        recall: of the question alone, and with each steering.
        suspects: negatives that may be positives.
    """

    pairs: int
    of: int
    not_finite: int
    positive: Histogram
    tiers: tuple[Tier, ...]
    margin: Histogram
    not_above: float
    sources: int
    of_sources: int
    recall: tuple[Recall, ...]
    suspects: Suspects


@dataclass(slots=True)
class _Block:
    """Some pairs and their embeddings, of length 1; ``steered`` is one query per variant."""

    rows: torch.Tensor  # [n]
    index: torch.Tensor  # [n, 2]
    chosen: torch.Tensor  # [n, k]
    tier: torch.Tensor  # [n, k]
    positive: torch.Tensor  # [n, D]
    negative: torch.Tensor  # [n, k, D]
    steered: tuple[torch.Tensor, ...]  # [n, D] each
    same: torch.Tensor  # [n, k]: the stored bytes are those of the positive

    def kept(self, keep: torch.Tensor) -> _Block:
        """These pairs alone."""
        return _Block(
            rows=self.rows[keep],
            index=self.index[keep],
            chosen=self.chosen[keep],
            tier=self.tier[keep],
            positive=self.positive[keep],
            negative=self.negative[keep],
            steered=tuple(query[keep] for query in self.steered),
            same=self.same[keep],
        )

    def finite(self) -> torch.Tensor:
        """Of which pairs every embedding is finite [n]."""
        found = self.positive.isfinite().all(dim=1) & self.negative.isfinite().flatten(1).all(dim=1)
        for query in self.steered:
            found &= query.isfinite().all(dim=1)
        return found


def look_at_ranking(store: TensorStore, pairs: int) -> Ranking:
    """Compare questions with their positives, their negatives and a sample of sources.

    Args:
        store: an open JASPER dataset whose structure and indices were checked.
        pairs: how many it has.
    """
    rows = random_rows(pairs, _PAIRS)
    index = store["pair_index"].take(rows).long()
    known = KnownPositives.of(store["pair_index"], index, store["source_embs"].n_rows)
    rivals = _Rivals.drawn(store, known)
    seen = [_compare(block, rivals) for block in _blocks(store, rows, index)]
    return _ranking(_Seen.joined(seen), known, len(rivals.rows), len(rows), pairs)


def _blocks(store: TensorStore, rows: torch.Tensor, index: torch.Tensor) -> Iterator[_Block]:
    """Pairs whose embeddings are all finite, some at a time; at least one block, which may be empty."""
    n_neg, dim = store["hard_negatives"].shape[1], store["source_embs"].shape[1]
    together = max(1, min(_BLOCK_PAIRS, _BLOCK_NBYTES // max((n_neg + 5) * dim * 4, 1)))
    _prefetch(store, rows[:together], index[:together])
    for start in range(0, max(len(rows), 1), together):
        stop = start + together
        # The rows of the next block are read while this one is compared.
        _prefetch(store, rows[stop : stop + together], index[stop : stop + together])
        block = _read(store, rows[start:stop], index[start:stop])
        yield block.kept(block.finite())


def _prefetch(store: TensorStore, rows: torch.Tensor, index: torch.Tensor) -> None:
    """Ask the kernel for the embeddings of some pairs; without it each row of a cold map is waited for by itself."""
    chosen = store["hard_negatives"].take(rows).long()
    store["source_embs"].prefetch(torch.cat((index[:, 1], chosen.flatten())))
    store["question_embs"].prefetch(index[:, 0].contiguous())
    for name in STEERING_TENSORS:
        store[name].prefetch(rows)


def _read(store: TensorStore, rows: torch.Tensor, index: torch.Tensor) -> _Block:
    chosen = store["hard_negatives"].take(rows).long()
    positive = store["source_embs"].take(index[:, 1])
    negative = store["source_embs"].take(chosen.flatten()).reshape(*chosen.shape, *positive.shape[1:])
    question = unit(store["question_embs"].take(index[:, 0]))
    steered = [unit(question + store[name].take(rows).float()) for name in STEERING_TENSORS]
    return _Block(
        rows=rows,
        index=index,
        chosen=chosen,
        tier=store["negative_tiers"].take(rows).long(),
        positive=unit(positive),
        negative=unit(negative),
        steered=(question, *steered),
        same=(negative == positive[:, None]).all(dim=2),
    )


@dataclass(slots=True)
class _Seen:
    """What is kept of pairs once their embeddings were compared; all of the same length."""

    rows: torch.Tensor  # [n]
    index: torch.Tensor  # [n, 2]
    chosen: torch.Tensor  # [n, k]
    tier: torch.Tensor  # [n, k]
    same: torch.Tensor  # [n, k]
    cosines: torch.Tensor  # [n, 1 + k]: the question with the positive, and with each negative
    hits: torch.Tensor  # [n, variants, 2]: found among the pair's negatives, and among the sources drawn

    @classmethod
    def joined(cls, parts: list[_Seen]) -> _Seen:
        """All of them, in their order."""
        return cls(*(torch.cat([getattr(part, each.name) for part in parts]) for each in fields(cls)))


def _compare(block: _Block, rivals: _Rivals) -> _Seen:
    question = block.steered[0]
    positive = (question * block.positive).sum(dim=1, keepdim=True)
    return _Seen(
        rows=block.rows,
        index=block.index,
        chosen=block.chosen,
        tier=block.tier,
        same=block.same,
        cosines=torch.cat((positive, torch.einsum("nd,nkd->nk", question, block.negative)), dim=1),
        hits=torch.stack(list(_hits(block, rivals)), dim=1),
    )


def _hits(block: _Block, rivals: _Rivals) -> Iterator[torch.Tensor]:
    """For each steering: which pairs find their positive among their negatives, and among the sources drawn [n, 2]."""
    served = {"target_source_emb": block.positive, "negative_embs": block.negative}
    competing = rivals.competing(block)
    for query in block.steered:
        best = (query @ rivals.embeddings.T).masked_fill_(~competing, float("-inf")).amax(dim=1)
        yield torch.stack((recall_at_1(query, served), (query * block.positive).sum(dim=1) > best), dim=1)


@dataclass(frozen=True, slots=True)
class _Rivals:
    """Sources that queries are compared with: their rows, ascending [c], and embeddings of length 1 [c, D]."""

    rows: torch.Tensor
    embeddings: torch.Tensor
    known: KnownPositives

    @classmethod
    def drawn(cls, store: TensorStore, known: KnownPositives) -> _Rivals:
        """A sample of bounded bytes."""
        sources = store["source_embs"]
        at_most = max(1, min(_SOURCES, _SOURCES_NBYTES // max(sources.shape[1] * 4, 1)))
        rows = random_rows(sources.n_rows, at_most)
        sources.prefetch(rows)
        return cls(rows, unit(sources.take(rows)), known)

    def competing(self, block: _Block) -> torch.Tensor:
        """Which of them are not as good as the positive of each pair [n, c]; what is not finite is none."""
        found = block.positive @ self.embeddings.T <= SAME_SOURCE
        place, source = self.known.of_questions(block.index[:, 0])
        column = torch.searchsorted(self.rows, source).clamp_(max=len(self.rows) - 1)
        there = self.rows[column] == source
        found[place[there], column[there]] = False
        return found


def _ranking(seen: _Seen, known: KnownPositives, sources: int, drawn: int, of: int) -> Ranking:
    """The figures.

    Args:
        seen: the pairs that were compared.
        known: positives of the questions.
        sources: how many sources were drawn.
        drawn: pairs that were drawn.
        of: pairs that there are.
    """
    positive, negative = seen.cosines[:, 0], seen.cosines[:, 1:]
    margin = positive - negative.amax(dim=1)
    low, high = _edges(seen.cosines)
    shares = seen.hits.double().sum(dim=0) / max(len(seen.hits), 1)
    return Ranking(
        pairs=len(positive),
        of=of,
        not_finite=drawn - len(positive),
        positive=histogram(positive, of, low, high),
        tiers=by_tier(negative, seen.tier, of * negative.shape[1], low, high),
        margin=histogram(margin, of, *_around_zero(margin)),
        not_above=float((margin <= 0).double().mean()) if len(margin) else 0.0,
        sources=sources,
        of_sources=known.sources,
        recall=tuple(Recall(name, *each) for name, each in zip(VARIANTS, shares.tolist(), strict=True)),
        suspects=find_suspects(
            pairs=seen.rows,
            index=seen.index,
            chosen=seen.chosen,
            tier=seen.tier,
            cosines=seen.cosines,
            same=seen.same,
            listed=known.holds(seen.index[:, :1], seen.chosen),
        ),
    )


def _edges(values: torch.Tensor) -> tuple[float, float]:
    return (float(values.min()), float(values.max())) if values.numel() else (-1.0, 1.0)


def _around_zero(values: torch.Tensor) -> tuple[float, float]:
    """Edges of bins, of which one is at 0 where values lie on both sides of it."""
    low, high = _edges(values)
    if not low < 0 < high:
        return low, high
    width = (high - low) / (BINS - 1)
    bins = -int(low // width)
    return -bins * width, (BINS - bins) * width
