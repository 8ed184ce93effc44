"""Executes a sample graph on a store: positions -> row numbers of each tensor -> gathered rows -> tensors by key.

There are two steps, because index tensors hold the row numbers of the others: :meth:`SampleReader.resolve` reads index
tensors level by level, then :meth:`SampleReader.gather` reads everything else. A prefetcher runs the first step alone.
If everything is in memory, :meth:`SampleReader.compile` makes one native call of both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch

from jasper_store.errors import IntegrityError
from jasper_store.native.gather import Source, source_of, widening
from jasper_store.store.compiled_gather import INPUT, SECOND_INPUT, CompiledGather, IndexRef, Step
from jasper_store.store.gather_many import GatherRequest, gather_many

if TYPE_CHECKING:
    from jasper_store.samples.draw import VariantSampler
    from jasper_store.samples.graph import Node, SampleGraph
    from jasper_store.store.store import TensorStore
    from jasper_store.store.tensors import StoredTensor

__all__ = ["BatchIndices", "Ragged", "SampleReader", "StagedRows"]


class Ragged(NamedTuple):
    """Rows whose number differs from sample to sample.

    Attributes:
        values: of all samples, concatenated, [total, ...].
        offsets: where each sample begins, int64 [B + 1].
    """

    values: torch.Tensor
    offsets: torch.Tensor


_Values: TypeAlias = "torch.Tensor | Ragged"


@dataclass(frozen=True, slots=True)
class BatchIndices:
    """The row numbers that a batch of B samples reads, from the index tensors.

    Attributes:
        positions: positions of the samples [B].
        values: values of each index node that was read, int64 [B, *shape].
        variants: variants that the choice drew [B]; ``None`` without a choice.
        concatenated: rows of the choice's concatenated tensors [B], if they were looked up.
    """

    positions: torch.Tensor
    values: Mapping[int, _Values]
    variants: torch.Tensor | None = None
    concatenated: torch.Tensor | None = None


class StagedRows(NamedTuple):
    """Rows of a node that were read ahead.

    Attributes:
        addresses: table of the address of each staged row, indexed by the second input of a compiled gather.
        memory: a source whose row numbers are addresses.
        dtype: dtype of the rows.
    """

    addresses: Source
    memory: Source
    dtype: torch.dtype


class SampleReader:
    """Reads the samples of a graph from a store. Safe to use from several threads; its only state is caches.

    Args:
        graph: what a sample reads; built from the tensors of ``store``.
        store: an open store.
    """

    def __init__(self, graph: SampleGraph, store: TensorStore) -> None:
        self.graph = graph
        self.store = store
        self._levels = _levels(graph)
        served = dict.fromkeys(out.node for out in graph.outputs if not out.variant)
        #: Nodes that are read last: they are served and index nothing.
        self.last_nodes = [number for number in served if number not in set(graph.index_nodes)]
        self._columns: dict[tuple[str, int], tuple[Source, Source]] = {}

    # --- step by step -----------------------------------------------------------------------------------------

    def resolve(
        self, positions: torch.Tensor, draw: VariantSampler | None = None, *, depth: int | None = None
    ) -> BatchIndices:
        """Read the index tensors of samples at ``positions`` [B].

        Args:
            positions: int64 [B], on the store's device.
            draw: the epoch's draw, for a graph with a choice; ``None`` does not resolve the choice.
            depth: read only the index tensors that nodes of this depth need; all by default.

        Raises:
            IndexError: a row out of range.
        """
        values: dict[int, _Values] = {}
        drawn: list[torch.Tensor] = []
        choice = None if draw is None or self.graph.choice is None else self.graph.nodes[self.graph.choice]
        for level in self._levels:
            if depth is not None and self.graph.nodes[level[0]].depth >= depth:
                break
            wanted = [self._request(number, positions, values, torch.int64) for number in level]
            looked_up: list[GatherRequest] = []
            if choice is not None and not drawn and (choice.rows.node < 0 or choice.rows.node in values):
                assert draw is not None
                looked_up = draw.requests(_rows(choice, positions, values))
            taken = gather_many([*wanted, *looked_up])
            for number, got in zip(level, taken, strict=False):
                values[number] = self._index(self.graph.nodes[number], got, positions, values)
            drawn = drawn or taken[len(level) :]
        if choice is None or (depth is not None and choice.depth > depth):
            return BatchIndices(positions, values)
        assert draw is not None
        rows = _rows(choice, positions, values)
        variants, concatenated = drawn or (draw.variants(rows), None)
        return BatchIndices(positions, values, variants, concatenated)

    def gather(
        self,
        indices: BatchIndices,
        draw: VariantSampler | None = None,
        staged: Mapping[int, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Read a batch: tensors in memory by one call, the others one by one.

        Args:
            indices: result of :meth:`resolve` for all depths.
            draw: the draw that they were resolved with.
            staged: rows [B, ...] of nodes that were read ahead.

        Returns:
            The fields of the graph by key, in its order, on the store's device; [B, ...] each. A ragged field X is
            ``X.values`` [total, ...] and ``X.offsets`` [B + 1].
        """
        graph, size = self.graph, indices.positions.shape[0]
        found: dict[str, torch.Tensor] = {}
        requests: dict[str, GatherRequest] = {}
        for out in graph.outputs:
            node = graph.nodes[out.node]
            if out.variant:
                assert indices.variants is not None
                found[out.key] = indices.variants
            elif staged is not None and out.node in staged:
                found[out.key] = staged[out.node].to(out.dtype)
            elif node.choice:
                assert draw is not None
                request = self._choice_request(node, indices, draw)
                if request is None:
                    found[out.key] = self._chosen(node, indices)
                else:
                    requests[out.key] = request
            elif out.node not in indices.values:
                requests[out.key] = self._request(out.node, indices.positions, indices.values, out.dtype)
        found |= zip(requests, gather_many(list(requests.values())), strict=True)
        batch: dict[str, torch.Tensor] = {}
        for out in graph.outputs:
            node = graph.nodes[out.node]
            if node.ragged and not out.variant:
                index = indices.values.get(out.node) or indices.values[node.rows.node]
                assert isinstance(index, Ragged)
                values = found[out.key] if out.key in found else index.values.to(out.dtype)
                batch[f"{out.key}.values"] = _narrowed(values, node)
                batch[f"{out.key}.offsets"] = index.offsets
            elif out.key in found:
                got = found[out.key] if out.variant else _narrowed(found[out.key], node)
                batch[out.key] = got.view(size, *node.shape) if node.lead and not out.variant else got
            else:
                index = indices.values[out.node]
                assert isinstance(index, torch.Tensor)
                batch[out.key] = index.to(out.dtype)
        return batch

    def rows_by_tensor(self, indices: BatchIndices, numbers: Collection[int]) -> dict[str, torch.Tensor]:
        """Rows that nodes read of each stored tensor, int64 [n]; of a choice only the rows of the drawn variant."""
        found: dict[str, list[torch.Tensor]] = {}
        for number in numbers:
            node = self.graph.nodes[number]
            rows = _rows(node, indices.positions, indices.values)
            if node.choice:
                assert indices.variants is not None
                for variant, name in enumerate(node.tensors, start=1):
                    found.setdefault(name, []).append(rows[indices.variants == variant])
            else:
                found.setdefault(node.tensor, []).append(rows)
        return {name: parts[0].contiguous() if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}

    def rows_at(self, indices: BatchIndices, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of the stored tensors that a node reads, whatever is drawn of a choice.

        Returns:
            int64 [n], one sample after another; and where each sample begins, int64 [B + 1], where they are ragged.
        """
        node = self.graph.nodes[number]
        rows = _rows(node, indices.positions, indices.values)
        index = indices.values.get(node.rows.node)
        return rows, index.offsets if isinstance(index, Ragged) else None

    def _request(
        self, number: int, positions: torch.Tensor, values: Mapping[int, _Values], dtype: torch.dtype
    ) -> GatherRequest:
        node = self.graph.nodes[number]
        rows = _rows(node, positions, values)
        tensor = self.store[node.tensor]
        if node.span:
            rows = torch.cat((rows, rows + 1))
        if node.column is not None:
            column = self._column(tensor, node.column)
            if column is not None:
                return GatherRequest(column, rows, dtype, tensor.name)
        return GatherRequest(tensor, rows, dtype)

    def _index(self, node: Node, got: torch.Tensor, positions: torch.Tensor, values: Mapping[int, _Values]) -> _Values:
        """A node's values in the form in which they index other nodes."""
        if node.span:
            return _span(node, got)
        got = _narrowed(got, node)
        if node.ragged:
            index = values[node.rows.node]
            assert isinstance(index, Ragged)
            return Ragged(got, index.offsets)
        return got.view(positions.shape[0], *node.shape) if node.lead else got

    def _column(self, tensor: StoredTensor, column: int) -> Source | None:
        """One column of a tensor in memory as a source of rows."""
        source = tensor.in_memory
        if source is None:
            return None
        known = self._columns.get((tensor.name, column))
        if known is None or known[0] is not source:
            self._columns[tensor.name, column] = known = (source, source_of(source.tensor.select(1, column)))
        return known[1]

    def _choice_request(self, node: Node, indices: BatchIndices, draw: VariantSampler) -> GatherRequest | None:
        stack = self.store.stacked(node.tensors)
        if stack is None:
            return None
        rows = indices.concatenated
        if rows is None:
            assert indices.variants is not None
            rows = draw.concatenated_rows(_rows(node, indices.positions, indices.values), indices.variants)
        return GatherRequest(stack, rows)

    def _chosen(self, node: Node, indices: BatchIndices) -> torch.Tensor:
        """Rows [B, ...] of a choice: zeros for variant 0, else the row of the variant's tensor."""
        first, variants = self.store[node.tensor], indices.variants
        assert variants is not None
        rows = _rows(node, indices.positions, indices.values)
        chosen = torch.zeros((len(rows), *first.row_shape), dtype=first.dtype, device=rows.device)
        for variant, name in enumerate(node.tensors, start=1):
            places = (variants == variant).nonzero().view(-1)
            if len(places):
                chosen.index_copy_(0, places, self.store[name].take(rows[places]))
        return chosen

    # --- at once ----------------------------------------------------------------------------------------------

    def compile(
        self, draw: VariantSampler | None = None, staged: Mapping[int, StagedRows] | None = None
    ) -> CompiledGather | None:
        """One native call for :meth:`resolve` and :meth:`gather`; its results are in the order of the graph's keys.

        Args:
            draw: the epoch's draw, for a graph with a choice.
            staged: nodes whose rows are read ahead; the rows of all others must be in memory.

        Returns:
            ``None`` if a tensor is not in memory or of a dtype that the kernel does not know, or if rows are ragged.
        """
        graph, staged = self.graph, staged or {}
        if any(node.ragged for node in graph.nodes):
            return None
        made = _Steps(self)
        for level in self._levels:
            for number in level:
                if not made.index(number):
                    return None
        tables = None
        if graph.choice is not None:
            if draw is None or (tables := draw.tables(self.store.device)) is None or not tables[0].numbers:
                return None
            if graph.choice not in staged:
                made.table(graph.choice, tables[1])
        for number, rows in staged.items():
            made.staged(number, rows)
        for out in graph.outputs:
            if out.variant:
                assert tables is not None
                made.add(Step("variants", tables[0], made.rows_of(graph.nodes[out.node]), torch.int64))
            elif not made.output(out.node, out.dtype, staged):
                return None
        return CompiledGather(made.steps)


class _Steps:
    """Steps of a compiled gather under construction."""

    def __init__(self, reader: SampleReader) -> None:
        self._reader, self._graph = reader, reader.graph
        self._numbers: dict[int, int] = {}  # step that reads an index node
        self._found: dict[int, int] = {}  # step that finds the rows of a choice or a staged node
        self.steps: list[Step] = []

    def add(self, step: Step) -> int:
        self.steps.append(step)
        return len(self.steps) - 1

    def rows_of(self, node: Node) -> IndexRef:
        return INPUT if node.rows.node < 0 else IndexRef(self._numbers[node.rows.node], node.rows.column)

    def index(self, number: int) -> bool:
        node = self._graph.nodes[number]
        source = self._source(node, torch.int64)
        if source is None:
            return False
        self._numbers[number] = self.add(Step(node.tensor, source, self.rows_of(node), torch.int64, result=False))
        return True

    def table(self, number: int, table: Source) -> None:
        """Look up a choice's rows in a table."""
        rows = self.rows_of(self._graph.nodes[number])
        self._found[number] = self.add(Step("variants", table, rows, torch.int64, result=False))

    def staged(self, number: int, rows: StagedRows) -> None:
        """Look up the addresses of rows that were read ahead."""
        name = self._graph.nodes[number].tensor
        self._found[number] = self.add(Step(name, rows.addresses, SECOND_INPUT, torch.int64, result=False))

    def output(self, number: int, dtype: torch.dtype, staged: Mapping[int, StagedRows]) -> bool:
        node = self._graph.nodes[number]
        if number in staged:
            rows = staged[number]
            if widening(rows.dtype, dtype) is None:
                return False
            self.add(Step(node.tensor, rows.memory, IndexRef(self._found[number]), dtype))
            return True
        if node.choice:
            stack = self._reader.store.stacked(node.tensors)
            source = None if stack is None else stack.in_memory
            if source is not None:
                self.add(Step(node.tensor, source, IndexRef(self._found[number]), dtype))
            return source is not None
        source = self._source(node, dtype)
        if source is not None:
            self.add(Step(node.tensor, source, self.rows_of(node), dtype))
        return source is not None

    def _source(self, node: Node, dtype: torch.dtype) -> Source | None:
        tensor = self._reader.store[node.tensor]
        source = tensor.in_memory
        if source is not None and node.column is not None:
            source = self._reader._column(tensor, node.column)  # noqa: SLF001 - of this module
        if source is None or not source.numbers or widening(source.tensor.dtype, dtype) is None:
            return None
        return source


def _levels(graph: SampleGraph) -> list[list[int]]:
    """Index nodes, grouped by depth."""
    levels: dict[int, list[int]] = {}
    for number in graph.index_nodes:
        levels.setdefault(graph.nodes[number].depth, []).append(number)
    return list(levels.values())


def _rows(node: Node, positions: torch.Tensor, values: Mapping[int, _Values]) -> torch.Tensor:
    """Rows that a node reads, int64 [n]; strided if they are a column of a tensor."""
    if node.rows.node < 0:
        return positions
    found = values[node.rows.node]
    if isinstance(found, Ragged):
        return found.values
    return found.reshape(-1) if node.rows.column is None else found[:, node.rows.column]


def _span(node: Node, ends: torch.Tensor) -> Ragged:
    """Rows of the values of each sample: ``ends`` holds all begins, then all ends."""
    starts, stops = ends.view(2, -1)
    lengths = stops - starts
    if lengths.device.type == "cpu" and lengths.numel() and int(lengths.min()) < 0:
        name = node.tensor.removesuffix(".offsets")
        raise IntegrityError(
            f"{name}: its offsets descend; the file is damaged: convert the dataset again", tensor=name
        )
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=ends.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    rows = torch.repeat_interleave(starts - offsets[:-1], lengths)
    return Ragged(rows.add_(torch.arange(len(rows), device=rows.device)), offsets)


def _narrowed(got: torch.Tensor, node: Node) -> torch.Tensor:
    """The column that a node reads, if its rows were read whole because their tensor is not in memory."""
    if node.column is None or got.ndim == 1 + len(node.row_shape):
        return got
    return got.select(1, node.column).contiguous()
