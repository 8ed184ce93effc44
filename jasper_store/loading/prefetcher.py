"""Draw some batches ahead and ask for the rows they will read, so that the disk works at its full depth.

A page fault asks the disk for one page and waits; a batch that is prefetched asks for all of its pages at once. The
rows of the large tensors stand in the small ones, so prefetching has stages, each a few batches further ahead than the
next: one for each level of mapped index tensors of the sample graph, and a last one for the tensors that are served.

All of it happens in the trainer's process, also with workers: the page cache is shared. One thread per pass makes the
system calls, because the kernel takes 5 us a page to submit and waits where the disk's queue is full: time that the
trainer's thread gathers in (measured in docs/notes-paging.md). Where pages are in memory already no thread is started.
It ends with the pass, and with an iterator that is abandoned.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch

from jasper_store.formats.files import system_refusals
from jasper_store.loading.order import BlockOrder, Order
from jasper_store.loading.whole_blocks import whole_blocks
from jasper_store.loading.window_prefetcher import READERS, PrefetchSource, ReadAhead, SingleRows, WindowPrefetcher
from jasper_store.loading.windows import Windows
from jasper_store.samples.context import GatherContext
from jasper_store.samples.graph import BY_POSITION
from jasper_store.store.direct_rows import direct_readers_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Set as AbstractSet
    from concurrent.futures import Future
    from contextlib import AbstractContextManager

    from typing_extensions import Self

    from jasper_store.loading.advisor import Stopwatch
    from jasper_store.samples.graph import SampleGraph

__all__ = ["GROUP_SAMPLES", "PrefetchSource", "PrefetchedBatches", "Prefetcher", "depth_for", "stageable_nodes"]

# Made from some batches on the trainer's thread: work for the prefetching thread, or none.
_Job: TypeAlias = "Callable[[], None]"
_Stage: TypeAlias = "Callable[[Any], _Job | None]"

MIN_BATCHES: Final = 4
"""Batches that are drawn ahead at least: the prototype reached the disk's limit with four."""
MIN_SAMPLES: Final = 1024
"""Samples that are drawn ahead at least: small batches alone would not fill the disk's queue."""
GROUP_SAMPLES: Final = 1024
"""Samples that are prefetched together: asking which rows they read and where these lie costs 0.2 ms, be it for 16
or for 256."""
MAX_NBYTES: Final = 256 << 20
"""Bytes prefetched and not yet read, at most: more only pushes other pages out."""
_IDLE_CALL_LIMIT: Final = 16
"""A tensor with no rows in this many calls is ignored in the prefetch decision."""
_MAX_SPAN_RATIO: Final = 8
"""Rows of the file per row of a split's block, beyond which a block is not a run."""


