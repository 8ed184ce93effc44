"""``Loader``: a PyTorch DataLoader over a dataset, with its order, its state and its ranks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.data import DataLoader

from jasper_store.errors import IncompatibleOptionsError
from jasper_store.loading.advisor import Meter, Stopwatch, WorkerClock, advise
from jasper_store.loading.agreement import compare_ranks, shared_store
from jasper_store.loading.batches import BatchSampler
from jasper_store.loading.coalescing import CoalescingIterator, OwnGathers, batches_at_once, is_identity_collate
from jasper_store.loading.defaults import choose_order, fits_ahead, prefetcher_for
from jasper_store.loading.epoch_iterator import EpochIterator, Progress
from jasper_store.loading.epochs import warn_same_epoch
from jasper_store.loading.estimate import DiskRates, estimates
from jasper_store.loading.options import LoaderOptions, warn_of_small_shared_memory
from jasper_store.loading.ranks import Ranks, find_ranks
from jasper_store.loading.samplers import EpochSampler
from jasper_store.loading.state import LoaderState
from jasper_store.loading.worker_gathers import (
    UnitSampler,
    UnitWorker,
    WorkerGathers,
    batches_per_unit,
    forget_with,
    unwrapped,
)
from jasper_store.samples.dataset import Dataset
from jasper_store.store.guard import resolve_pin_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from jasper_store.loading.prefetcher import Prefetcher

__all__ = ["Loader", "make_loader"]

_ORDERS: Final = ("auto", "global", "block")


def make_loader(dataset: Dataset, options: LoaderOptions) -> Loader:
    """A loader over an open dataset.

    Raises:
        IncompatibleOptionsError: options that are incompatible with where the dataset lives; an empty epoch.
        PerformanceWarning: free shared memory is too small for the batches of the workers.
    """
    plan = dataset.store.plan
    options.admit(plan)
    ranks = find_ranks(distributed=options.distributed, rank=options.rank, world_size=options.world_size)
    kind, why = choose_order(dataset, options.order, ranks.world_size, options.num_workers)
    shuffle = dataset.split in {None, "train"} if options.shuffle is None else options.shuffle
    drop_last = dataset.split in {None, "train"} if options.drop_last is None else options.drop_last
    sampler = EpochSampler(
        dataset,
        ranks.world_size,
        ranks.rank,
        shuffle=shuffle,
        seed=dataset.seed if options.seed is None else options.seed,
        drop_last=drop_last,
        padding=options.padding,
        order_kind=kind,
        device=dataset.device,
        block=None if dataset.packed is None else dataset.packed.block,
        window=None if dataset.packed is None else dataset.packed.window,
    )
    _require_batches(sampler, options.batch_size, dataset.split)
    sampler.set_epoch(dataset.epoch if options.epoch is None else options.epoch)
    batch_nbytes = options.batch_size * dataset.graph.sample_nbytes
    warn_of_small_shared_memory(batch_nbytes, options.num_workers, options.dataloader)
    on_device = None if dataset.device.type == "cpu" else str(dataset.device)
    return Loader(
        dataset,
        options.batch_size,
        sampler=sampler,
        prefetcher=prefetcher_for(dataset, options.batch_size, options.num_workers),
        adopt_order=options.order == "auto",
        why_order=why,
        ranks=ranks,
        num_workers=options.num_workers,
        pin_memory=resolve_pin_memory(
            options.pin_memory,
            any_mapped=plan.reads_maps,
            device=on_device,
            cuda_available=torch.cuda.is_available(),
        ),
        **options.dataloader,
    )


def _require_batches(sampler: EpochSampler, batch_size: int, split: str | None) -> None:
    """Refuse an epoch without a batch: a training loop over it would silently do nothing."""
    if sampler.batches(batch_size):
        return
    of = "the dataset" if split is None else f"split {split!r}"
    if not sampler.samples:
        raise IncompatibleOptionsError(
            f"{of} has no samples, so an epoch would be empty; choose another split or dataset"
        )
    ranks = "" if sampler.num_replicas == 1 else f" for {sampler.num_replicas} ranks"
    raise IncompatibleOptionsError(
        f"batch_size={batch_size} with drop_last: {of} has {sampler.samples} samples{ranks}, so an epoch would have no"
        f" full batch; use a smaller batch size, at most {max(sampler.samples // sampler.num_replicas, 1)}, or keep partial"
        " batches (drop_last=False)"
    )


class Loader(DataLoader[Any]):
    """A DataLoader that knows where in which epoch it stands. Made by ``create_loader``.

    Iterate it from one thread. An iterator may be abandoned at any time; the next one starts the epoch anew.

    Attributes:
        dataset_obj: the dataset.
        sampler_obj: its sampler, a ``DistributedSampler``.
        order: what the epochs are ordered by: ``"global"``, ``"block"`` or ``"sequential"``.
        stopwatch: times of the latest pass, see :meth:`advice`.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = 1,
        *,
        sampler: EpochSampler,
        prefetcher: Prefetcher | None = None,
        adopt_order: bool = False,
        why_order: str = "",
        ranks: Ranks | None = None,
        worker_init_fn: Any = None,
        num_workers: int = 0,
        **options: Any,
    ) -> None:
        self._clock = WorkerClock(num_workers, worker_init_fn, batch_size) if num_workers else None
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=sampler.drop_last,
            num_workers=num_workers,
            worker_init_fn=self._clock or worker_init_fn,
            **options,
        )
        batches = BatchSampler(
            sampler, batch_size, sampler.drop_last, arrays=num_workers > 0, partial_lists=True, prefetcher=prefetcher
        )
        # PyTorch refuses a batch sampler together with a sampler, and trainers look at `loader.sampler`.
        object.__setattr__(self, "batch_sampler", batches)
        # Any: programs call methods on it that only a JASPER dataset has.
        self.dataset_obj: Any = dataset
        self.sampler_obj = sampler
        self.stopwatch = Stopwatch()
        self._prefetcher = prefetcher
        self._adopt_order = adopt_order
        self._why_order = why_order
        self._ranks = ranks or Ranks(sampler.rank, sampler.num_replicas, "from the sampler")
        # What Accelerate's prepare() looks for: it would give each rank a share of this rank's share.
        self._is_accelerate_prepared = sampler.num_replicas > 1
        self._progress: Progress | None = None
        self._units: Loader | None = None  # what persistent workers serve
        self._warned = False
        self._compared = self._ranks.world_size == 1

    @property
    def order(self) -> str:
        """What the epochs are ordered by: ``"global"``, ``"block"`` or ``"sequential"``."""
        return self.sampler_obj.order.kind

    def __iter__(self) -> Any:
        """Serve this rank's batches of the epoch, from the resume point if a state was loaded.

        The pass begins with its first batch: what is set until then, an epoch or a state, still counts. Trainers
        make an iterator early and set the epoch later.
        """
        return EpochIterator(self)

    def begin_pass(self) -> tuple[Iterator[Any], Progress, Stopwatch]:
        """What :class:`EpochIterator` needs at its first batch: PyTorch's iterator, and the record of its progress."""
        previous, sampler = self._progress, self.sampler_obj
        repeated = previous is not None and previous.delivered > 1 and previous.epoch == sampler.epoch
        if repeated and sampler.shuffle and not sampler.start and not self._warned:
            self._warned = True
            warn_same_epoch(sampler.epoch)
        if previous is not None and self.persistent_workers:
            previous.superseded = True  # PyTorch gives both the same iterator, which begins the epoch anew
        self.stopwatch = Stopwatch()
        if self._prefetcher is not None:
            self._prefetcher.stopwatch = self.stopwatch
        gathers_before = Meter() if self._clock is None else self._clock.read()
        if not self._compared:
            self._compare_ranks()
        # Before PyTorch's iterator, which takes the resume point as soon as it has workers to feed.
        batches = sampler.batches(self.batch_size or 1, sampler.start)
        self._progress = Progress(sampler.epoch, sampler.start, batches, gathers_before)
        return self._serve(), self._progress, self.stopwatch

    def _compare_ranks(self) -> None:
        """Compare with the other ranks, before the first batch of all; where they share no store, nothing is compared."""
        store = shared_store(self._ranks)
        if store is not None:
            facts = self.sampler_obj.state(self.sampler_obj.start).to_dict()
            contents = getattr(self.dataset_obj, "contents", None)
            known = str(contents()) if callable(contents) else ""
            compare_ranks(store, self._ranks, {**facts, "contents": known, "batch_size": self.batch_size})
        self._compared = True

    def _serve(self) -> Iterator[Any]:
        """PyTorch's iterator; where nothing is overridden, one of batches that are gathered several at once."""
        dataset: Any = self.dataset
        ours = getattr(type(dataset), "__getitems__", None) is Dataset.__getitems__
        if not ours or (self.num_workers and not is_identity_collate(self.collate_fn)):
            return super().__iter__()
        if self.num_workers:
            return CoalescingIterator(dataset, self._worker_gathers(), self.collate_fn)
        # PyTorch's iterators draw a seed for workers, also without any: what a trainer draws must not depend on it.
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        batches: Any = self.batch_sampler
        size, sample_nbytes = self.batch_size or 1, dataset.graph.sample_nbytes
        at_once = batches_at_once(size, sample_nbytes)
        ahead = fits_ahead(dataset, at_once * size * sample_nbytes)
        pin = self.pin_memory and torch.cuda.is_available()
        gathers = OwnGathers(dataset, batches.tensors(), at_once, ahead=ahead, pin=pin)
        return CoalescingIterator(dataset, gathers, self.collate_fn)

    def _worker_gathers(self) -> WorkerGathers:
        """PyTorch's iterator over units of several batches."""
        units: Loader | None = self._units
        if units is None or self._iterator is None:
            assert self._clock is not None
            # A copy of this loader with all of its options, but for what workers are sent and what they send back.
            units = copy.copy(self)
            batches: Any = self.batch_sampler
            object.__setattr__(units, "batch_sampler", UnitSampler(batches, self._batches_per_unit()))
            units.collate_fn, units.worker_init_fn = unwrapped, UnitWorker(self._clock)
            units._iterator = None  # noqa: SLF001 - of this class
        sampler: Any = units.batch_sampler
        iterator: Any = DataLoader.__iter__(units)
        if self._iterator is None:
            forget_with(iterator)
        if self.persistent_workers:
            self._units, self._iterator = units, iterator
        return WorkerGathers(self.dataset_obj, iterator, sampler)

    def _batches_per_unit(self) -> int:
        ahead, in_flight = self._prefetcher, self.num_workers * (self.prefetch_factor or 1)
        return batches_per_unit(
            self.batch_size or 1,
            self.dataset_obj.graph.sample_nbytes,
            len(self),
            in_flight,
            None if ahead is None else ahead.depth,
        )

    def discard_workers(self) -> None:
        """Do not use persistent workers again: one of them has died, and the others were stopped."""
        self._iterator = self._units = None

    # --- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: what the trainer was given, not what was prefetched. O(1), equal on all ranks."""
        sampler, now = self.sampler_obj, self._progress
        if now is None or now.epoch != sampler.epoch:
            return sampler.state(sampler.start).to_dict()
        # Full batches are counted even where the last is shorter here than on another rank: all states agree.
        step = (self.batch_size or 1) * sampler.num_replicas
        return sampler.state(sampler.samples if now.ended else now.start + now.delivered * step).to_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next iteration serve the rest of an epoch that another run has begun.

        Batch size, workers and ranks may differ from that run's; each remaining sample comes exactly once. The
        state of a finished epoch leaves nothing to serve: call :func:`set_epoch` for the next one.

        Raises:
            IncompatibleOptionsError: the state belongs to another dataset, split, seed or order.
        """
        state = LoaderState.from_dict(state_dict)
        kind = state.order.split(" ")[0]
        if self._adopt_order and self.sampler_obj.shuffle and kind in _ORDERS:
            if kind != self.order:
                self._why_order = "the loaded state was saved in it"
            self.sampler_obj.use_order(kind)
        self.sampler_obj.resume(state, self._served())
        self._progress = None

    def set_epoch(self, epoch: int) -> None:
        """Move dataset and sampler to an epoch; see :func:`set_epoch`."""
        self.sampler_obj.set_epoch(epoch)

    # --- what a person wants to know --------------------------------------------------------------------------

    def explain(self) -> str:
        """How this loader is set up and why: order, ranks, prefetching, workers, pinning; a line each."""
        sampler = self.sampler_obj
        ahead, block = self._prefetcher, self.order == "block"
        lines = [
            f"order: {self.order}, because {self._why_order}" if sampler.shuffle else "order: sequential, as it lies",
            f"ranks: {self._ranks.rank} of {self._ranks.world_size} ({self._ranks.source}), {len(sampler)} samples here",
            "prefetch: none, nothing is mapped" if ahead is None else f"prefetch: {ahead.depth} batches ahead",
            *(
                [f"{self._staged_fields(ahead)}: read past the page cache, a window ahead"]
                if ahead and ahead.stage and block
                else []
            ),
            *self._estimates(),
            f"workers: {self.num_workers or 'none, batches are gathered in this process'}",
            f"pinned batches: {'yes' if self.pin_memory else 'no'}",
        ]
        return "\n".join(lines)

    def _estimates(self) -> list[str]:
        """What the disk allows in each order, where a pass reads from it."""
        dataset = self.dataset_obj
        if self._prefetcher is None or not self._prefetcher.drop_behind or dataset.packed is not None:
            return []
        disk = DiskRates()
        shown = ", ".join(str(each) for each in estimates(dataset.graph, dataset.store.plan, disk))
        return [
            f"expected of a disk of {disk.bytes_per_s / 1e9:.1f} GB/s and {disk.reads_per_s / 1000:.0f} k reads/s: {shown}"
        ]

    def _staged_fields(self, prefetcher: Prefetcher) -> str:
        nodes = set(prefetcher.stageable())
        keys = [out.key for out in self.dataset_obj.graph.outputs if out.node in nodes and not out.variant]
        return ", ".join(keys) or "nothing"

    def __repr__(self) -> str:
        sampler, dataset = self.sampler_obj, self.dataset_obj
        epoch = f"{sampler.batches(self.batch_size or 1)} batches of {self.batch_size} per epoch, {self.order} order"
        ranks = f", rank {sampler.rank} of {sampler.num_replicas}" if sampler.num_replicas > 1 else ""
        where = f", {self.num_workers} workers" if self.num_workers else ""
        return f"Loader({self._served()}, {len(dataset)} samples, {epoch}{ranks}{where})"

    def _served(self) -> str:
        """Dataset and split, as people name them."""
        path, split = (getattr(self.dataset_obj, name, None) for name in ("dataset_dir", "split"))
        of = "" if split is None else f", split {split!r}"
        return f"{type(self.dataset_obj).__name__ if path is None else repr(str(path))}{of}"

    def advice(self) -> str:
        """What the latest pass waited for, in milliseconds per batch, and what to change; readable lines."""
        gathers = self.stopwatch.wait
        if self._clock is not None:
            now, before = self._clock.read(), self._progress.gathers_before if self._progress else Meter()
            gathers = Meter(
                now.batches - before.batches, now.wall - before.wall, now.cpu - before.cpu, now.faults - before.faults
            )
        return "\n".join(
            advise(
                self.stopwatch,
                gathers,
                workers=self.num_workers,
                mapped=self._prefetcher is not None,
                pinned=bool(self.pin_memory),
                block=self.order == "block",
            )
        )
