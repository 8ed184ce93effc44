"""Draw some batches ahead and announce the rows they will read, so that the disk works at its full depth.

A page fault asks the disk for one page and waits; a batch announced beforehand asks for all of its pages at once.
The rows of the large tensors stand in the small ones, so announcing has stages, each a few batches further ahead
than the next: the split's list of pair rows, then what stands in those rows, then the embeddings they name.

All of it happens in the trainer's process, also with workers: the page cache is shared. What there is to announce
is announced by one thread per pass, because the kernel takes 5 us a page to submit and waits where the disk's queue
is full: time that the trainer's thread gathers in (measured in docs/notes-paging.md). Where pages are in memory
already no thread is started. It ends with the pass, and with an iterator that is abandoned.
"""

from __future__ import annotations

import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, TypeVar

import torch

from jasper_store.jasper.schema import STEERING_TENSORS, TENSORS, split_tensor
from jasper_store.loading.order import BlockOrder, Order
from jasper_store.loading.window_prefetcher import READERS, Steers, WindowPrefetcher
from jasper_store.loading.windows import Windows
from jasper_store.store.direct_rows import DirectRowReader, direct_readers_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from concurrent.futures import Future
    from contextlib import AbstractContextManager

    from jasper_store.loading.advisor import Stopwatch

__all__ = ["GROUP_SAMPLES", "Announces", "Prefetcher", "depth_for"]

_Indices = TypeVar("_Indices")
# What a stage makes of some batches on the trainer's thread: work for the announcing thread, or none.
_Job: TypeAlias = "Callable[[], None]"
_Stage: TypeAlias = "Callable[[Any], _Job | None]"

MIN_BATCHES: Final = 4
"""Batches that are drawn ahead at least: DESIGN's prototype reached the disk's limit with four."""
MIN_SAMPLES: Final = 1024
"""Samples that are drawn ahead at least: small batches alone would not fill the disk's queue."""
GROUP_SAMPLES: Final = 1024
"""Samples that are announced together: asking which rows they read and where these lie costs 0.2 ms, be it for 16
or for 256."""
MAX_NBYTES: Final = 256 << 20
"""Bytes announced and not yet read, at most: more only pushes other pages out."""
_IDLE_CALL_LIMIT: Final = 16
"""Calls without a row of a tensor, after which it has no say in whether to announce."""
_MAX_SPAN_RATIO: Final = 8
"""Rows of the file per row of a split's block, beyond which a block is not a run."""


