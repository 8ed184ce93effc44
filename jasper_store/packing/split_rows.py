"""Which rows of the source each packed sample of a split reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jasper_store.loading.order import order
from jasper_store.packing.columns import alone
from jasper_store.samples.compiler import build_graph
from jasper_store.samples.graph import BY_POSITION
from jasper_store.samples.reader import SampleReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jasper_store.samples.dataset import Dataset

__all__ = ["FieldRows", "SplitRows"]

_CHUNK: Final = 1 << 16


class FieldRows(NamedTuple):
    """Rows that samples read of a field's tensors.

    Attributes:
        rows: one sample after another, int64 [n].
        offsets: where each sample begins, int64 [samples + 1], where they are ragged.
    """

    rows: torch.Tensor
    offsets: torch.Tensor | None


class SplitRows:
    """The samples of a split in the order in which they are packed.

    Args:
        dataset: the split, open on the host.
        seed: decides the order.

    Attributes:
        samples: how many there are.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.samples = dataset, len(dataset)
        self._order = order(self.samples, seed, 0)
        self._readers: dict[str, tuple[SampleReader, int]] = {}

    def positions(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Positions in the split of packed samples ``start`` to ``stop``, some thousand at a time."""
        for first in range(start, stop, _CHUNK):
            yield self._order.at(torch.arange(first, min(first + _CHUNK, stop)))

    def field(self, name: str, start: int, stop: int) -> FieldRows:
        """Rows that packed samples ``start`` to ``stop`` read of a field's tensors."""
        reader, number = self._reader(name)
        found = [self._resolve(reader, number, positions) for positions in self.positions(start, stop)]
        rows = [each for each, _ in found]
        ends = [offsets for _, offsets in found if offsets is not None]
        whole = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
        if not reader.graph.nodes[number].ragged:
            return FieldRows(whole, None)
        lengths = [offsets.diff() for offsets in ends] or [torch.empty(0, dtype=torch.int64)]
        zero = torch.zeros(1, dtype=torch.int64)
        return FieldRows(whole, torch.cat([zero, torch.cat(lengths).cumsum(0)]))

    def column(self, name: str) -> int | None:
        """Which entry of the second dimension a field reads; ``None`` for the whole row."""
        reader, number = self._reader(name)
        return reader.graph.nodes[number].column

    def origins(self, start: int, stop: int) -> torch.Tensor:
        """Rows of packed samples in the source: values of the split's index tensor, or positions; int64."""
        graph, found = self.dataset.graph, []
        for positions in self.positions(start, stop):
            if graph.row == BY_POSITION:
                found.append(positions)
            else:
                found.append(self.dataset.store[graph.nodes[graph.row.node].tensor].take(positions).to(torch.int64))
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)

    def numbers(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Numbers that the variants of a choice are drawn by, int64."""
        rows = self.field(name, start, stop).rows
        choice = self.dataset.choice()
        return rows if choice.key is None else self.dataset.store[choice.key].take(rows).to(torch.int64)

    def _reader(self, name: str) -> tuple[SampleReader, int]:
        if name not in self._readers:
            graph = build_graph(alone(self.dataset.graph.declaration, name), self.dataset.store, self.dataset.split)
            self._readers[name] = SampleReader(graph, self.dataset.store), graph.outputs[0].node
        return self._readers[name]

    def _resolve(
        self, reader: SampleReader, number: int, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of a node at positions; index tensors that are mapped are read in the order of the positions."""
        graph, store = reader.graph, reader.store
        mapped = any(store[graph.nodes[each].tensor].placement == "mmap" for each in graph.index_nodes)
        if not mapped or graph.nodes[number].ragged:
            return reader.rows_at(reader.resolve(positions), number)
        ascending, where = positions.sort()
        rows, _ = reader.rows_at(reader.resolve(ascending), number)
        back = torch.empty_like(where)
        back[where] = torch.arange(len(where))
        return rows.reshape(len(where), -1)[back].reshape(-1), None
