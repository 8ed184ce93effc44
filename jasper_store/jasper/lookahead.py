"""Draw some batches ahead and announce the rows they will read, so that the disk works at its full depth.

A page fault asks the disk for one page and waits; a batch announced beforehand asks for all of its pages at once.
The rows of the large tensors stand in the small ones, so announcing has stages, each a few batches further ahead
than the next: the split's list of pair rows, then what stands in those rows, then the embeddings they name.

All of it happens in the trainer's process, also with workers: the page cache is shared. There is no thread and
nothing to close; an iterator that is abandoned leaves a few index tensors to the garbage collector.
"""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import torch

from jasper_store.jasper.order import BlockOrder, Order
from jasper_store.jasper.schema import STEERING_TENSORS, TENSORS, split_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from jasper_store.jasper.advisor import Stopwatch

__all__ = ["GROUP_SAMPLES", "Announces", "LookAhead", "depth_for"]

_Indices = TypeVar("_Indices")

MIN_BATCHES: Final = 4
"""Batches that are drawn ahead at least: DESIGN's prototype reached the disk's limit with four."""
MIN_SAMPLES: Final = 1024
"""Samples that are drawn ahead at least: small batches alone would not fill the disk's queue."""
GROUP_SAMPLES: Final = 256
"""Samples that are announced together: asking which rows they read costs 50 us, be it for 16 or for 256."""
MAX_NBYTES: Final = 256 << 20
"""Bytes announced and not yet read, at most: more only pushes other pages out."""
_UNREAD: Final = 16
"""Calls without a row of a tensor, after which it has no say in whether to announce."""
_SPARSE: Final = 8
"""Rows of the file per row of a split's block, beyond which a block is not a run."""


class Announces(Protocol):
    """The dataset, as far as looking ahead is concerned."""

    split: Any

    @property
    def store(self) -> Mapping[str, Any]:
        """The stored tensors by name."""

    def rows_of(self, indices: Any, epoch: int | None = None) -> Mapping[str, torch.Tensor]:
        """Rows of the embedding tensors that a batch reads; reads the small tensors."""


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


