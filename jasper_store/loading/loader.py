"""``create_loader``: a PyTorch DataLoader over a JASPER dataset, with its order, its state and its ranks."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import torch
from torch.utils.data import DataLoader

from jasper_store.errors import UnknownNameError
from jasper_store.jasper.dataset import JASPERSteeringDataset
from jasper_store.jasper.schema import SCHEMA, Split, check_split
from jasper_store.loading.advisor import Meter, Stopwatch, WorkerClock, advise
from jasper_store.loading.coalescing import CoalescingIterator, batches_at_once
from jasper_store.loading.defaults import choose_order, prefetcher_for, sample_nbytes_of
from jasper_store.loading.epochs import set_epoch, warn_same_epoch
from jasper_store.loading.first_batch import validate_first_batch
from jasper_store.loading.options import check_loader_options, warn_of_small_shared_memory
from jasper_store.loading.prefetcher import Prefetcher
from jasper_store.loading.ranks import Ranks, find_ranks
from jasper_store.loading.samplers import BatchSampler, EpochSampler, Padding
from jasper_store.loading.state import LoaderState
from jasper_store.loading.workers import DEATH_SIGNS, WorkerDiedError, raise_if_worker_died
from jasper_store.store.guard import check_options, resolve_pin_memory
from jasper_store.store.store import plan_store

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from jasper_store.loading.window_prefetcher import WindowPrefetcher

__all__ = ["JasperLoader", "LoaderOrder", "create_loader", "set_epoch", "validate_first_batch"]

LoaderOrder: TypeAlias = Literal["auto", "global", "block"]
_ORDERS: Final = ("auto", "global", "block")


def create_loader(
    dataset_dir: str | os.PathLike[str],
    split: Split,
    batch_size: int,
    num_workers: int = 0,
    distributed: bool = False,
    epoch: int = 0,
    drop_last: bool | None = None,
    pin_memory: bool | None = None,
    *,
    storage_format: str = "auto",
    use_mmap: bool | None = None,
    device: torch.device | str | None = None,
    memory_limit: int | None = None,
    seed: int = 42,
    order: LoaderOrder = "auto",
    padding: Padding = "wrap",
    rank: int | None = None,
    world_size: int | None = None,
    **dataloader_options: Any,
) -> JasperLoader:
    """Open a split of a dataset and make a DataLoader of it.

    A batch depends on the dataset's bytes, ``seed``, the epoch and the place in the epoch, and on nothing else
    here. Training shuffles and drops the last partial batch; validation and test do neither.

    Args:
        dataset_dir: directory with ``config.json`` and the tensors.
        split: ``"train"``, ``"val"`` or ``"test"``.
        batch_size: samples per batch and rank.
        num_workers: worker processes; 0 gathers in this process, which is fastest for data in memory.
        distributed: share the epoch with other ranks, found by ``torch.distributed`` or torchrun's variables.
        epoch: the epoch to begin with.
        drop_last: leave out the last partial batch (and, over several ranks, up to ``world_size - 1`` samples);
            ``None`` does so for ``"train"``.
        pin_memory: pin batches; ``None`` does so when CUDA is there and the data is in host memory.
        storage_format: ``"auto"``, ``"pt"``, ``"hdf5"``, ``"safetensors"`` or ``"npy"``.
        use_mmap: ``None`` plans, ``True`` maps everything, ``False`` preloads everything.
        device: where the data lives: ``None`` for the host, a CUDA device, or ``"auto"``.
        memory_limit: upper bound in bytes on what may be preloaded.
        seed: decides the shuffle and the steering draw.
        order: ``"global"`` mixes all samples; ``"block"`` shuffles blocks, for data larger than memory;
            ``"auto"`` chooses by the plan (``"global"`` over several ranks, which must agree), and
            ``loader.explain()`` says why. Only training shuffles.
        padding: over several ranks without ``drop_last``: ``"wrap"`` repeats samples until all ranks have the
            same count, ``"none"`` serves every sample exactly once.
        rank: number of this rank, with ``world_size``; instead of what ``distributed`` finds.
        world_size: number of ranks.
        **dataloader_options: more of ``torch.utils.data.DataLoader``: ``collate_fn``, ``worker_init_fn``,
            ``prefetch_factor``, ``persistent_workers``, ``multiprocessing_context``, ``timeout``, ``generator``...

    Returns:
        A :class:`JasperLoader`, which is a ``DataLoader``.

    Raises:
        UnknownNameError: no such split, order, padding, format or DataLoader option.
        IncompatibleOptionsError: options that cannot hold together, before any data is touched.
        DatasetNotFoundError, CorruptFileError, IntegrityError, InsufficientMemoryError: as the dataset's.
        PerformanceWarning: free shared memory is too small for the batches of the workers.
    """
    check_split(split)
    if order not in _ORDERS:
        raise UnknownNameError(f"unknown order {order!r}; expected one of {', '.join(map(repr, _ORDERS))}")
    if padding not in {"wrap", "none"}:
        raise UnknownNameError(f"unknown padding {padding!r}; expected 'wrap' or 'none'")
    check_options(
        use_mmap=use_mmap, device=device, pin_memory=pin_memory, num_workers=num_workers, memory_limit=memory_limit
    )
    check_loader_options(batch_size, num_workers, dataloader_options)
    ranks = find_ranks(distributed=distributed, rank=rank, world_size=world_size)
    if use_mmap is None and (pin_memory or str(device) == "auto"):
        # What the plan would map or put on a device decides; refuse before it is carried out.
        plan = plan_store(dataset_dir, format=storage_format, device=device, memory_limit=memory_limit, schema=SCHEMA)
        check_options(device=plan.device, pin_memory=pin_memory, num_workers=num_workers, any_mapped=plan.reads_maps)
    dataset = JASPERSteeringDataset(
        dataset_dir, split, epoch, device, storage_format, use_mmap, seed=seed, memory_limit=memory_limit
    )
    try:
        on_device = None if dataset.device.type == "cpu" else str(dataset.device)
        reads_maps = dataset.store.plan.reads_maps
        check_options(device=on_device, pin_memory=pin_memory, num_workers=num_workers, any_mapped=reads_maps)
        kind, why = choose_order(dataset, order, ranks.world_size)
        sampler = EpochSampler(
            dataset,
            ranks.world_size,
            ranks.rank,
            shuffle=split == "train",
            seed=seed,
            drop_last=split == "train" if drop_last is None else drop_last,
            padding=padding,
            order_kind=kind,
            device=dataset.device,
        )
        sampler.set_epoch(epoch)
        sample_nbytes = sample_nbytes_of(dataset)
        warn_of_small_shared_memory(batch_size * sample_nbytes, num_workers, dataloader_options)
        return JasperLoader(
            dataset,
            batch_size,
            sampler=sampler,
            prefetcher=prefetcher_for(dataset, batch_size, sample_nbytes, num_workers),
            adopt_order=order == "auto",
            why_order=why,
            ranks=ranks,
            num_workers=num_workers,
            pin_memory=resolve_pin_memory(
                pin_memory, any_mapped=reads_maps, device=on_device, cuda_available=torch.cuda.is_available()
            ),
            **dataloader_options,
        )
    except BaseException:
        dataset.close()
        raise


class JasperLoader(DataLoader[Any]):
    """A DataLoader that knows where in which epoch it stands. Made by :func:`create_loader`.

    Iterate it from one thread. An iterator may be abandoned at any time; the next one starts the epoch anew.

    Attributes:
        dataset_obj: the dataset.
        sampler_obj: its sampler, a ``DistributedSampler``.
        order: what the epochs are ordered by: ``"global"``, ``"block"`` or ``"sequential"``.
        stopwatch: times of the latest pass, see :meth:`advice`.
    """

    def __init__(
        self,
        dataset: JASPERSteeringDataset,
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
        self._clock = WorkerClock(num_workers, worker_init_fn) if num_workers else None
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
        self.dataset_obj = dataset
        self.sampler_obj = sampler
        self.stopwatch = Stopwatch()
        self._prefetcher = prefetcher
        if prefetcher is not None:
            dataset.announces = False
        self._adopt_order = adopt_order
        self._why_order = why_order
        self._ranks = ranks or Ranks(sampler.rank, sampler.num_replicas, "from the sampler")
        # What Accelerate's prepare() looks for: it would give each rank a share of this rank's share.
        self._is_accelerate_prepared = sampler.num_replicas > 1
        self._progress: _Progress | None = None
        self._warned = False

    @property
    def order(self) -> str:
        """What the epochs are ordered by: ``"global"``, ``"block"`` or ``"sequential"``."""
        return self.sampler_obj.order.kind

    def __iter__(self) -> Any:
        """Serve this rank's batches of the epoch, from the resume point if a state was loaded.

        The pass begins with its first batch: what is set until then, an epoch or a state, still counts. Trainers
        make an iterator early and set the epoch later.
        """
        return _Pass(self)

    def begin_pass(self) -> tuple[Iterator[Any], _Progress, Stopwatch]:
        """What :class:`_Pass` needs at its first batch: PyTorch's iterator, and where to write down how it goes."""
        previous, sampler = self._progress, self.sampler_obj
        repeated = previous is not None and previous.delivered > 1 and previous.epoch == sampler.epoch
        if repeated and sampler.shuffle and not sampler.start and not self._warned:
            self._warned = True
            warn_same_epoch(sampler.epoch)
        self.stopwatch = Stopwatch()
        if self._prefetcher is not None:
            self._prefetcher.stopwatch = self.stopwatch
        gathers_before = Meter() if self._clock is None else self._clock.read()
        # Before PyTorch's iterator, which takes the resume point as soon as it has workers to feed.
        batches = sampler.batches(self.batch_size or 1, sampler.start)
        self._progress = _Progress(sampler.epoch, sampler.start, batches, gathers_before)
        return self._serve(), self._progress, self.stopwatch

    def _serve(self) -> Iterator[Any]:
        """PyTorch's iterator; without workers and with a dataset of ours, one that gathers several batches at once."""
        dataset: Any = self.dataset
        ours = getattr(type(dataset), "__getitems__", None) is JASPERSteeringDataset.__getitems__
        if self.num_workers or not ours:
            return super().__iter__()
        # PyTorch's iterators draw a seed for workers, also without any: what a trainer draws must not depend on it.
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        batches: Any = self.batch_sampler
        at_once = batches_at_once(self.batch_size or 1, sample_nbytes_of(dataset))
        pin = self.pin_memory and torch.cuda.is_available()
        return CoalescingIterator(dataset, iter(batches), self.collate_fn, at_once, pin=pin)

    def discard_workers(self) -> None:
        """Do not use persistent workers again: one of them has died, and the others were stopped."""
        self._iterator = None

    # --- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: what the trainer was given, not what was prefetched. O(1), equal on all ranks."""
        sampler, now = self.sampler_obj, self._progress
        if now is None or now.epoch != sampler.epoch:
            return sampler.state(sampler.start).to_dict()
        # Full batches are counted even where the last is shorter here than on another rank: all states agree.
        step = (self.batch_size or 1) * sampler.num_replicas
        finished = now.finished or now.delivered >= now.batches
        return sampler.state(sampler.samples if finished else now.start + now.delivered * step).to_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next iteration serve the rest of an epoch, of which another run was given a part.

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
        self.sampler_obj.resume(state)
        self._progress = None

    def set_epoch(self, epoch: int) -> None:
        """Move dataset and sampler to an epoch; see :func:`set_epoch`."""
        self.sampler_obj.set_epoch(epoch)

    # --- what a person wants to know --------------------------------------------------------------------------

    def explain(self) -> str:
        """Why this loader is as it is: order, ranks, look-ahead, workers, pinning; a line each."""
        sampler = self.sampler_obj
        ahead, block = self._prefetcher, self.order == "block"
        lines = [
            f"order: {self.order}, because {self._why_order}" if sampler.shuffle else "order: sequential, as it lies",
            f"ranks: {self._ranks.rank} of {self._ranks.world_size} ({self._ranks.source}), {len(sampler)} samples here",
            "look-ahead: none, nothing is mapped" if ahead is None else f"look-ahead: {ahead.depth} batches announced",
            *(["steering: read past the page cache, a window ahead"] if ahead and ahead.stage and block else []),
            f"workers: {self.num_workers or 'none, batches are gathered in this process'}",
            f"pinned batches: {'yes' if self.pin_memory else 'no'}",
        ]
        return "\n".join(lines)

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


