"""Rows of a block order, read past the page cache a window ahead of the batches that they belong to."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import torch

from jasper_store.native.gather import Source, source_of
from jasper_store.samples.graph import BY_POSITION
from jasper_store.samples.reader import StagedRows
from jasper_store.store.compiled_gather import SECOND_INPUT, CompiledGather, IndexRef, Step

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from jasper_store.loading.windows import Windows
    from jasper_store.samples.draw import VariantSampler
    from jasper_store.samples.graph import Node, SampleGraph
    from jasper_store.samples.reader import SampleReader
    from jasper_store.store.direct_rows import DirectRowReader

__all__ = [
    "READERS",
    "WINDOWS",
    "PrefetchSource",
    "ReadAhead",
    "SingleRows",
    "StagedNode",
    "Wanted",
    "WindowPrefetcher",
]

WINDOWS: Final = 4
"""Windows that are held: the one that is served, the one before, which batches on their way may need, and two ahead."""
READERS: Final = 3
"""Windows that are being read at a time: the one that is waited for, and two ahead."""


class PrefetchSource(Protocol):
    """What prefetching needs of a dataset."""

    @property
    def store(self) -> Mapping[str, Any]:
        """The stored tensors by name."""

    @property
    def graph(self) -> SampleGraph:
        """What a sample reads."""

    @property
    def reader(self) -> SampleReader:
        """How it is read."""

    def draw_now(self) -> VariantSampler | None:
        """The draw that decides the variants of the next batches."""


@dataclass
class StagedNode:
    """A node of the sample graph whose rows are read ahead.

    Attributes:
        number: number of the node.
        anywhere: memory as a source: its rows are named by their address.
        dtype: dtype of the rows.
        addresses: where the row of each position of a held window lies; -1 where none is held.
    """

    number: int
    anywhere: Source
    dtype: torch.dtype
    addresses: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


@dataclass(frozen=True)
class Wanted:
    """Samples of a window that are to be read.

    Attributes:
        indices: their indices in the dataset, int64 [n], ascending.
        rows: their rows, int64 [n].
        draw: the draw that decides their variants.
    """

    indices: torch.Tensor
    rows: torch.Tensor
    draw: VariantSampler | None

    def rows_of(self, node: Node) -> torch.Tensor:
        """The rows of a node that they name."""
        return self.indices if node.rows == BY_POSITION else self.rows

    def variants_of(self, node: Node) -> np.ndarray:
        """Number of the tensor that each takes its row from, from 0; -1 is a row of zeros."""
        if not node.choice:
            return np.zeros(len(self.indices), np.int64)
        assert self.draw is not None
        found: np.ndarray = self.draw.variants(self.rows_of(node)).numpy() - 1
        return found


class ReadAhead(Protocol):
    """How the rows of a window are read. For the trainer's thread alone."""

    @property
    def nodes(self) -> Sequence[StagedNode]:
        """The nodes whose rows are read."""

    @property
    def windows(self) -> int:
        """Windows that are held at a time."""

    def begin(self, wanted: Wanted) -> Any:
        """Begin to read; at most :data:`READERS` windows at a time."""

    def finish(self, job: Any) -> tuple[list[np.ndarray], object]:
        """Wait for what :meth:`begin` began.

        Returns:
            For each node the address of each sample's row, int64 [n]; and what keeps the addresses valid.
        """

    def release(self, memory: object) -> None:
        """Nothing refers to the addresses any more."""

    def close(self) -> None:
        """Close the files. May be called twice."""


