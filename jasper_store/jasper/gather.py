"""The way of a batch: positions -> rows of each tensor -> one ``take`` per tensor -> a dictionary of tensors.

Two steps, because the rows of the large tensors stand in the small ones. The look-ahead runs the first step alone,
to announce rows before they are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jasper_store.jasper.schema import STEERING_TENSORS, Split, split_tensor
from jasper_store.jasper.steering import Probabilities, draw_variants
from jasper_store.store.store import TensorStore

__all__ = ["Draw", "Rows", "gather", "rows_of", "steering_rows"]


_TABLE_PAIRS = 1 << 20
"""Up to this many pairs the variants of an epoch are drawn at once and looked up: one operation a batch instead of
fourteen (30 us at B=256 on a core of the machine in docs/notes-paging.md). A byte per pair; beyond it, memory would
grow with the dataset, and each batch is drawn by itself."""


class Draw:
    """What decides the steering of every sample of an epoch. Immutable; on the device that it is asked on.

    Attributes:
        epoch: epoch number.
        forced: a variant that every sample gets instead, or ``None``.
    """

    __slots__ = ("_pairs", "_probabilities", "_seed", "_table", "epoch", "forced")

    def __init__(self, seed: int, epoch: int, probabilities: Probabilities, forced: int | None, pairs: int) -> None:
        self.epoch = epoch
        self.forced = forced
        self._seed = seed
        self._probabilities = probabilities
        self._pairs = pairs
        self._table: torch.Tensor | None = None

    def variants(self, pairs: torch.Tensor) -> torch.Tensor:
        """Variant of each pair row [B], int64, on the device of ``pairs``."""
        if self.forced is not None:
            return torch.full_like(pairs, self.forced)
        if self._pairs > _TABLE_PAIRS:
            return draw_variants(pairs, self._seed, self.epoch, self._probabilities)
        if self._table is None:
            everything = torch.arange(self._pairs, device=pairs.device)
            self._table = draw_variants(everything, self._seed, self.epoch, self._probabilities).to(torch.int8)
        return torch.index_select(self._table, 0, pairs).to(torch.int64)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that a batch of B samples reads.

    Attributes:
        pairs: pair rows [B].
        variants: steering variants [B].
        questions: question rows [B].
        sources: source rows [B + B * n_neg], the targets first, then the negatives of each sample.
    """

    pairs: torch.Tensor
    variants: torch.Tensor
    questions: torch.Tensor
    sources: torch.Tensor

    def by_tensor(self) -> dict[str, torch.Tensor]:
        """Rows of each large tensor that a batch reads; of the steering tensors only the variant drawn."""
        steering = steering_rows(self.pairs, self.variants)
        return {"question_embs": self.questions, "source_embs": self.sources, **steering}


def steering_rows(pairs: torch.Tensor, variants: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows of each steering tensor that pairs [B] read if they draw ``variants`` [B]."""
    return {name: pairs[variants == variant] for variant, name in enumerate(STEERING_TENSORS, start=1)}


def rows_of(store: TensorStore, split: Split, positions: torch.Tensor, draw: Draw) -> Rows:
    """Rows of the large tensors for samples at ``positions`` [B] of a split; reads the index tensors."""
    pairs = _int64(store[split_tensor(split)].take(positions))
    index = _int64(store["pair_index"].take(pairs))
    negatives = _int64(store["hard_negatives"].take(pairs))
    return Rows(
        pairs=pairs,
        variants=draw.variants(pairs),
        questions=index[:, 0].contiguous(),
        sources=torch.cat((index[:, 1], negatives.reshape(-1))),
    )


def gather(store: TensorStore, rows: Rows) -> dict[str, torch.Tensor]:
    """Read a batch: one ``take`` per tensor.

    Returns:
        The batch of DESIGN section 5: embeddings in their stored dtype, ids int64, on the store's device.
    """
    size = len(rows.pairs)
    sources = store["source_embs"].take(rows.sources)
    return {
        "question_emb": store["question_embs"].take(rows.questions),
        "target_source_emb": sources[:size],
        "steering": _steering(store, rows),
        "negative_embs": sources[size:].view(size, *store["hard_negatives"].shape[1:], *sources.shape[1:]),
        "cluster_id": _int64(store["pair_cluster_id"].take(rows.pairs)),
        "relevance": store["pair_relevance"].take(rows.pairs),
        "centroid_distance": store["centroid_distances"].take(rows.pairs),
        "steering_variant": rows.variants,
        "negative_tiers": _int64(store["negative_tiers"].take(rows.pairs)),
    }


def _int64(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.int64)


def _steering(store: TensorStore, rows: Rows) -> torch.Tensor:
    """Steering rows [B, D]: zeros for variant 0, else the pair's row of the variant's tensor."""
    stack = store.stacked(STEERING_TENSORS)
    if stack is not None:
        return stack.take(_stacked_rows(rows, pairs=(stack.n_rows - 1) // len(STEERING_TENSORS)))
    first = store[STEERING_TENSORS[0]]
    steering = torch.zeros((len(rows.pairs), *first.shape[1:]), dtype=first.dtype, device=rows.pairs.device)
    for variant, name in enumerate(STEERING_TENSORS, start=1):
        places = (rows.variants == variant).nonzero().view(-1)
        if len(places):
            steering.index_copy_(0, places, store[name].take(rows.pairs[places]))
    return steering


def _stacked_rows(rows: Rows, pairs: int) -> torch.Tensor:
    """Rows of the stack: variant v of pair p is row (v - 1) * pairs + p, and variant 0 is the last, of zeros."""
    # Variant 0 comes out negative by (pairs - p); where() rather than indexing, so that a device is not waited for.
    wanted = (rows.variants - 1) * pairs + rows.pairs
    return torch.where(rows.variants == 0, len(STEERING_TENSORS) * pairs, wanted)