@dataclass(slots=True)
class _Progress:
    """How far a pass has come. The loader keeps this, and not the pass, whose workers end when it is let go.

    Attributes:
        epoch: the epoch that it serves.
        start: samples that were consumed before it, over all ranks.
        batches: how many it has, on the rank that has the most.
        gathers_before: what workers had measured before it.
        delivered: batches that the trainer was given.
        finished: whether somebody asked for one more than there are; trainers that count do not.
    """

    epoch: int
    start: int
    batches: int
    gathers_before: Meter
    delivered: int = 0
    finished: bool = False


class _Pass:
    """One iteration over a loader: counts what the trainer was given, and measures what it waited for."""

    def __init__(self, loader: JasperLoader) -> None:
        self._length = len(loader)
        self._waiting: JasperLoader | None = loader
        # Weak from the first batch on: an abandoned pass, or loader, must go at once and take its workers with it.
        self._loader = weakref.ref(loader)
        self._batches: Any = iter(())
        self._staged: WindowPrefetcher | None = None
        self._progress: _Progress
        self._watch: Stopwatch

    def __iter__(self) -> Iterator[Any]:
        return self

    def __len__(self) -> int:
        return self._length

    def __next__(self) -> Any:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._batches, self._progress, self._watch = waiting.begin_pass()
        watch = self._watch
        if not watch.began:
            watch.began = perf_counter()
        try:
            if getattr(self._batches, "ready", False):
                # Reading the clocks of Meter takes longer than to hand over a batch that is there.
                began = perf_counter()
                batch = next(self._batches)
                watch.wait.add_quick(perf_counter() - began)
            else:
                with watch.wait:
                    batch = next(self._batches)
            if waiting is not None:
                self._staged = getattr(waiting.dataset_obj, "staged", None)
        except StopIteration:
            self._progress.finished = True
            self._release()
            watch.wait.batches -= 1
            watch.ended = perf_counter()
            raise
        except DEATH_SIGNS as exc:
            try:
                raise_if_worker_died(exc, self._batches)
            except WorkerDiedError:
                loader = self._loader()
                if loader is not None:
                    loader.discard_workers()
                raise
            raise
        self._progress.delivered += 1
        watch.ended = perf_counter()
        return batch

    def _release(self) -> None:
        """Let go of what was read ahead for this pass; an abandoned one has batches that were on their way."""
        staged, self._staged = self._staged, None
        if staged is not None:
            staged.close()

    def __del__(self) -> None:
        self._release()
