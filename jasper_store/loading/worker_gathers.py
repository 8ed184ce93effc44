"""Units of several batches gathered in worker processes.

A message between two processes costs about 100 us, more than the gather of a batch of 32. So PyTorch's own iterator, with its
queues and its care for workers that die, is given units of several batches; what comes back lies in a block of shared
memory, and the trainer serves parts of it.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.utils.data import get_worker_info

from jasper_store.loading.batches import joined
from jasper_store.loading.coalescing import Unit, batches_at_once
from jasper_store.paging.shared_blocks import forget_dead_workers
from jasper_store.samples.batch import Batch
from jasper_store.samples.context import PrefetchedIndices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from jasper_store.samples.dataset import Dataset

__all__ = ["UnitSampler", "UnitWorker", "WorkerGathers", "batches_per_unit", "forget_with", "unwrapped"]

_HOST: Final = torch.device("cpu")
_SAMPLES: Final = 640
"""Samples of a unit, at most: a worker has three units or more under way, and each holds memory (measured in
docs/notes-paging.md)."""


def batches_per_unit(batch_size: int, sample_nbytes: int, batches: int, in_flight: int, prefetched: int | None) -> int:
    """How many batches to send to a worker at once.

    Args:
        batch_size: samples per batch.
        sample_nbytes: bytes of a sample in a batch.
        batches: in an epoch.
        in_flight: units that are on their way at once.
        prefetched: batches whose rows are asked for ahead; those in flight are among them.

    Returns:
        At least 1.
    """
    # A short epoch is shared out all the same.
    most = batches // in_flight if prefetched is None else min(batches, prefetched) // in_flight
    return max(1, min(batches_at_once(batch_size, sample_nbytes), _SAMPLES // batch_size, most))


class UnitSampler:
    """Stands for a batch sampler: yields the indices of several batches as one array. For one pass at a time.

    Args:
        batches: indices of the samples of each batch, anew whenever they are iterated.
        at_once: batches per unit.

    Attributes:
        sent: indices of each unit that was yielded in the current pass and not received, and the sizes of its batches.
    """

    def __init__(self, batches: Iterable[Any], at_once: int) -> None:
        self._batches = batches
        self.at_once = at_once
        self.sent: deque[tuple[Any, list[int]]] = deque()

    def __iter__(self) -> Iterator[Any]:
        # Lazily: PyTorch's iterator makes two of these for each pass, and uses one.
        sent = self.sent = deque()
        batches = iter(self._batches)
        while unit := list(islice(batches, self.at_once)):
            whole, sizes = joined(unit, _HOST)
            if isinstance(whole, torch.Tensor):
                whole = whole.numpy().view(PrefetchedIndices if isinstance(unit[0], PrefetchedIndices) else np.ndarray)
            sent.append((whole, sizes))
            yield whole


_ORPHAN: Final = 1
"""The process that is the parent of one whose own parent has ended."""


class UnitWorker:
    """A ``worker_init_fn``: the worker's copy of the dataset adds to each unit what was set when it was made.

    Args:
        then: called first.
    """

    def __init__(self, then: Callable[[int], None]) -> None:
        self._then = then
        self._trainer = os.getpid()

    def __call__(self, worker: int) -> None:
        """Run in a worker as it starts."""
        self._then(worker)
        # From here on PyTorch notices when the trainer ends. One that was killed before, it would wait for without end.
        if os.getppid() == _ORPHAN != self._trainer:
            os._exit(0)
        info = get_worker_info()
        assert info is not None
        dataset: Any = info.dataset
        gather = dataset.__getitems__

        def make(indices: Any) -> tuple[object, Batch]:
            version = dataset.state_version()
            return version, gather(indices)

        dataset.__getitems__ = make


def unwrapped(made: tuple[object, Batch]) -> tuple[object, dict[str, torch.Tensor]]:
    """The collation of units: the tensors, which are all that has to travel."""
    version, batch = made
    return version, batch.tensors


def forget_with(iterator: Any) -> None:
    """Unmap what its workers have left when PyTorch's iterator, which ends them and waits for them, is gone."""
    weakref.finalize(iterator, forget_dead_workers).atexit = False


class WorkerGathers:
    """Units as they come from PyTorch's iterator.

    Args:
        dataset: the trainer's own.
        iterator: PyTorch's, with workers that :class:`UnitWorker` has begun in.
        sampler: of the same pass.

    Attributes:
        iterator: PyTorch's.
    """

    def __init__(self, dataset: Dataset, iterator: Any, sampler: UnitSampler) -> None:
        self._dataset = dataset
        self.iterator = iterator
        self._sent = sampler.sent

    def next(self) -> Unit | None:
        """The next one; ``None`` after the last."""
        try:
            version, tensors = next(self.iterator)
        except StopIteration:
            return None
        indices, sizes = self._sent.popleft()
        return Unit(indices, sizes, Batch(tensors, sum(sizes), self._dataset.graph.ragged_keys), version)

    def again(self, indices: Any, sizes: list[int]) -> Unit:
        """Batches of a unit once more, gathered in this process."""
        version = self._dataset.state_version()
        return Unit(indices, sizes, self._dataset.gather(indices), version)

    def close(self) -> None:
        """End the workers, unless the loader keeps them for the next pass."""
        self.iterator = iter(())  # PyTorch's ends its workers when nothing refers to it
