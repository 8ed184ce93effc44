"""The sampler of an epoch: index tensors without a Python number per sample, at any position, for any rank.

A drop-in replacement of PyTorch's own and an instance of it, so that trainers treat it right.
"""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from jasper_store.errors import UnknownNameError
from jasper_store.loading.options import Padding
from jasper_store.loading.order import BlockOrder, GlobalOrder, Order, SequentialOrder
from jasper_store.loading.ranks import find_ranks
from jasper_store.loading.state import LoaderState
from jasper_store.loading.turn_order import TurnOrder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sized

    from typing_extensions import Self


__all__ = ["DRAW", "SENT_DRAW", "Draws", "EpochSampler", "StatefulIterator"]

#: Indices are computed this many at a time: 16 ns each, where a batch of 256 by itself costs 140 ns each.
DRAW: Final = 8192
#: On a device a draw waits once for the kernels before it, so one draw (8 MiB) serves thousands of batches.
DEVICE_DRAW: Final = 1 << 20
#: A draw of no more than this is made on the host and sent: 16 ns each, where a device's 130 kernels take 2.8 ms to
#: start, however few the indices (an H100's; docs/notes-paging.md), and nothing is waited for.
SENT_DRAW: Final = 1 << 16
_ORDERS: Final[Mapping[str, Callable[..., Order]]] = {"global": GlobalOrder, "block": BlockOrder}


