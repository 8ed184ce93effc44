"""Batches of an epoch as index tensors: a drop-in replacement of PyTorch's batch sampler, and an instance of it."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import BatchSampler as TorchBatchSampler

from jasper_store.loading.prefetcher import PrefetchedBatches
from jasper_store.loading.samplers import Draws, EpochSampler, StatefulIterator
from jasper_store.samples.context import DIRECT, GatherContext, PrefetchedIndices
from jasper_store.store.guard import check_int

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from typing_extensions import Self

    from jasper_store.loading.prefetcher import Prefetcher

__all__ = ["BatchIterator", "BatchSampler", "joined"]

Indices: TypeAlias = "torch.Tensor | np.ndarray[Any, np.dtype[np.int64]] | list[int]"


class BatchSampler(TorchBatchSampler):
    """Batches of indices as int64 tensors: a drop-in ``torch.utils.data.BatchSampler``.

    Over an :class:`EpochSampler` a batch is a slice of a tensor. Any other sampler is asked for its numbers one by
    one, and a batch is a list, as in PyTorch.

    Args:
        sampler: where indices come from.
        batch_size: indices per batch.
        drop_last: leave out a last batch that is not full.
        arrays: yield numpy arrays, for loaders with workers: a batch of 256 reaches a worker in 42 us as an array,
            46 us as a list and 229 us as a tensor, which PyTorch sends through a separate file.
        partial_lists: yield a last batch that is not full as a list: Accelerate fills it up in position.
        prefetcher: prefetches the rows of later batches; ``None`` prefetches nothing.
    """

    sampler: Iterable[int]

    def __init__(
        self,
        sampler: Iterable[int],
        batch_size: int,
        drop_last: bool,
        *,
        arrays: bool = False,
        partial_lists: bool = False,
        prefetcher: Prefetcher | None = None,
    ) -> None:
        check_int("batch_size", batch_size, at_least=1)
        super().__init__(sampler, batch_size, drop_last)
        self.arrays = arrays
        self.partial_lists = partial_lists
        self.prefetcher = prefetcher

    def __iter__(self) -> Iterator[Any]:
        """Yield batches; over an :class:`EpochSampler` the iterator keeps a state."""
        if isinstance(self.sampler, EpochSampler):
            return BatchIterator(self, self.sampler)
        batches: Iterator[list[int]] = super().__iter__()
        return batches if self.prefetcher is None else self.prefetcher.wrap(batches)

    def tensors(self) -> BatchIterator:
        """Yield batches as tensors, for a loader that gathers them in this process by the iterator's context."""
        assert isinstance(self.sampler, EpochSampler)
        return BatchIterator(self, self.sampler, own=True)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the sampler, if it has epochs."""
        tell = getattr(self.sampler, "set_epoch", None)
        if callable(tell):
            tell(epoch)


class BatchIterator(StatefulIterator):
    """Index tensors of an epoch.

    Attributes:
        own: the batches are gathered in this process, with :attr:`context`.
    """

    def __init__(self, batches: BatchSampler, sampler: EpochSampler, *, own: bool = False) -> None:
        super().__init__(sampler)
        self._batches = batches
        self._source: PrefetchedBatches | None = None
        self.own = own

    @property
    def context(self) -> GatherContext:
        """What is known of the batches that were yielded: whether they were prefetched, which rows are staged."""
        return DIRECT if self._source is None else self._source.context

    def close(self) -> None:
        """Release rows that were read ahead; batches on their way are not gathered any more."""
        if self._source is not None:
            self._source.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Indices:
        if self._source is None:
            self._source = self._begin()
        batch: torch.Tensor = next(self._source.batches)
        # Counted in full batches: where ranks get a different number of last samples, all states still agree.
        self._served += self._batches.batch_size
        if self._batches.partial_lists and batch.shape[0] < self._batches.batch_size:
            found: list[int] = batch.tolist()
            return found
        if self.own:
            return batch
        if self._source.context.prefetched:
            return batch.numpy().view(PrefetchedIndices)
        return batch.cpu().numpy() if self._batches.arrays else batch

    def next_batches(self, count: int) -> tuple[Any, list[int]]:
        """The next batches as one.

        Args:
            count: how many, at most.

        Returns:
            The indices of all of them, one batch after another, and the size of each; no sizes at the end.
        """
        if not self.own or self._batches.prefetcher is not None:
            return joined(list(islice(self, count)), self._sampler.device)
        # Nothing looks at single batches, so the numbers are cut once.
        draws, size = self.begun(), self._batches.batch_size
        whole = draws.take(size * count)
        total = whole.shape[0]
        full, rest = divmod(total, size)
        sizes = [size] * full
        if rest and self._batches.drop_last:
            whole = whole[: full * size]
        elif rest:
            sizes.append(rest)
        self._served += len(sizes) * size
        return whole, sizes

    def _begin(self) -> PrefetchedBatches:
        prefetcher, draws = self._batches.prefetcher, self.begun()
        drawn = _cut(draws, self._batches.batch_size, drop_last=self._batches.drop_last)
        if prefetcher is None:
            return PrefetchedBatches(drawn, DIRECT)
        ranks = self._sampler.num_replicas
        return prefetcher.wrap(
            drawn,
            self._sampler.order,
            first=draws.start + self._sampler.rank,
            step=self._batches.batch_size * ranks,
            ranks=ranks,
            staged=self.own,
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; errors as :meth:`StatefulIterator.load_state_dict`."""
        super().load_state_dict(state)
        self._source = None


def joined(batches: Sequence[Any], device: torch.device) -> tuple[Any, list[int]]:
    """The indices of some batches as those of one, on a device, and the size of each."""
    if not batches:
        return (), []
    if len(batches) == 1:
        return batches[0], [len(batches[0])]
    # A last batch that is not full may be a list, where the others are tensors.
    tensors = [torch.as_tensor(each, dtype=torch.int64, device=device) for each in batches]
    return torch.cat(tensors), [each.shape[0] for each in tensors]


def _cut(draws: Draws, size: int, *, drop_last: bool) -> Iterator[torch.Tensor]:
    """Batches of indices. Not a method: a generator that refers to its iterator is freed only by the collector."""
    while True:
        batch = draws.take(size)
        n = batch.shape[0]  # a third of len()
        if n == 0 or (drop_last and n < size):
            return
        yield batch