class Announces(Steers, Protocol):
    """The dataset, as far as looking ahead is concerned."""

    split: Any

    @property
    def store(self) -> Mapping[str, Any]:
        """The stored tensors by name."""

    def rows_of(self, indices: Any, epoch: int | None = None) -> Mapping[str, torch.Tensor]:
        """Rows of the embedding tensors that a batch reads; reads the small tensors."""

    def steering_rows(self, pairs: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Rows of the steering tensors that pair rows draw; reads nothing."""


def depth_for(batch_size: int, sample_nbytes: int, memory: int | None = None) -> int:
    """How many batches to draw ahead.

    Args:
        batch_size: samples per batch.
        sample_nbytes: bytes that a sample reads.
        memory: bytes that the page cache may hold; an eighth of it is spent on what is announced.

    Returns:
        At least 1: a cap that is smaller than a batch must still make progress.
    """
    limit = MAX_NBYTES if memory is None else min(MAX_NBYTES, memory // 8)
    wanted = max(MIN_BATCHES, -(-MIN_SAMPLES // batch_size))
    return max(1, min(wanted, limit // max(batch_size * sample_nbytes, 1)))


class Prefetcher:
    """Announces the rows of a loader's batches ahead of time. Not for concurrent use.

    Args:
        dataset: whose rows; only its mapped tensors are announced.
        depth: batches between announcing a row and reading it.
        batch_size: samples per batch; small batches are announced several at a time.
        rely_on_faults: the rows are gathered in this process, where page faults are noticed and announcing begins
            again by itself; with workers, rows are named to the store also while it asks for none.
        drop_behind: give back the pages of each window of a block order that is done with, for data that the page
            cache cannot hold.
        stage: read the steering rows of a block order past the page cache instead of announcing them.
        stopwatch: where the time is written down that batches wait for being announced.
    """

    def __init__(
        self,
        dataset: Announces,
        depth: int = MIN_BATCHES,
        *,
        batch_size: int = GROUP_SAMPLES,
        rely_on_faults: bool = True,
        drop_behind: bool = False,
        stage: bool = False,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.dataset = dataset
        self.depth = depth
        self.rely_on_faults = rely_on_faults
        self.drop_behind = drop_behind
        self.stage = stage
        self.stopwatch = stopwatch
        self._unread: dict[str, int] = {}
        self._group = max(1, min(GROUP_SAMPLES // batch_size, depth))

    def over(
        self, batches: Iterable[_Indices], order: Order | None = None, first: int = 0, step: int = 0, ranks: int = 1
    ) -> Iterator[_Indices]:
        """The same batches, each announced ``depth`` batches before it is yielded.

        Args:
            batches: positions of the samples of each batch.
            order: the order that they come from, if it is known; a block order is announced window by window.
            first: place of the first batch's first sample in the order.
            step: places from one batch's first sample to the next one's; 0 if it is not known.
            ranks: every how many places this rank takes one.
        """
        mapped = {name for name, tensor in self.dataset.store.items() if tensor.placement == "mmap"}
        split = split_tensor(self.dataset.split)
        pairwise = [
            name
            for name, rule in TENSORS.items()
            if name in mapped and rule.shape[0] == "pairs" and rule.reads not in (0.0, "probability")
        ]
        steering = mapped & set(STEERING_TENSORS)
        windows: Windows | None = None
        staging: list[DirectRowReader] = []
        ahead = 0
        found: Iterator[_Indices] = iter(batches)
        if isinstance(order, BlockOrder) and step and (pairwise or steering or split in mapped):
            windows = Windows(order, first, ranks)
            # What is gathered at once, and the batches around it, must lie within the windows that are held.
            ahead = GROUP_SAMPLES * ranks + 2 * step
            if self.stage and steering and split not in mapped and ahead + step <= order.span:
                staging = direct_readers_for([self.dataset.store[name] for name in STEERING_TENSORS], READERS)
            by_window = set() if staging else steering
            needed = pairwise or by_window or split in mapped
            stages = [self._windows(windows, step, pairwise, by_window)] if needed else []
            steering = set()
        else:
            stages = self._listed(pairwise)
        by_batch = steering | mapped & {"question_embs", "source_embs"}
        if by_batch:
            stages.append(self._embeddings(by_batch))
        if staging and windows is not None:
            return self._ahead(found, stages, WindowPrefetcher(self.dataset, staging, windows, ahead))
        return self._ahead(found, stages) if stages else found

    def _ahead(
        self, batches: Iterator[_Indices], stages: list[_Stage], staged: WindowPrefetcher | None = None
    ) -> Iterator[_Indices]:
        """The batches, through one stage of announcing after the other; the stages share a thread."""
        with ExitStack() as last:
            thread = ThreadPoolExecutor(1, "jasper-announce")
            last.callback(_end, thread)
            for announce in stages:
                batches = self._stage(batches, announce, thread)
            yield from staged.over(batches) if staged is not None else batches

    def _in_flight(self, step: int) -> int:
        """Places from a batch that leaves a stage to the one that the trainer works on, that one included."""
        return (2 * (self.depth + self._group) + 2) * step

    def _stage(self, batches: Iterator[_Indices], announce: _Stage, thread: ThreadPoolExecutor) -> Iterator[_Indices]:
        """Hold batches back until ``depth`` later ones are announced; small ones are announced together."""
        waiting: deque[tuple[_Indices, Future[None] | None]] = deque()
        while group := list(islice(batches, self._group)):
            whole = group[0] if len(group) == 1 else torch.cat([torch.as_tensor(batch) for batch in group])
            job = announce(whole)
            done = None if job is None else thread.submit(job)
            waiting.extend((batch, done) for batch in group)
            while len(waiting) > self.depth:
                yield self._announced(*waiting.popleft())
        while waiting:
            yield self._announced(*waiting.popleft())

    def _announced(self, batch: _Indices, done: Future[None] | None) -> _Indices:
        if done is not None:
            with self._timed():
                done.result()
        return batch

    def _listed(self, names: list[str]) -> list[_Stage]:
        """Announce the split's list, and some batches later what stands in the pair rows that it lists."""
        store = self.dataset.store
        listed = store[split_tensor(self.dataset.split)]

        def announce_list(batch: Any) -> _Job | None:
            return partial(listed.announce, batch) if self._asked([listed.name]) else None

        def announce_pairs(batch: Any) -> _Job | None:
            return partial(self._announce_pairs, batch, names, ()) if self._asked(names) else None

        stages: list[_Stage] = [announce_list] if listed.placement == "mmap" else []
        return [*stages, announce_pairs] if names else stages

    def _announce_pairs(self, positions: Any, names: Iterable[str], steering: Iterable[str]) -> None:
        """Announce the rows of tensors that have one row for each pair; of the steering only what is drawn."""
        store = self.dataset.store
        pairs = store[split_tensor(self.dataset.split)].take(positions).to(torch.int64)
        for name in names:
            store[name].announce(pairs)
        drawn = self.dataset.steering_rows(pairs) if steering else {}
        for name in steering:
            store[name].announce(drawn[name])

    def _windows(self, windows: Windows, step: int, names: list[str], steering: set[str]) -> _Stage:
        """Announce tensors with a row for each pair a window of the block order ahead: their rows lie in runs there.

        The next window is announced bit by bit while the present one is served, and the one before is dropped in
        the same way, so that the disk is never idle and its queue never full.
        """
        store = self.dataset.store
        listed = store[split_tensor(self.dataset.split)]
        everything = [*names, *steering]
        in_flight = self._in_flight(step)
        place = windows.first

        def page(due: list[torch.Tensor], done: list[torch.Tensor]) -> None:
            for positions in due:
                listed.announce(positions)
                self._announce_pairs(positions, names, steering)
            for blocks in done:
                self._drop(everything, blocks, windows.order)

        def announce(batch: Any) -> _Job | None:
            nonlocal place
            place += len(batch) * windows.ranks
            due = windows.due(place)
            done = windows.done(place - in_flight) if self.drop_behind else []
            wanted = (due and self._asked([listed.name, *everything])) or done
            return partial(page, due, done) if wanted else None

        return announce

    def _drop(self, names: list[str], blocks: torch.Tensor, order: BlockOrder) -> None:
        """Drop the pair rows of blocks, where a block's rows are a run in the file."""
        listed = self.dataset.store[split_tensor(self.dataset.split)]
        ends = torch.stack([blocks * order.block, ((blocks + 1) * order.block - 1).clamp_(max=order.n - 1)]).view(-1)
        listed.announce(ends)
        starts, stops = (listed.take(ends).view(2, -1) + torch.tensor([[0], [1]])).numpy()
        runs = (starts < stops) & (stops - starts < _MAX_SPAN_RATIO * order.block)
        for name in names:
            self.dataset.store[name].drop_runs(starts[runs], stops[runs])

    def _embeddings(self, wanted: set[str]) -> _Stage:
        """Announce the rows of these tensors that a batch reads."""
        store = self.dataset.store
        # Calls since it was last read; what was given up in an earlier epoch gets another chance in this one.
        unread = self._unread
        unread.update({name: min(unread.get(name, 0), _IDLE_CALL_LIMIT - 2) for name in wanted})

        def announce_rows(batch: Any) -> None:
            found = self.dataset.rows_of(batch)
            for name in wanted:
                rows = found[name]
                unread[name] = 0 if len(rows) else unread[name] + 1
                store[name].announce(rows)

        def announce(batch: Any) -> _Job | None:
            # A variant that the curriculum does not draw never announces, so nothing is ever known of its pages.
            asked = self._asked(name for name in wanted if unread[name] < _IDLE_CALL_LIMIT)
            return partial(announce_rows, batch) if asked else None

        return announce

    def _asked(self, names: Iterable[str]) -> bool:
        """Whether any of these tensors has a use for announcements now, as far as can be known here."""
        return not self.rely_on_faults or any(self.dataset.store[name].prefetching for name in names)

    def _timed(self) -> AbstractContextManager[None]:
        return nullcontext() if self.stopwatch is None else self.stopwatch.announce


def _end(threads: ThreadPoolExecutor, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
    """Let threads go, and what they have not begun. At the interpreter's end they are gone, and so is what this needs."""
    if not _ending():
        threads.shutdown(cancel_futures=True)
