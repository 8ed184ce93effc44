"""The way of a batch: positions -> rows of each tensor -> the rows taken, all together -> a dictionary of tensors.

Two steps, because the rows of the large tensors stand in the small ones. The look-ahead runs the first step alone,
to announce rows before they are needed. Where everything is in memory, both are one call of the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from jasper_store.jasper.schema import STEERING_TENSORS, Split, split_tensor
from jasper_store.jasper.steering import Probabilities, draw_variants
from jasper_store.native.gather import Source, source_of, widening
from jasper_store.store.compiled_gather import INPUT, CompiledGather, IndexRef, Step
from jasper_store.store.gather_many import GatherRequest, gather_many
from jasper_store.store.store import TensorStore
from jasper_store.store.tensors import StoredTensor

__all__ = ["KEYS", "Draw", "Rows", "Staged", "chain_of", "gather", "rows_of", "steering_rows"]


_TABLE_PAIRS = 1 << 20
"""Up to this many pairs the variants of an epoch are drawn at once and looked up: part of another gather instead of
fourteen operations (30 us at B=256 on a core of the machine in docs/notes-paging.md). Five bytes per pair; beyond it,
memory would grow with the dataset, and each batch is drawn by itself."""


class Draw:
    """What decides the steering of every sample of an epoch. Immutable; on the device that it is asked on.

    Attributes:
        epoch: epoch number.
        forced: a variant that every sample gets instead, or ``None``.
    """

    __slots__ = ("_pairs", "_probabilities", "_seed", "_tables", "epoch", "forced")

    def __init__(self, seed: int, epoch: int, probabilities: Probabilities, forced: int | None, pairs: int) -> None:
        self.epoch = epoch
        self.forced = forced
        self._seed = seed
        self._probabilities = probabilities
        self._pairs = pairs
        self._tables: tuple[Source, Source] | None = None

    def takes(self, pairs: torch.Tensor) -> tuple[GatherRequest, GatherRequest] | None:
        """The variants of pairs [B] and their rows of the stack, to be looked up; ``None`` where there are no tables."""
        tables = self.tables(pairs.device)
        if tables is None:
            return None
        return GatherRequest(tables[0], pairs, torch.int64), GatherRequest(tables[1], pairs, torch.int64)

    def tables(self, device: torch.device) -> tuple[Source, Source] | None:
        """Of every pair: its variant, int8, and its row of the stack of steering tensors, int32."""
        if self._tables is None and 0 < self._pairs <= _TABLE_PAIRS:
            pairs = torch.arange(self._pairs, device=device)
            variants = self._of(pairs)
            stacked = _stacked_rows(pairs, variants, self._pairs)
            self._tables = source_of(variants.to(torch.int8)), source_of(stacked.to(torch.int32))
        return self._tables

    def variants(self, pairs: torch.Tensor) -> torch.Tensor:
        """Variant of each pair row [B], int64, on the device of ``pairs``."""
        # Tables are of use to whoever asks often; who asks for them first is not made to wait here.
        if self._tables is None:
            return self._of(pairs)
        return gather_many([GatherRequest(self._tables[0], pairs, torch.int64)])[0]

    def _of(self, pairs: torch.Tensor) -> torch.Tensor:
        if self.forced is not None:
            return torch.full_like(pairs, self.forced)
        return draw_variants(pairs, self._seed, self.epoch, self._probabilities)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that a batch of B samples reads.

    Attributes:
        pairs: pair rows [B].
        variants: steering variants [B].
        index: question row and source row of each pair [B, 2].
        negatives: source rows of each pair's negatives [B, n_neg].
        stacked: rows of the stack of steering tensors [B], where they were looked up.
    """

    pairs: torch.Tensor
    variants: torch.Tensor
    index: torch.Tensor
    negatives: torch.Tensor
    stacked: torch.Tensor | None = None

    def by_tensor(self) -> dict[str, torch.Tensor]:
        """Rows of each large tensor that a batch reads; of the steering tensors only the variant drawn."""
        questions, targets = self.index.t()
        sources = torch.cat((targets, self.negatives.view(-1)))
        steering = steering_rows(self.pairs, self.variants)
        return {"question_embs": questions.contiguous(), "source_embs": sources, **steering}