def depth_for(batch_size: int, sample_nbytes: int, memory: int | None = None) -> int:
    """How many batches to draw ahead.

    Args:
        batch_size: samples per batch.
        sample_nbytes: bytes that a sample reads.
        memory: bytes that the page cache may hold; an eighth of it is spent on what is prefetched.

    Returns:
        At least 1: a cap that is smaller than a batch must still make progress.
    """
    limit = MAX_NBYTES if memory is None else min(MAX_NBYTES, memory // 8)
    wanted = max(MIN_BATCHES, -(-MIN_SAMPLES // batch_size))
    return max(1, min(wanted, limit // max(batch_size * sample_nbytes, 1)))


def stageable_nodes(graph: SampleGraph, mapped: AbstractSet[str]) -> list[int]:
    """Nodes whose rows a block order can read a window ahead: served, one row a sample in the order of the file."""
    index_nodes = set(graph.index_nodes)
    return [
        number
        for number in dict.fromkeys(out.node for out in graph.outputs if not out.variant)
        if number not in index_nodes
        and graph.nodes[number].rows in {graph.row, BY_POSITION}
        and graph.nodes[number].column is None
        and not graph.nodes[number].span
        and not mapped.isdisjoint(graph.nodes[number].tensors)
    ]


class Prefetcher:
    """Asks for the rows of a loader's batches ahead of time. Not for concurrent use.

    Args:
        dataset: the dataset; only its mapped tensors are prefetched.
        depth: batches between prefetching a row and reading it.
        batch_size: samples per batch; small batches are prefetched several at a time.
        rely_on_faults: the rows are gathered in this process, so its page faults tell when prefetching has to start
            again; with workers, rows are passed to the store even while it prefetches none.
        drop_behind: drop the pages of each window of a block order that was served, for data that the page cache
            cannot hold.
        stage: there is memory to read the rows of a block order past the page cache instead of prefetching them.
        blocks_ahead: the samples were packed, what is staged lies side by side in the blocks of the order, and so many
            windows are read ahead of the one that is served; 0 for samples that were not packed.
        stopwatch: records the time that batches wait for prefetching.
    """

    def __init__(
        self,
        dataset: PrefetchSource,
        depth: int = MIN_BATCHES,
        *,
        batch_size: int = GROUP_SAMPLES,
        rely_on_faults: bool = True,
        drop_behind: bool = False,
        stage: bool = False,
        blocks_ahead: int = 0,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.dataset = dataset
        self.depth = depth
        self.rely_on_faults = rely_on_faults
        self.drop_behind = drop_behind
        self.stage = stage
        self.blocks_ahead = blocks_ahead
        self.stopwatch = stopwatch
        self._idle_calls: dict[str, int] = {}
        self._group = max(1, min(GROUP_SAMPLES // batch_size, depth))

    def wrap(
        self,
        batches: Iterable[Any],
        order: Order | None = None,
        first: int = 0,
        step: int = 0,
        ranks: int = 1,
        *,
        staged: bool = False,
    ) -> PrefetchedBatches:
        """The same batches, each prefetched ``depth`` batches before it is yielded.

        Args:
            batches: indices of the samples of each batch.
            order: the order that they come from, if it is known; a block order is prefetched window by window.
            first: position of the first batch's first sample in the order.
            step: positions from one batch's first sample to the next one's; 0 if it is not known.
            ranks: how many there are; this rank takes every ``ranks``-th position.
            staged: the batches are gathered in this process with the context of the result, so that rows may be
                read into separate buffers.
        """
        dataset, graph = self.dataset, self.dataset.graph
        mapped = {name for name, tensor in dataset.store.items() if tensor.placement == "mmap"}
        in_order = mapped & graph.in_row_order
        stages: list[_Stage] = []
        ahead, reads = 0, None
        windows: Windows | None = None
        if isinstance(order, BlockOrder) and step and in_order:
            windows = Windows(order, first, ranks)
            # What is gathered at once, and the batches around it, must lie within the windows that are held.
            ahead = GROUP_SAMPLES * ranks + 2 * step
            if self.stage and staged and (self.blocks_ahead or not _list_is_mapped(graph, mapped)):
                reads = self._read_ahead(mapped, order, ahead, step)
            nodes = [] if reads is None else reads.nodes
            rest = in_order - {name for node in nodes for name in graph.nodes[node.number].tensors}
            stages += [self._by_window(windows, step, rest)] if rest else []
            mapped -= in_order
        stages += self._by_level(mapped)
        window_prefetcher = None
        if reads is not None and windows is not None:
            window_prefetcher = WindowPrefetcher(dataset, reads, windows, ahead)
        found: Iterator[Any] = iter(batches)
        if stages or window_prefetcher is not None:
            found = self._through(found, stages, window_prefetcher)
        return PrefetchedBatches(found, GatherContext(prefetched=True, staged=window_prefetcher))

    def stageable(self) -> list[int]:
        """Nodes that a block order reads past the page cache, where there is memory for it."""
        store = self.dataset.store
        return stageable_nodes(self.dataset.graph, {name for name, each in store.items() if each.placement == "mmap"})

    def _read_ahead(self, mapped: AbstractSet[str], order: BlockOrder, ahead: int, step: int) -> ReadAhead | None:
        """What reads the rows of a window ahead; ``None`` where nothing can be read so."""
        graph, store = self.dataset.graph, self.dataset.store
        numbers = stageable_nodes(graph, mapped)
        if self.blocks_ahead and numbers:
            blocks = whole_blocks(self.dataset, numbers, order, ahead + step, self.blocks_ahead)
            if blocks is not None:
                return blocks
        if ahead + step > order.span:
            return None
        found = []
        for number in numbers:
            readers = direct_readers_for([store[name] for name in graph.nodes[number].tensors], READERS)
            if readers:
                found.append((number, readers))
        return SingleRows(graph, found) if found else None

    def _through(self, batches: Iterator[Any], stages: list[_Stage], windows: WindowPrefetcher | None) -> Iterator[Any]:
        """The batches, through one stage of prefetching after the other; the stages share a thread."""
        with ExitStack() as last:
            thread = _PrefetchThread()
            last.callback(thread.close)
            for prefetch in stages:
                batches = self._stage(batches, prefetch, thread)
            yield from windows.wrap(batches) if windows is not None else batches

    def _in_flight(self, step: int) -> int:
        """Positions from a batch that leaves a stage to the one that the trainer works on, that one included."""
        return (2 * (self.depth + self._group) + 2) * step

    def _stage(self, batches: Iterator[Any], prefetch: _Stage, thread: _PrefetchThread) -> Iterator[Any]:
        """Hold batches back until ``depth`` later ones are prefetched; small ones are prefetched together."""
        waiting: deque[tuple[Any, Future[None] | None]] = deque()
        while group := list(islice(batches, self._group)):
            whole = group[0] if len(group) == 1 else torch.cat([torch.as_tensor(batch) for batch in group])
            job = prefetch(torch.as_tensor(whole, dtype=torch.int64))
            with system_refusals("prefetching rows"):
                done = None if job is None else thread.submit(job)
            waiting.extend((batch, done) for batch in group)
            while len(waiting) > self.depth:
                yield self._prefetched(thread, *waiting.popleft())
        while waiting:
            yield self._prefetched(thread, *waiting.popleft())

    def _prefetched(self, thread: _PrefetchThread, batch: Any, done: Future[None] | None) -> Any:
        if done is not None and thread.is_here:
            with self._timed():
                done.result()
        return batch

    def _by_level(self, mapped: set[str]) -> list[_Stage]:
        """A stage for each level of mapped index tensors, and one for what is served."""
        graph = self.dataset.graph
        levels: dict[int, list[int]] = {}
        for number in graph.index_nodes:
            if graph.nodes[number].tensor in mapped:
                levels.setdefault(graph.nodes[number].depth, []).append(number)
        stages = [self._rows_of(numbers, depth) for depth, numbers in levels.items()]
        served = [number for number in self.dataset.reader.last_nodes if mapped & set(graph.nodes[number].tensors)]
        return [*stages, self._rows_of(served, None)] if served else stages

    def _rows_of(self, numbers: list[int], depth: int | None) -> _Stage:
        """Prefetch the rows that nodes read; of index nodes, those of one depth."""
        dataset = self.dataset
        names = {name for number in numbers for name in dataset.graph.nodes[number].tensors}
        names = {name for name in names if dataset.store[name].placement == "mmap"}
        # Calls since it was last read; a tensor that was ignored in an earlier epoch is considered again.
        idle = self._idle_calls
        idle.update({name: min(idle.get(name, 0), _IDLE_CALL_LIMIT - 2) for name in names})

        def prefetch_rows(indices: torch.Tensor) -> None:
            reader = dataset.reader
            found = reader.resolve(indices, dataset.draw_now() if depth is None else None, depth=depth)
            for name, rows in reader.rows_by_tensor(found, numbers).items():
                if name in names:
                    idle[name] = 0 if len(rows) else idle[name] + 1
                    dataset.store[name].prefetch(rows)

        def prefetch(indices: torch.Tensor) -> _Job | None:
            # A variant that is never drawn prefetches nothing, so the state of its pages stays unknown.
            wanted = self._wanted(name for name in names if idle[name] < _IDLE_CALL_LIMIT)
            return partial(prefetch_rows, indices) if wanted else None

        return prefetch

    # --- block orders -------------------------------------------------------------------------------------------

    def _by_window(self, windows: Windows, step: int, names: set[str]) -> _Stage:
        """Prefetch tensors in the order of the file a window of the block order ahead: their rows lie in runs there.

        The next window is prefetched bit by bit while the present one is served, and the one before is dropped in
        the same way, so that the disk is never idle and its queue never full.
        """
        in_flight = self._in_flight(step)
        position = windows.first

        def page(due: list[torch.Tensor], done: list[torch.Tensor]) -> None:
            for indices in due:
                self._prefetch_in_order(indices, names)
            for blocks in done:
                self._drop(names, blocks, windows.order)

        def prefetch(indices: torch.Tensor) -> _Job | None:
            nonlocal position
            position += len(indices) * windows.ranks
            due = windows.due(position)
            done = windows.done(position - in_flight) if self.drop_behind else []
            wanted = (due and self._wanted(names)) or done
            return partial(page, due, done) if wanted else None

        return prefetch

    def _prefetch_in_order(self, indices: torch.Tensor, names: set[str]) -> None:
        """Prefetch the rows at sorted indices; of a choice only those that are drawn."""
        dataset, graph, store = self.dataset, self.dataset.graph, self.dataset.store
        rows = _rows_at(dataset, indices, prefetch=True)
        for node in graph.nodes:
            if node.rows not in {graph.row, BY_POSITION} or not names & set(node.tensors):
                continue
            wanted = indices if node.rows == BY_POSITION else rows
            if not node.choice:
                store[node.tensor].prefetch(wanted)
                continue
            draw = dataset.draw_now()
            assert draw is not None
            variants = draw.variants(wanted)
            for variant, name in enumerate(node.tensors, start=1):
                if name in names:
                    store[name].prefetch(wanted[variants == variant])

    def _drop(self, names: set[str], blocks: torch.Tensor, order: BlockOrder) -> None:
        """Drop the rows of blocks, where a block's rows are a run in the file."""
        graph, store = self.dataset.graph, self.dataset.store
        ends = torch.stack([blocks * order.block, ((blocks + 1) * order.block - 1).clamp_(max=order.n - 1)]).view(-1)
        by_position = {name for node in graph.nodes if node.rows == BY_POSITION for name in node.tensors}
        for rows, some in (
            (ends, names & by_position),
            (_rows_at(self.dataset, ends, prefetch=True), names - by_position),
        ):
            if not some:
                continue
            starts, stops = (rows.view(2, -1) + torch.tensor([[0], [1]])).numpy()
            runs = (starts < stops) & (stops - starts < _MAX_SPAN_RATIO * order.block)
            for name in some:
                store[name].drop_runs(starts[runs], stops[runs])

    def _wanted(self, names: Iterable[str]) -> bool:
        """Whether prefetching pays for any of these tensors now, as far as this process can tell."""
        return not self.rely_on_faults or any(self.dataset.store[name].prefetching for name in names)

    def _timed(self) -> AbstractContextManager[None]:
        return nullcontext() if self.stopwatch is None else self.stopwatch.prefetch


class PrefetchedBatches:
    """Batches on their way through a :class:`Prefetcher`.

    Attributes:
        batches: the batches.
        context: passed to the gather of each batch.
    """

    def __init__(self, batches: Iterator[Any], context: GatherContext) -> None:
        self.batches = batches
        self.context = context

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return next(self.batches)

    def close(self) -> None:
        """Release rows that were read ahead."""
        if self.context.staged is not None:
            self.context.staged.close()


def _list_is_mapped(graph: SampleGraph, mapped: AbstractSet[str]) -> bool:
    return graph.row != BY_POSITION and graph.nodes[graph.row.node].tensor in mapped


def _rows_at(dataset: PrefetchSource, indices: torch.Tensor, *, prefetch: bool = False) -> torch.Tensor:
    """Rows of the samples at indices, int64: the split's, or the indices themselves."""
    graph = dataset.graph
    if graph.row == BY_POSITION:
        return indices
    listed = dataset.store[graph.nodes[graph.row.node].tensor]
    if prefetch:
        listed.prefetch(indices)
    rows: torch.Tensor = listed.take(indices).to(torch.int64)
    return rows


class _PrefetchThread:
    """Runs jobs one after another. In a forked child it does not exist, and rows are read when they are needed."""

    def __init__(self) -> None:
        self._pool, self._process = ThreadPoolExecutor(1, "jasper-prefetch"), os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether it is a thread of this process."""
        return self._process == os.getpid()

    def submit(self, job: Callable[[], None]) -> Future[None] | None:
        """Run a job later; ``None`` if it will not be run."""
        return self._pool.submit(job) if self.is_here else None

    def close(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        """Stop, and drop pending jobs. When the interpreter ends, the thread and this module's names are gone."""
        if not _ending() and self.is_here:
            self._pool.shutdown(cancel_futures=True)