class SingleRows:
    """Reads the rows of each node by themselves; those that lie near each other in one read.

    Args:
        graph: what a sample reads.
        readers: of each node that is read, its number and :data:`READERS` readers of its tensors.
    """

    windows = WINDOWS

    def __init__(self, graph: SampleGraph, readers: Sequence[tuple[int, Sequence[DirectRowReader]]]) -> None:
        self._graph, self._readers = graph, readers
        self.nodes = [StagedNode(number, each[0].anywhere, each[0].dtype) for number, each in readers]
        self._idle = [list(each) for _, each in readers]

    def begin(self, wanted: Wanted) -> Any:
        """See :class:`ReadAhead`."""
        begun = []
        for staged, idle in zip(self.nodes, self._idle, strict=True):
            node, reader = self._graph.nodes[staged.number], idle.pop()
            reader.begin(wanted.variants_of(node), wanted.rows_of(node).numpy())
            begun.append(reader)
        return begun

    def finish(self, job: Any) -> tuple[list[np.ndarray], object]:
        """See :class:`ReadAhead`."""
        found, memories = [], []
        for reader, idle in zip(job, self._idle, strict=True):
            addresses, memory = reader.finish()
            idle.append(reader)
            found.append(addresses)
            memories.append(memory)
        return found, memories

    def release(self, memory: object) -> None:
        """See :class:`ReadAhead`; tensors go by themselves."""

    def close(self) -> None:
        """See :class:`ReadAhead`."""
        for _, readers in self._readers:
            for reader in readers:
                reader.close()


@dataclass(frozen=True)
class _Window:
    """A window that is held, or is being read.

    Attributes:
        number: number of the window in the order.
        blocks: blocks of indices in it.
        slots: slots of its indices in the table of addresses.
        job: what reads it.
    """

    number: int
    blocks: np.ndarray
    slots: np.ndarray
    job: Any


