"""One iteration over a loader: what the trainer was given so far, and what it waited for."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from jasper_store.errors import IncompatibleOptionsError
from jasper_store.loading.advisor import Meter, Stopwatch
from jasper_store.loading.workers import DEATH_SIGNS, WorkerDiedError, raise_if_worker_died

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["EpochIterator", "Progress"]


@dataclass(slots=True)
class Progress:
    """Progress of a pass. The loader keeps this and not the pass itself, which would keep its workers alive.

    Attributes:
        epoch: the epoch that it serves.
        start: samples that were consumed before it, over all ranks.
        batches: how many it has, on the rank that has the most.
        gathers_before: what workers had measured before it.
        delivered: batches that the trainer was given.
        finished: whether the trainer asked for a batch after the last; trainers that count batches do not.
        superseded: whether its workers serve a later pass.
    """

    epoch: int
    start: int
    batches: int
    gathers_before: Meter
    delivered: int = 0
    finished: bool = False
    superseded: bool = False

    @property
    def ended(self) -> bool:
        """Whether every batch was delivered."""
        return self.finished or self.delivered >= self.batches


class Passes(Protocol):
    """What an iteration needs of its loader."""

    @property
    def dataset(self) -> Any:
        """What batches are gathered from."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def begin_pass(self) -> tuple[Iterator[Any], Progress, Stopwatch]:
        """PyTorch's iterator, the record of the pass, and its clock; called at the first batch."""

    def discard_workers(self) -> None:
        """Do not use persistent workers again."""


class EpochIterator:
    """One iteration over a loader: counts what the trainer was given, and measures what it waited for."""

    def __init__(self, loader: Passes) -> None:
        self._length = len(loader)
        self._waiting: Passes | None = loader
        # Weak from the first batch on: an abandoned pass or loader must be freed at once, with its workers.
        self._loader = weakref.ref(loader)
        self._batches: Any = iter(())
        self._next_ready: Callable[[], Any] | None = None
        self._progress = Progress(0, 0, 0, Meter())
        self._watch: Stopwatch

    def __iter__(self) -> Iterator[Any]:
        return self

    def __len__(self) -> int:
        return self._length

    def __next__(self) -> Any:
        next_ready, progress = self._next_ready, self._progress
        if next_ready is not None and not progress.superseded:
            # Meter's clocks cost more than returning a batch that was gathered already.
            began = perf_counter()
            batch = next_ready()
            if batch is not None:
                watch, progress.delivered = self._watch, progress.delivered + 1
                watch.ended = ended = perf_counter()
                watch.wait.add_quick(ended - began)
                return batch
        return self._gathered_now()

    def _gathered_now(self) -> Any:
        """The next batch, where it is not ready; the first one begins the pass."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._batches, self._progress, self._watch = waiting.begin_pass()
            self._next_ready = getattr(self._batches, "next_ready", None)
        elif self._progress.superseded:
            if self._progress.ended:
                raise StopIteration
            raise IncompatibleOptionsError(
                "another iteration over this loader has begun, and persistent workers serve one at a time: this iterator "
                "has ended; finish it before, make a second loader, or pass persistent_workers=False"
            )
        watch = self._watch
        if not watch.began:
            watch.began = perf_counter()
        try:
            with watch.wait:
                batch = next(self._batches)
        except StopIteration:
            self._progress.finished = True
            self._release()
            watch.wait.batches -= 1
            watch.ended = perf_counter()
            raise
        except DEATH_SIGNS as exc:
            loader = self._loader()
            try:
                dataset = None if loader is None else loader.dataset
                raise_if_worker_died(exc, _pytorchs(self._batches), dataset)
            except WorkerDiedError:
                if loader is not None:
                    loader.discard_workers()
                raise
            raise
        self._progress.delivered += 1
        watch.ended = perf_counter()
        return batch

    def _release(self) -> None:
        """Release what was read ahead for this pass; an abandoned one has batches that were on their way."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()

    def __del__(self) -> None:
        self._release()


def _pytorchs(batches: Any) -> Any:
    """The iterator of PyTorch that has the workers, whether it is served from directly or by units."""
    return getattr(getattr(batches, "gathers", None), "iterator", batches)