class LookAhead:
    """Announces the rows of a loader's batches ahead of time. Not for concurrent use.

    Args:
        dataset: whose rows; only its mapped tensors are announced.
        depth: batches between announcing a row and reading it.
        batch_size: samples per batch; small batches are announced several at a time.
        rely_on_faults: the rows are gathered in this process, where page faults are noticed and announcing begins
            again by itself; with workers, rows are named to the store also while it asks for none.
        drop_behind: give back the pages of each window of a block order that is done with, for data that the page
            cache cannot hold.
        stopwatch: where the time that announcing takes is written down.
    """

    def __init__(
        self,
        dataset: Announces,
        depth: int = MIN_BATCHES,
        *,
        batch_size: int = GROUP_SAMPLES,
        rely_on_faults: bool = True,
        drop_behind: bool = False,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.dataset = dataset
        self.depth = depth
        self.rely_on_faults = rely_on_faults
        self.drop_behind = drop_behind
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
        by_batch = mapped & {"question_embs", "source_embs", *STEERING_TENSORS}
        found: Iterator[_Indices] = iter(batches)
        if isinstance(order, BlockOrder) and step:
            by_window = [*pairwise, *sorted(mapped & set(STEERING_TENSORS))]
            by_batch -= set(STEERING_TENSORS)
            if by_window or split in mapped:
                found = self._by_window(found, _Windows(order, first, step, ranks), by_window)
        elif pairwise or split in mapped:
            found = self._by_stages(found, pairwise)
        return self._stage(found, self._embeddings(by_batch)) if by_batch else found

    def _by_stages(self, batches: Iterator[_Indices], names: list[str]) -> Iterator[_Indices]:
        """Announce the split's list, and some batches later what stands in the pair rows that it lists."""
        store = self.dataset.store
        listed = store[split_tensor(self.dataset.split)]
        if listed.placement == "mmap":
            batches = self._stage(batches, lambda batch: listed.announce(batch) if self._asked([listed.name]) else None)
        if not names:
            return batches

        def announce(batch: Any) -> None:
            if self._asked(names):
                pairs = listed.take(batch)
                for name in names:
                    store[name].announce(pairs)

        return self._stage(batches, announce)

    def _by_window(self, batches: Iterator[_Indices], windows: _Windows, names: list[str]) -> Iterator[_Indices]:
        """Announce the pair-wise tensors a window of the block order ahead: their rows lie in runs there."""
        store = self.dataset.store
        listed = store[split_tensor(self.dataset.split)]
        # Batches leave here this many before the trainer has them, the one it works on included.
        in_flight = 2 * self.depth + 2
        for number, batch in enumerate(batches):
            with self._timed():
                for positions in windows.due(number + self.depth):
                    listed.announce(positions)
                    pairs = listed.take(positions)
                    for name in names:
                        store[name].announce(pairs)
                if self.drop_behind:
                    for first_rows, last_rows in windows.done(number - in_flight):
                        self._drop(names, listed.take(first_rows), listed.take(last_rows), windows.order.block)
            yield batch

    def _drop(self, names: list[str], first: torch.Tensor, last: torch.Tensor, block: int) -> None:
        """Drop the pair rows of blocks, where a block's rows are a run in the file."""
        for start, stop in zip(first.tolist(), last.tolist(), strict=True):
            if 0 <= stop - start < _SPARSE * block:
                for name in names:
                    self.dataset.store[name].drop_rows(start, stop + 1)

    def _embeddings(self, wanted: set[str]) -> Callable[[Any], None]:
        """A function that announces the rows of these tensors that a batch reads."""
        store = self.dataset.store
        # Calls since it was last read; what was given up in an earlier epoch gets another chance in this one.
        unread = self._unread
        unread.update({name: min(unread.get(name, 0), _UNREAD - 2) for name in wanted})

        def announce(batch: Any) -> None:
            # A variant that the curriculum does not draw never announces, so nothing is ever known of its pages.
            if not self._asked(name for name in wanted if unread[name] < _UNREAD):
                return
            found = self.dataset.rows_of(batch)
            for name in wanted:
                rows = found[name]
                unread[name] = 0 if len(rows) else unread[name] + 1
                store[name].announce(rows)

        return announce

    def _asked(self, names: Iterable[str]) -> bool:
        """Whether any of these tensors has a use for announcements now, as far as can be known here."""
        return not self.rely_on_faults or any(self.dataset.store[name].announcing for name in names)

    def _stage(self, batches: Iterator[_Indices], announce: Callable[[Any], None]) -> Iterator[_Indices]:
        """Hold batches back until ``depth`` later ones are announced; small ones are announced together."""
        waiting: deque[_Indices] = deque()
        while group := list(islice(batches, self._group)):
            with self._timed():
                announce(group[0] if len(group) == 1 else torch.cat([torch.as_tensor(batch) for batch in group]))
            waiting.extend(group)
            while len(waiting) > self.depth:
                yield waiting.popleft()
        yield from waiting

    def _timed(self) -> AbstractContextManager[None]:
        return nullcontext() if self.stopwatch is None else self.stopwatch.announce


class _Windows:
    """Which windows of a block order are due to be announced or dropped, and this rank's positions in them."""

    def __init__(self, order: BlockOrder, first: int, step: int, ranks: int) -> None:
        self.order, self.first, self.step, self.ranks = order, first, step, ranks
        self._due = self._done = order.window_of(first) if first < order.n else order.n_windows

    def due(self, number: int) -> Iterator[torch.Tensor]:
        """Positions of this rank in each window not yet given, up to the one after batch ``number``'s."""
        place = min(self.first + number * self.step, self.order.n - 1)
        while self._due <= min(self.order.window_of(place) + 1, self.order.n_windows - 1):
            start, stop = self.order.window_bounds(self._due)
            start = max(start + (self.first - start) % self.ranks, self.first)
            self._due += 1
            if start < stop:
                yield self.order.at(torch.arange(start, stop, self.ranks))

    def done(self, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """First and last positions of the blocks of each window not yet given that lies before batch ``number``."""
        place = self.first + number * self.step
        while self._done < self.order.n_windows and self.order.window_bounds(self._done)[1] <= place:
            first = self.order.blocks_of(self._done) * self.order.block
            self._done += 1
            yield first, (first + self.order.block - 1).clamp_(max=self.order.n - 1)