class WindowPrefetcher:
    """Rows of the windows around a pass. Serves one pass; only the trainer's thread may use it.

    Args:
        dataset: whose rows.
        ahead: what reads them.
        windows: of the pass.
        in_flight: positions between a batch that leaves :meth:`wrap` and the one that is being gathered.
    """

    def __init__(self, dataset: PrefetchSource, ahead: ReadAhead, windows: Windows, in_flight: int) -> None:
        self._dataset, self._ahead, self._windows, self._in_flight = dataset, ahead, windows, in_flight
        self._nodes = tuple(ahead.nodes)
        order = windows.order
        self._order, self._position = order, windows.first
        self._first = self._next = order.window_of(self._position) if self._position < order.n else order.n_windows
        self._draw = dataset.draw_now()
        self._listed = _listed(dataset)
        for node in self._nodes:
            node.addresses = torch.full((ahead.windows * order.span,), -1, dtype=torch.int64)
        # Blocks of indices have slots.
        self._slots = np.full(-(-order.n // order.block), -1, np.int32)
        self._held: deque[tuple[_Window, object]] = deque()
        self._reads: deque[_Window] = deque()
        staged = {node.number: self._staged_rows(node) for node in self._nodes}
        self._staged_gather = _gather_of(staged)
        # The disk reads in the background while this thread draws the tables of the compiled gather.
        self._submit_until(self._first)
        self._batch_gather = dataset.reader.compile(self._draw, staged)

    @staticmethod
    def _staged_rows(node: StagedNode) -> StagedRows:
        return StagedRows(source_of(node.addresses), node.anywhere, node.dtype)

    def wrap(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the same batches, each as soon as its rows are in memory, while the next windows are read.

        Leaving the generator early, also by an error, closes this object. Exhausting it does not, because the last
        batches are still to be gathered.
        """
        try:
            yield from self._wrapped(batches)
        except BaseException:
            self.close()
            raise

    def _wrapped(self, batches: Iterator[Any]) -> Iterator[Any]:
        until = 0  # the position up to which there is nothing to do
        for batch in batches:
            self._position += len(batch) * self._windows.ranks
            if self._position > until:
                until = self._move()
            yield batch

    def _move(self) -> int:
        """Evict finished windows, submit the next two, wait for the current one.

        Returns:
            The position up to which no further call is needed.
        """
        order = self._order
        now = order.window_of(min(self._position, order.n) - 1)
        oldest = max(order.window_of(max(self._position - self._in_flight, 0)), self._first)
        self._evict(oldest)
        self._complete(now - 1)
        self._submit_until(min(now + READERS - 1, oldest + self._ahead.windows - 1))
        self._complete(now)
        return min(order.window_bounds(now)[1], order.window_bounds(oldest)[1] + self._in_flight - 1)

    def _submit_until(self, last: int) -> None:
        """Begin to read windows, up to a number."""
        while self._next <= last and self._next < self._order.n_windows:
            if len(self._reads) == READERS:
                # A batch that is larger than a window.
                self._complete(self._reads[0].number)
            self._reads.append(self._submit(self._next))
            self._next += 1

    def _submit(self, number: int) -> _Window:
        """Find out what a window needs, and begin to read it."""
        blocks, indices, within = self._windows.members(number)
        rows = indices if self._listed is None else self._listed.take(indices).long()
        first = number % self._ahead.windows * self._order.span
        job = self._ahead.begin(Wanted(indices, rows, self._draw))
        return _Window(number, blocks.numpy(), within.numpy() + first, job)

    def _complete(self, last: int) -> None:
        """Wait for windows up to a number, and enter the addresses of their rows."""
        while self._reads and self._reads[0].number <= last:
            window = self._reads.popleft()
            order, slot = self._order, window.number % self._ahead.windows
            found, memory = self._ahead.finish(window.job)
            for staged, addresses in zip(self._nodes, found, strict=True):
                staged.addresses.numpy()[slot * order.span :][: order.span] = -1
                staged.addresses.numpy()[window.slots] = addresses
            self._slots[window.blocks] = slot * order.window + np.arange(len(window.blocks))
            self._held.append((window, memory))

    def _evict(self, before: int) -> None:
        """Evict the windows below a number."""
        while self._held and self._held[0][0].number < before:
            window, memory = self._held.popleft()
            self._slots[window.blocks] = -1
            self._ahead.release(memory)

    def batch(self, positions: torch.Tensor, draw: VariantSampler | None) -> list[torch.Tensor] | None:
        """A whole batch in the order of the graph's keys; ``None`` if it has to be gathered step by step."""
        return self._run(self._batch_gather, positions, draw) if self._batch_gather else None

    def rows(self, positions: torch.Tensor, draw: VariantSampler | None) -> Mapping[int, torch.Tensor]:
        """Staged rows of a batch [B, ...] by node; none if not all of them are held, for this draw."""
        found = self._run(self._staged_gather, positions, draw)
        return {} if found is None else dict(zip([node.number for node in self._nodes], found, strict=True))

    def _run(
        self, gather: CompiledGather, positions: torch.Tensor, draw: VariantSampler | None
    ) -> list[torch.Tensor] | None:
        if draw is not self._draw:
            return None  # an epoch or a variant was set since the pass began
        named, block = positions.numpy(), self._order.block
        try:
            # Where a block is not held the slot comes out negative, and the gather refuses it, as it does a position
            # that does not exist.
            slots = self._slots[named // block].astype(np.int64)
            slots *= block
            slots += named % block
            return gather.run(positions, torch.from_numpy(slots))
        except IndexError:
            return None  # perhaps another rank's position; a row that does not exist is named by the steps

    # A class attribute, because this module's names are gone when the interpreter ends.
    _ending = staticmethod(sys.is_finalizing)

    def close(self) -> None:
        """The pass has ended or was abandoned. May be called twice."""
        if self._ending():
            return  # the end of the process closes the files
        self._ahead.close()


def _listed(dataset: PrefetchSource) -> Any:
    """The split's list of rows; ``None`` where positions are rows."""
    graph = dataset.graph
    return None if graph.row == BY_POSITION else dataset.store[graph.nodes[graph.row.node].tensor]


def _gather_of(staged: Mapping[int, StagedRows]) -> CompiledGather:
    """A gather of staged rows alone: the second input selects addresses, and these select the rows."""
    found = [Step("staged rows", rows.addresses, SECOND_INPUT, torch.int64, result=False) for rows in staged.values()]
    read = [
        Step("staged rows", rows.memory, IndexRef(number), rows.dtype) for number, rows in enumerate(staged.values())
    ]
    return CompiledGather([*found, *read])
