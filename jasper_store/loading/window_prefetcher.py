"""Rows of a block order, read past the page cache a window ahead of the batches that they belong to."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import torch

from jasper_store.native.gather import source_of
from jasper_store.samples.graph import BY_POSITION
from jasper_store.samples.reader import StagedRows
from jasper_store.store.compiled_gather import SECOND_INPUT, CompiledGather, IndexRef, Step

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from jasper_store.loading.windows import Windows
    from jasper_store.samples.draw import VariantSampler
    from jasper_store.samples.graph import SampleGraph
    from jasper_store.samples.reader import SampleReader
    from jasper_store.store.direct_rows import DirectRowReader

__all__ = ["READERS", "WINDOWS", "PrefetchSource", "StagedNode", "WindowPrefetcher"]

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
        readers: readers of its tensors, :data:`READERS` of them; closed with the :class:`WindowPrefetcher`.
        addresses: where the row of each position of a held window lies; -1 where none is held.
        idle: readers that read nothing at present.
    """

    number: int
    readers: Sequence[DirectRowReader]
    addresses: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    idle: list[DirectRowReader] = field(default_factory=list)


@dataclass(frozen=True)
class _Window:
    """A window that is held, or is being read.

    Attributes:
        number: number of the window in the order.
        blocks: blocks of indices in it.
        slots: slots of its indices in the table of addresses.
        readers: the readers that read it, one for each staged node.
    """

    number: int
    blocks: np.ndarray
    slots: np.ndarray
    readers: list[DirectRowReader]


class WindowPrefetcher:
    """Rows of the windows around a pass. Serves one pass; only the trainer's thread may use it.

    Args:
        dataset: whose rows.
        nodes: which of them.
        windows: of the pass.
        in_flight: positions between a batch that leaves :meth:`wrap` and the one that is being gathered.
    """

    def __init__(self, dataset: PrefetchSource, nodes: Sequence[StagedNode], windows: Windows, in_flight: int) -> None:
        self._dataset, self._nodes, self._windows, self._in_flight = dataset, tuple(nodes), windows, in_flight
        order = windows.order
        self._order, self._position = order, windows.first
        self._first = self._next = order.window_of(self._position) if self._position < order.n else order.n_windows
        self._draw = dataset.draw_now()
        self._graph, self._listed = dataset.graph, _listed(dataset)
        for node in self._nodes:
            node.addresses = torch.full((WINDOWS * order.span,), -1, dtype=torch.int64)
            node.idle = list(node.readers)
        # Blocks of indices have slots.
        self._slots = np.full(-(-order.n // order.block), -1, np.int32)
        self._held: deque[tuple[_Window, list[torch.Tensor]]] = deque()
        self._reads: deque[_Window] = deque()
        staged = {node.number: self._staged_rows(node) for node in self._nodes}
        self._staged_gather = _gather_of(staged)
        # The disk reads in the background while this thread draws the tables of the compiled gather.
        self._submit_until(self._first)
        self._batch_gather = dataset.reader.compile(self._draw, staged)

    @staticmethod
    def _staged_rows(node: StagedNode) -> StagedRows:
        reader = node.readers[0]
        return StagedRows(source_of(node.addresses), reader.anywhere, reader.dtype)

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
        self._submit_until(min(now + 2, oldest + WINDOWS - 1))
        self._complete(now)
        return min(order.window_bounds(now)[1], order.window_bounds(oldest)[1] + self._in_flight - 1)

    def _submit_until(self, last: int) -> None:
        """Begin to read windows, up to a number."""
        while self._next <= last and self._next < self._order.n_windows:
            self._reads.append(self._submit(self._next))
            self._next += 1

    def _submit(self, number: int) -> _Window:
        """Find out what a window needs, and begin to read it."""
        blocks, indices, within = self._windows.members(number)
        rows = indices if self._listed is None else self._listed.take(indices).long()
        readers = []
        for staged in self._nodes:
            node = self._graph.nodes[staged.number]
            wanted = indices if node.rows == BY_POSITION else rows
            if node.choice:
                assert self._draw is not None
                which = self._draw.variants(wanted).numpy() - 1
            else:
                which = np.zeros(len(wanted), np.int64)
            reader = staged.idle.pop()
            reader.begin(which, wanted.numpy())
            readers.append(reader)
        first = number % WINDOWS * self._order.span
        return _Window(number, blocks.numpy(), within.numpy() + first, readers)

    def _complete(self, last: int) -> None:
        """Wait for windows up to a number, and enter the addresses of their rows."""
        while self._reads and self._reads[0].number <= last:
            window = self._reads.popleft()
            order, slot = self._order, window.number % WINDOWS
            memories = []
            for staged, reader in zip(self._nodes, window.readers, strict=True):
                addresses, memory = reader.finish()
                staged.idle.append(reader)
                staged.addresses.numpy()[slot * order.span :][: order.span] = -1
                staged.addresses.numpy()[window.slots] = addresses
                memories.append(memory)
            self._slots[window.blocks] = slot * order.window + np.arange(len(window.blocks))
            self._held.append((window, memories))

    def _evict(self, before: int) -> None:
        """Evict the windows below a number."""
        while self._held and self._held[0][0].number < before:
            self._slots[self._held.popleft()[0].blocks] = -1

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
        for node in self._nodes:
            for reader in node.readers:
                reader.close()


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