class EpochSampler(DistributedSampler[int]):
    """Serves one rank's share of an epoch: every ``num_replicas``-th position of the order, from position ``rank`` on.

    A drop-in ``torch.utils.data.DistributedSampler``: iterating yields ints, lazily, in constant memory.
    :class:`~jasper_store.loading.batches.BatchSampler` takes whole tensors from it instead. Iterating does not change
    it, except that a resume point set by :meth:`resume` is used once.

    Args:
        dataset: anything with a length; told the epoch if it has ``set_epoch``.
        num_replicas: ranks that share the epoch; by default from the process group or torchrun, else 1.
        rank: this one's number; goes with ``num_replicas``.
        shuffle: shuffle by ``order``, or serve the dataset in the order of its file.
        seed: decides the shuffle together with the epoch; the same on every rank.
        drop_last: give every rank the same count by leaving out up to ``num_replicas - 1`` samples.
        padding: without ``drop_last``: ``"wrap"`` gives every rank the same count by repeating samples from the
            start of the order, ``"none"`` gives each sample to exactly one rank, so that counts may differ by one.
        order_kind: ``"global"`` or ``"block"``, see :mod:`jasper_store.loading.order`.
        device: where index tensors are made.
        block: samples per block of packed samples, whose block order takes the blocks of a window in turn.
        window: blocks that are mixed with each other; goes with ``block``.

    Raises:
        UnknownNameError: no such order or padding.
        IncompatibleOptionsError: a rank that is out of range.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        *,
        padding: Padding = "wrap",
        order_kind: str = "global",
        device: torch.device | str = "cpu",
        block: int | None = None,
        window: int | None = None,
    ) -> None:
        if padding not in {"wrap", "none"}:
            raise UnknownNameError(f"unknown padding {padding!r}; expected 'wrap' or 'none'")
        ranks = find_ranks(distributed=_knows_ranks(), rank=rank, world_size=num_replicas)
        super().__init__(
            dataset,  # type: ignore[arg-type]  # only its length is asked for
            num_replicas=ranks.world_size,
            rank=ranks.rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
        )
        self.samples = len(dataset)
        self.padding: Padding = padding
        self._order: Order | None = None
        self._blocks = None if block is None or window is None else (block, window)
        self.use_order(order_kind)
        self.device = torch.device(device)
        self.start = 0
        self._fingerprint: str | None = None
        self.num_samples = self.count()
        self.total_size = self.num_samples * self.num_replicas

    @property
    def order(self) -> Order:
        """The order of the current epoch; computed by indexing, never held."""
        found = self._order
        if found is None or found.epoch != self.epoch:
            self._order = found = self._make_order()
        return found

    def _make_order(self) -> Order:
        if not self.shuffle:
            return SequentialOrder(self.samples, self.seed, self.epoch)
        if self.order_kind == "block" and self._blocks is not None:
            return TurnOrder(self.samples, self.seed, self.epoch, *self._blocks)
        return _ORDERS[self.order_kind](self.samples, self.seed, self.epoch)

    def use_order(self, kind: str) -> None:
        """Order by ``"global"`` or ``"block"`` from the next iteration on.

        Raises:
            UnknownNameError: no such order.
        """
        if kind not in _ORDERS:
            raise UnknownNameError(f"unknown order {kind!r}; expected one of {', '.join(map(repr, _ORDERS))}")
        self.order_kind = kind
        self._order = None

    def count(self, start: int = 0) -> int:
        """Samples that this rank serves of an epoch, of which the first ``start`` positions are consumed."""
        left = max(self.samples - start, 0)
        if self.drop_last:
            return left // self.num_replicas
        extra = self.num_replicas - 1 if self.padding == "wrap" else self.num_replicas - 1 - self.rank
        return (left + extra) // self.num_replicas

    def batches(self, batch_size: int, start: int = 0) -> int:
        """Batches that the rank with the most serves of an epoch, of which the first ``start`` positions are consumed."""
        left = max(self.samples - start, 0)
        if self.drop_last:
            return left // self.num_replicas // batch_size
        return -(-left // (self.num_replicas * batch_size))

    def indices(self, start: int, first: int, stop: int) -> torch.Tensor:
        """This rank's indices number ``first`` to ``stop``, counted from the resume point ``start``.

        Args:
            start: positions of the epoch that are consumed, over all ranks.
            first: number of the first one wanted, from 0.
            stop: number after the last; at most ``count(start)``.

        Returns:
            int64 tensor [stop - first] on the sampler's device.
        """
        step = self.num_replicas
        low, high = start + self.rank + first * step, start + self.rank + stop * step
        sent = self.device.type == "cuda" and stop - first <= SENT_DRAW
        if sent or self.device.type == "cpu":
            # numpy: one thread, where torch would wake all of them for a large batch.
            positions = torch.from_numpy(np.arange(low, high, step))
        else:
            positions = torch.arange(low, high, step, device=self.device)
        if high - step >= self.samples:
            positions %= self.samples
        found = self.order.at(positions)
        return found.pin_memory().to(self.device, non_blocking=True) if sent else found

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's indices as ints, from the resume point if one is set. The iterator keeps a state."""
        return _IndexIterator(self)

    def __len__(self) -> int:
        """Samples this rank serves of a whole epoch; a resume point does not shorten it."""
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, of the dataset too; another epoch than before starts from its beginning."""
        if epoch != self.epoch:
            self.start = 0
        super().set_epoch(epoch)
        tell = getattr(self.dataset, "set_epoch", None)
        if callable(tell):
            tell(epoch)

    # --- state ------------------------------------------------------------------------------------------------

    def state(self, consumed: int) -> LoaderState:
        """The state after ``consumed`` samples of the current epoch, over all ranks."""
        if self._fingerprint is None:
            found = getattr(self.dataset, "fingerprint", None)
            self._fingerprint = str(found()) if callable(found) else ""
        return LoaderState(
            seed=self.seed,
            epoch=self.epoch,
            consumed=min(consumed, self.samples),
            samples=self.samples,
            order=self.order.words,
            fingerprint=self._fingerprint,
        )

    def resume(self, state: LoaderState, what: str = "this loader") -> None:
        """Let the next iteration begin where a state says; ``what`` names what is served, for errors.

        Raises:
            IncompatibleOptionsError: the state belongs to another dataset, seed or order.
        """
        state.check(self.state(0), what)
        self.set_epoch(state.epoch)
        self.start = state.consumed

    def take_start(self) -> int:
        """The resume point for an iteration that begins now; the one after it begins at 0 again."""
        start, self.start = self.start, 0
        return start


def _knows_ranks() -> bool:
    """Whether a process group or torchrun says which rank this is; a plain script is rank 0 of 1."""
    return (dist.is_available() and dist.is_initialized()) or {"RANK", "WORLD_SIZE"} <= os.environ.keys()


class Draws:
    """Serves one rank's indices in slices of a larger computation. Not for concurrent use."""

    def __init__(self, sampler: EpochSampler, start: int) -> None:
        self.sampler = sampler
        self.start = start
        self.total = sampler.count(start)
        self.done = 0
        self._drawn = torch.empty(0, dtype=torch.int64)
        self._first = 0

    def take(self, count: int) -> torch.Tensor:
        """The next ``count`` indices, fewer at the end, none after it; a view that is not written to elsewhere."""
        stop = min(self.done + count, self.total)
        if stop > self._first + self._drawn.shape[0]:
            # A whole number of batches, so that none lies across two draws.
            draw = DRAW if self.sampler.device.type == "cpu" else DEVICE_DRAW
            reach = min(self.done + max(draw // count, 1) * count, self.total)
            self._drawn, self._first = self.sampler.indices(self.start, self.done, reach), self.done
        found = self._drawn[self.done - self._first : stop - self._first]
        self.done = stop
        return found


class StatefulIterator:
    """What the two iterators share: they begin lazily, and know their position in O(1).

    PyTorch's loader asks for two iterators per epoch and uses one, so an iterator takes the resume point only when
    it is asked for its first item. ``state_dict`` and ``load_state_dict`` are torchdata's protocol.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self._sampler = sampler
        self._draws: Draws | None = None
        self._served = 0

    def begun(self) -> Draws:
        """The draws of this pass; takes the resume point when it is asked first."""
        if self._draws is None:
            self._draws = Draws(self._sampler, self._sampler.take_start())
        return self._draws

    def state_dict(self) -> dict[str, Any]:
        """The state after what this iterator has yielded, prefetched or not."""
        start = self._sampler.start if self._draws is None else self._draws.start
        return self._sampler.state(start + self._served * self._sampler.num_replicas).to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            IncompatibleOptionsError: the state belongs to another dataset, seed or order.
        """
        self._sampler.resume(LoaderState.from_dict(state))
        self._draws, self._served = None, 0


class _IndexIterator(StatefulIterator):
    """Ints of an epoch."""

    def __init__(self, sampler: EpochSampler) -> None:
        super().__init__(sampler)
        self._ready: deque[int] = deque()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        if not self._ready:
            self._ready.extend(self.begun().take(DRAW).tolist())
            if not self._ready:
                raise StopIteration
        self._served += 1
        return self._ready.popleft()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._ready.clear()