def steering_rows(pairs: torch.Tensor, variants: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows of each steering tensor that pairs [B] read if they draw ``variants`` [B]."""
    return {name: pairs[variants == variant] for variant, name in enumerate(STEERING_TENSORS, start=1)}


def rows_of(store: TensorStore, split: Split, positions: torch.Tensor, draw: Draw) -> Rows:
    """Rows of the large tensors for samples at ``positions`` [B] of a split; reads the index tensors."""
    (pairs,) = gather_many([GatherRequest(store[split_tensor(split)], positions, torch.int64)])
    takes = [
        GatherRequest(store["pair_index"], pairs, torch.int64),
        GatherRequest(store["hard_negatives"], pairs, torch.int64),
    ]
    drawn = draw.takes(pairs)
    if drawn is None:
        index, negatives = gather_many(takes)
        return Rows(pairs, draw.variants(pairs), index, negatives)
    index, negatives, variants, stacked = gather_many([*takes, *drawn])
    return Rows(pairs, variants, index, negatives, stacked)


def gather(store: TensorStore, rows: Rows, staged: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Read a batch: one take per tensor, together where they are in memory.

    Args:
        store: whose tensors.
        rows: what to read.
        staged: the steering rows [B, D], where a loader has read them ahead.

    Returns:
        The batch of DESIGN section 5: embeddings in their stored dtype, ids int64, on the store's device.
    """
    pairs, sources = rows.pairs, store["source_embs"]
    takes = {
        "question_emb": GatherRequest(store["question_embs"], rows.index[:, 0]),
        "target_source_emb": GatherRequest(sources, rows.index[:, 1]),
        "negative_embs": GatherRequest(sources, rows.negatives.view(-1)),
        "cluster_id": GatherRequest(store["pair_cluster_id"], pairs, torch.int64),
        "relevance": GatherRequest(store["pair_relevance"], pairs),
        "centroid_distance": GatherRequest(store["centroid_distances"], pairs),
        "negative_tiers": GatherRequest(store["negative_tiers"], pairs, torch.int64),
    }
    stack = store.stacked(STEERING_TENSORS)
    if stack is not None:
        rows_of_stack = rows.stacked
        if rows_of_stack is None:
            rows_of_stack = _stacked_rows(pairs, rows.variants, (stack.n_rows - 1) // len(STEERING_TENSORS))
        takes["steering"] = GatherRequest(stack, rows_of_stack)
    taken = dict(zip(takes, gather_many(list(takes.values())), strict=True))
    negatives = taken["negative_embs"]
    taken["negative_embs"] = negatives.view(*rows.negatives.shape, *negatives.shape[1:])
    taken["steering_variant"] = rows.variants
    if stack is None:
        taken["steering"] = _steering(store, rows) if staged is None else staged
    return {key: taken[key] for key in KEYS}


class Staged(Protocol):
    """Steering rows that were read ahead, as far as a chain is concerned."""

    def steps(self, first: int) -> list[Step]:
        """Two steps that end with the rows, by the extra input; ``first`` is the number of the first."""


def chain_of(
    store: Mapping[str, StoredTensor], split: Split, draw: Draw, staged: Staged | None = None
) -> CompiledGather | None:
    """What :func:`rows_of` and :func:`gather` do, as one call; the results are in the order of :data:`KEYS`.

    Args:
        store: whose tensors.
        split: whose samples.
        draw: of the epoch.
        staged: steering rows that were read ahead; without, they are looked for in memory.

    Returns:
        ``None`` if a tensor is not where the kernel reaches it, or of a dtype that it does not know.
    """
    source = store["source_embs"]
    tables = draw.tables(source.device)
    if tables is None:
        return None
    pairs, index, negatives, stacked = range(4)
    ids = torch.int64
    steering: list[Step | None]
    if staged is not None:
        first, last = staged.steps(stacked)
        steering = [first, last]
    else:
        stack = store.stacked(STEERING_TENSORS) if isinstance(store, TensorStore) else None
        if stack is None:
            return None
        steering = [_table_step(tables[1], IndexRef(pairs), result=False), _step(stack, IndexRef(stacked))]
    steps = [
        _step(store[split_tensor(split)], INPUT, ids, result=False),
        _step(store["pair_index"], IndexRef(pairs), ids, result=False),
        _step(store["hard_negatives"], IndexRef(pairs), ids, result=False),
        steering[0],
        _step(store["question_embs"], IndexRef(index, 0)),
        _step(source, IndexRef(index, 1)),
        steering[1],
        _step(source, IndexRef(negatives)),
        _step(store["pair_cluster_id"], IndexRef(pairs), ids),
        _step(store["pair_relevance"], IndexRef(pairs)),
        _step(store["centroid_distances"], IndexRef(pairs)),
        _table_step(tables[0], IndexRef(pairs)),
        _step(store["negative_tiers"], IndexRef(pairs), ids),
    ]
    found = [step for step in steps if step is not None]
    return CompiledGather(found) if len(found) == len(steps) else None


KEYS = (
    "question_emb",
    "target_source_emb",
    "steering",
    "negative_embs",
    "cluster_id",
    "relevance",
    "centroid_distance",
    "steering_variant",
    "negative_tiers",
)
"""Keys of a batch, in their order."""


def _step(
    tensor: StoredTensor, rows: IndexRef, dtype: torch.dtype | None = None, *, result: bool = True
) -> Step | None:
    source, dtype = tensor.in_memory, dtype or tensor.dtype
    if source is None or widening(tensor.dtype, dtype) is None:
        return None
    return Step(tensor.name, source, rows, dtype, result)


def _table_step(source: Source, rows: IndexRef, *, result: bool = True) -> Step | None:
    return Step("steering", source, rows, torch.int64, result) if source.numbers else None


def _steering(store: TensorStore, rows: Rows) -> torch.Tensor:
    """Steering rows [B, D]: zeros for variant 0, else the pair's row of the variant's tensor."""
    first = store[STEERING_TENSORS[0]]
    steering = torch.zeros((len(rows.pairs), *first.shape[1:]), dtype=first.dtype, device=rows.pairs.device)
    for variant, name in enumerate(STEERING_TENSORS, start=1):
        places = (rows.variants == variant).nonzero().view(-1)
        if len(places):
            steering.index_copy_(0, places, store[name].take(rows.pairs[places]))
    return steering


def _stacked_rows(pairs: torch.Tensor, variants: torch.Tensor, count: int) -> torch.Tensor:
    """Rows of the stack: variant v of pair p is row (v - 1) * count + p, and variant 0 is the last, of zeros."""
    # Variant 0 comes out negative by (count - p); where() rather than indexing, so that a device is not waited for.
    return torch.where(variants == 0, len(STEERING_TENSORS) * count, (variants - 1) * count + pairs)
