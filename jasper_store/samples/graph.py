"""Which rows of what a sample reads, as a graph of lookups.

Everything that the engine needs to know of a dataset follows from this graph, and is written nowhere else: keys, shapes
and dtypes of a batch; rows and bytes that a sample reads; which values are rows of what; what can be gathered in which
order, prefetched ahead, and read in runs. :mod:`jasper_store.samples.compiler` makes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
import xxhash

from jasper_store.samples.declaration import Declaration

__all__ = ["BY_POSITION", "Bound", "Node", "Output", "RowRef", "SampleGraph"]


class RowRef(NamedTuple):
    """What names the rows of a node.

    Attributes:
        node: number of the node whose values are the rows; -1 is the position of the sample.
        column: which of that node's values for each sample; ``None`` is all of them.
    """

    node: int
    column: int | None = None


BY_POSITION: Final = RowRef(-1)


@dataclass(frozen=True, slots=True)
class Node:
    """One lookup.

    Attributes:
        tensors: stored names; more than one only for a choice.
        rows: what names the rows.
        column: entry of the second dimension that is read; ``None`` is the whole row.
        lead: sizes of the rows that one sample names: () for one row, (k,) for k rows.
        row_shape: sizes of what is read of each row.
        dtype: as it is stored.
        n_rows: rows that the tensors have.
        depth: lookups that have to be done before it.
        ragged: whether the number of rows differs from sample to sample; then ``lead`` is ().
        span: it reads offsets of a ragged tensor, and stands for the rows of values between them.
        choice: each row comes from one of the tensors, or is zeros, by the variant that is drawn for it.
    """

    tensors: tuple[str, ...]
    rows: RowRef
    column: int | None
    lead: tuple[int, ...]
    row_shape: tuple[int, ...]
    dtype: torch.dtype
    n_rows: int
    depth: int
    ragged: bool = False
    span: bool = False
    choice: bool = False

    @property
    def tensor(self) -> str:
        """The stored name, where there is one tensor."""
        return self.tensors[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its values for one sample; of one row where it is ragged."""
        return (*self.lead, *self.row_shape)


@dataclass(frozen=True, slots=True)
class Output:
    """One field of a batch.

    Attributes:
        key: its name.
        node: number of the node that it is read by.
        dtype: what it is served as.
        variant: it serves the variant that the node has drawn, and not its values.
    """

    key: str
    node: int
    dtype: torch.dtype
    variant: bool = False


@dataclass(frozen=True, slots=True)
class Bound:
    """Values that are rows of another tensor.

    Attributes:
        tensor: stored name of the index tensor.
        column: which of its columns, or ``None`` for all.
        target: name of the tensor that they are rows of.
        n_rows: how many it has.
        offsets: the values are offsets of a ragged tensor: they ascend from 0 to ``n_rows``.
    """

    tensor: str
    column: int | None
    target: str
    n_rows: int
    offsets: bool = False

    def __str__(self) -> str:
        column = "" if self.column is None else f"[:, {self.column}]"
        return f"{self.tensor}{column} {'ascends to' if self.offsets else '<'} {self.n_rows}"


@dataclass(frozen=True, slots=True)
class SampleGraph:
    """The lookups of a sample, in an order in which each comes after those whose values it needs.

    Attributes:
        nodes: the lookups.
        outputs: the fields of a batch, in its order.
        length: samples in the split.
        row: what ``row`` means: the node of the split's index tensor, or the position.
        split: name of the split, or ``None``.
        choice: number of the node that is a choice, or ``None``.
        bounds: which values are rows of what.
        reads: rows that one sample reads of each stored tensor, on average.
        declaration: what it was compiled from.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[Output, ...]
    length: int
    row: RowRef
    split: str | None
    choice: int | None
    bounds: tuple[Bound, ...]
    reads: Mapping[str, float]
    declaration: Declaration

    @property
    def index_nodes(self) -> list[int]:
        """Numbers of the nodes whose values name rows, those first that need fewer lookups before them."""
        used = {node.rows.node for node in self.nodes} - {BY_POSITION.node}
        return sorted(used, key=lambda number: (self.nodes[number].depth, number))

    @property
    def ragged_keys(self) -> tuple[str, ...]:
        """Fields whose number of rows differs from sample to sample."""
        return tuple(out.key for out in self.outputs if self.nodes[out.node].ragged and not out.variant)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of a batch; a ragged field X is two, ``X.values`` and ``X.offsets``."""
        ragged = set(self.ragged_keys)
        return tuple(
            key
            for out in self.outputs
            for key in ([f"{out.key}.values", f"{out.key}.offsets"] if out.key in ragged else [out.key])
        )

    def shape_of(self, output: Output) -> tuple[int, ...]:
        """Sizes of a field for one sample; of one of its rows if it is ragged."""
        return () if output.variant else self.nodes[output.node].shape

    @property
    def sample_nbytes(self) -> int:
        """Bytes of one sample in a batch; of the average one where fields are ragged."""
        total = 0.0
        for out in self.outputs:
            count = self.reads[self.nodes[out.node].tensor] if self.nodes[out.node].ragged else 1
            total += count * math.prod(self.shape_of(out)) * out.dtype.itemsize
        return math.ceil(total)

    @property
    def in_row_order(self) -> frozenset[str]:
        """Stored tensors of which a sample reads the one row at its position or row: runs of samples read runs of them."""
        found = [node for node in self.nodes if node.rows in {self.row, BY_POSITION}]
        return frozenset(name for node in found for name in node.tensors)

    def fingerprint(self, sizes: Sequence[tuple[str, tuple[int, ...]]], sampled: bytes) -> str:
        """A short digest of what decides the samples and their order.

        Args:
            sizes: names and shapes of the tensors that samples read.
            sampled: values of the split's index tensor at some positions.
        """
        digest = xxhash.xxh3_64()
        fields = [
            (out.key, str(self.declaration.expanded(out.key)), self.nodes[out.node].tensors, out.variant)
            for out in self.outputs
        ]
        digest.update(repr((self.split, self.length, fields, sorted(sizes))).encode())
        digest.update(sampled)
        return digest.hexdigest()
