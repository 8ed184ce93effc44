"""Draw some batches ahead and announce the rows they will read, so that the disk works at its full depth.

A page fault asks the disk for one page and waits; a batch announced beforehand asks for all of its pages at once.
The rows of the large tensors stand in the small ones, so announcing has stages, each a few batches further ahead
than the next: the split's list of pair rows, then what stands in those rows, then the embeddings they name.

All of it happens in the trainer's process, also with workers: the page cache is shared. There is no thread and
nothing to close; an iterator that is abandoned leaves a few index tensors to the garbage collector.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import torch

from jasper_store.jasper.order import BlockOrder, Order
from jasper_store.jasper.schema import STEERING_TENSORS, TENSORS, split_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from jasper_store.jasper.advisor import Stopwatch

__all__ = ["Announces", "LookAhead", "depth_for"]

_Indices = TypeVar("_Indices")

MIN_BATCHES: Final = 4
"""Batches that are drawn ahead at least: DESIGN's prototype reached the disk's limit with four."""
MIN_SAMPLES: Final = 1024
"""Samples that are drawn ahead at least: small batches alone would not fill the disk's queue."""
MAX_NBYTES: Final = 256 << 20
"""Bytes announced and not yet read, at most: more only pushes other pages out."""


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
        stopwatch: where the time that announcing takes is written down.
    """

    def __init__(self, dataset: Announces, depth: int = MIN_BATCHES, stopwatch: Stopwatch | None = None) -> None:
        self.dataset = dataset
        self.depth = depth
        self.stopwatch = stopwatch

    def over(
        self, batches: Iterable[_Indices], order: Order | None = None, first: int = 0, step: int = 0, ranks: int = 1
    ) -> Iterator[_Indices]:
        """The same batches, each announced ``depth`` batches before it is yielded.

        Args:
            batches: positions of the samples of each batch.
            order: the order that they come from, if it is known; a block order is announced window by window.
            first: place of the first batch's first sample in the order.
            step: places from one batch's first sample to the next one's.
            ranks: every how many places this rank takes one.
        """
        dataset, store = self.dataset, self.dataset.store
        mapped = {name for name, tensor in store.items() if tensor.placement == "mmap"}
        split = split_tensor(dataset.split)
        pairwise = [
            name
            for name, rule in TENSORS.items()
            if name in mapped and rule.shape[0] == "pairs" and rule.reads not in (0.0, "probability")
        ]
        by_batch = mapped & {"question_embs", "source_embs"}
        steering = mapped & set(STEERING_TENSORS)
        windows = isinstance(order, BlockOrder) and step > 0
        found: Iterator[_Indices] = iter(batches)
        if isinstance(order, BlockOrder) and windows and (steering or pairwise):
            found = self._by_window(found, _Windows(order, first, step, ranks), split, [*pairwise, *steering])
        elif pairwise or split in mapped:
            found = self._by_stages(found, split if split in mapped else None, pairwise)
        wanted = by_batch if windows else by_batch | steering
        return self._stage(found, lambda batch: self._announce_embeddings(batch, wanted)) if wanted else found

    def _by_stages(self, batches: Iterator[_Indices], split: str | None, names: list[str]) -> Iterator[_Indices]:
        store = self.dataset.store
        if split is not None:
            batches = self._stage(batches, store[split].announce)
        if names:
            listed = store[split_tensor(self.dataset.split)]

            def announce(batch: Any) -> None:
                pairs = listed.take(batch).to(torch.int64)
                for name in names:
                    store[name].announce(pairs)

            batches = self._stage(batches, announce)
        return batches

    def _by_window(
        self, batches: Iterator[_Indices], windows: _Windows, split: str, names: list[str]
    ) -> Iterator[_Indices]:
        """Announce the pair-wise tensors one window of the block order ahead: their rows lie in runs there."""
        store = self.dataset.store
        for number, batch in enumerate(batches):
            for positions in windows.due(number, self.depth):
                with self._timed():
                    if store[split].placement == "mmap":
                        store[split].announce(positions)
                    pairs = store[split].take(positions).to(torch.int64)
                    for name in names:
                        store[name].announce(pairs)
            yield batch

    def _announce_embeddings(self, batch: Any, wanted: set[str]) -> None:
        store = self.dataset.store
        if not any(_wants_announcing(store[name]) for name in wanted):
            return
        for name, rows in self.dataset.rows_of(batch).items():
            if name in wanted:
                store[name].announce(rows)

    def _stage(self, batches: Iterator[_Indices], announce: Callable[[_Indices], None]) -> Iterator[_Indices]:
        waiting: deque[_Indices] = deque()
        for batch in batches:
            with self._timed():
                announce(batch)
            waiting.append(batch)
            if len(waiting) > self.depth:
                yield waiting.popleft()
        yield from waiting

    def _timed(self) -> _Timed:
        return _Timed(self.stopwatch)


class _Windows:
    """Which windows of a block order are to be announced by when, and this rank's positions in them."""

    def __init__(self, order: BlockOrder, first: int, step: int, ranks: int) -> None:
        self.order, self.first, self.step, self.ranks = order, first, step, ranks
        self._next = order.window_of(first) if first < order.n else order.n_windows

    def due(self, number: int, depth: int) -> Iterator[torch.Tensor]:
        """Positions in each window that batch ``number`` brings within reach: its own, and the next one."""
        place = min(self.first + (number + depth) * self.step, self.order.n - 1)
        current = self.order.window_of(place)
        while self._next <= min(current + 1, self.order.n_windows - 1):
            start, stop = self.order.window_bounds(self._next)
            start = max(start + (self.first - start) % self.ranks, self.first)
            yield self.order.at(torch.arange(start, stop, self.ranks))
            self._next += 1


class _Timed:
    """Adds the time of a ``with`` block to a stopwatch, if there is one."""

    __slots__ = ("_began", "_stopwatch")

    def __init__(self, stopwatch: Stopwatch | None) -> None:
        self._stopwatch = stopwatch
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self._stopwatch is not None:
            self._stopwatch.announce += time.perf_counter() - self._began


def _wants_announcing(tensor: Any) -> bool:
    """Whether a mapped tensor's pages are worth announcing; a tensor that cannot say is announced."""
    return bool(getattr(tensor, "wants_announcing", True))
