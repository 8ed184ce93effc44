"""What a loader waited for, in milliseconds per batch, and what to change.

Each batch costs a few clock readings, also in workers, which write their sums into shared memory. A gather that takes
longer than the processor time it used, while the kernel counts major faults, waited for pages.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.data import get_worker_info

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Meter", "Stopwatch", "WorkerClock", "advise"]

_BATCHES, _WALL, _CPU, _FAULTS = range(4)
#: A loader that takes less than this share of an epoch's time is not the bottleneck.
_NEGLIGIBLE: Final = 0.05


def _major_faults() -> int:
    """Major faults of this thread since it began; 0 where the system does not count them by thread."""
    if sys.platform == "linux":
        import resource

        return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
    return 0


@dataclass(slots=True)
class Meter:
    """Sums over batches: how many, seconds by the clock, seconds of this thread's processor time, major faults."""

    batches: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    faults: int = 0
    _began: tuple[float, float, int] = (0.0, 0.0, 0)

    def add_quick(self, seconds: float) -> None:
        """Count a batch that was gathered before, so that it waited for no page."""
        self.batches += 1
        self.wall += seconds
        self.cpu += seconds

    def __enter__(self) -> None:
        self._began = (time.perf_counter(), time.thread_time(), _major_faults())

    def __exit__(self, *error: object) -> None:
        wall, cpu, faults = self._began
        self.batches += 1
        self.wall += time.perf_counter() - wall
        self.cpu += time.thread_time() - cpu
        self.faults += _major_faults() - faults


class WorkerClock:
    """Measures gathers inside workers: a ``worker_init_fn`` that wraps the dataset of the worker it runs in.

    The wrapped method is an attribute of the worker's own copy of the dataset, so nothing of it is pickled and
    the trainer's dataset stays as it is.

    Args:
        workers: number of workers.
        then: the user's ``worker_init_fn``, called first.
        batch_size: samples per batch; a gather of more is several batches.
    """

    def __init__(self, workers: int, then: Callable[[int], None] | None = None, batch_size: int | None = None) -> None:
        self._sums = torch.zeros(workers, 4, dtype=torch.float64).share_memory_()  # type: ignore[no-untyped-call]
        self._then = then
        self._batch_size = batch_size

    def __call__(self, worker: int) -> None:
        """Run in a worker as it starts."""
        if self._then is not None:
            self._then(worker)
        info = get_worker_info()
        dataset: Any = None if info is None else info.dataset
        gather = getattr(dataset, "__getitems__", None)
        if gather is None:
            return
        sums, meter, batch_size = self._sums[worker], Meter(), self._batch_size

        def timed(indices: Any) -> Any:
            with meter:
                batch = gather(indices)
            meter.batches += 0 if batch_size is None else max(-(-len(indices) // batch_size) - 1, 0)
            sums.copy_(torch.tensor([meter.batches, meter.wall, meter.cpu, meter.faults], dtype=torch.float64))
            return batch

        dataset.__getitems__ = timed

    def read(self) -> Meter:
        """Sums over all workers since they started."""
        total = self._sums.sum(0).tolist()
        return Meter(int(total[_BATCHES]), total[_WALL], total[_CPU], int(total[_FAULTS]))


@dataclass(slots=True)
class Stopwatch:
    """What one pass over a loader cost, in seconds; sums over its batches.

    Attributes:
        wait: time that the trainer waited for batches.
        prefetch: time for prefetching rows; part of ``wait`` without workers.
        transfer: time for starting copies to a device (``to_device``).
        began: clock when the first batch was asked for.
        ended: clock when the last one was returned.
    """

    wait: Meter = field(default_factory=Meter)
    prefetch: Meter = field(default_factory=Meter)
    transfer: float = 0.0
    began: float = 0.0
    ended: float = 0.0

    @property
    def wall(self) -> float:
        """Seconds from asking for the first batch to the end, the trainer's steps included."""
        return max(self.ended - self.began, 0.0)


@dataclass(frozen=True, slots=True)
class _Costs:
    """Milliseconds per batch."""

    interval: float
    wait: float
    pages: float
    gather: float
    sending: float
    prefetch: float
    transfer: float
    faults: float


def _costs(watch: Stopwatch, gathers: Meter, workers: int) -> _Costs:
    batches = max(watch.wait.batches, 1)
    done = max(gathers.batches, 1)
    wait, interval = watch.wait.wall / batches, watch.wall / batches
    # Without workers, rows are prefetched while the trainer waits for a batch.
    prefetched = Meter() if workers else watch.prefetch
    gather = (gathers.wall - prefetched.wall) / done
    blocked = gather - (gathers.cpu - prefetched.cpu) / done
    pages = max(blocked, 0.0) if gathers.faults else 0.0
    # A worker that is never idle sends batches for all of the time that it does not gather.
    busy = workers * interval - gather
    sending = max(busy, 0.0) if workers and wait > _NEGLIGIBLE * interval else 0.0
    return _Costs(
        interval=1e3 * interval,
        wait=1e3 * wait,
        pages=1e3 * pages,
        gather=1e3 * max(gather - pages, 0.0),
        sending=1e3 * sending,
        prefetch=1e3 * watch.prefetch.wall / batches,
        transfer=1e3 * watch.transfer / batches,
        faults=gathers.faults / done,
    )


def advise(watch: Stopwatch, gathers: Meter, *, workers: int, mapped: bool, pinned: bool, block: bool) -> list[str]:
    """What a pass waited for and what to change, one line each.

    Args:
        watch: the pass, as the trainer saw it.
        gathers: the same batches, where they were gathered.
        workers: worker processes of the loader.
        mapped: whether data that is read per sample is mapped.
        pinned: whether the loader pins its batches.
        block: whether it serves the block order.
    """
    if not watch.wait.batches:
        return ["no batch was served yet: iterate over the loader, then ask again"]
    cost = _costs(watch, gathers, workers)
    where = f"in {workers} worker{'s' if workers != 1 else ''}" if workers else "in the trainer's process"
    waits = (
        f"per batch: pages {cost.pages:.3f} ms ({cost.faults:.1f} major faults), gather {cost.gather:.3f} ms {where},"
        f" worker transfer {cost.sending:.3f} ms, prefetching {cost.prefetch:.3f} ms,"
        f" device copy {cost.transfer:.3f} ms"
    )
    lines = [
        f"{watch.wait.batches} batches, one every {cost.interval:.3f} ms, of which {cost.wait:.3f} ms waiting for data",
        waits,
    ]
    share = (cost.wait + cost.transfer) / cost.interval if cost.interval else 0.0
    if share < _NEGLIGIBLE:
        return [*lines, f"nothing to change: the trainer waits {100 * share:.1f} % of its time"]
    return [*lines, *_remedies(cost, workers=workers, mapped=mapped, pinned=pinned, block=block)]


def _remedies(cost: _Costs, *, workers: int, mapped: bool, pinned: bool, block: bool) -> list[str]:
    """What to change, the most costly first."""
    found: list[tuple[float, str]] = []
    if mapped and cost.pages > 0:
        remedy = "js.warm_up(...) if the data fits the page cache, use_mmap=False if it fits in memory"
        if not block:
            remedy += ", order='block' if it does not"
        found.append((cost.pages, f"pages: the disk is what it waits for; {remedy}"))
    if workers:
        remedy = "num_workers=0 saves it; data in memory is gathered faster than it is sent"
        found.append((cost.sending, f"worker transfer: batches travel between processes; {remedy}"))
        if cost.gather > workers * cost.interval / 2:
            cores = os.cpu_count() or 1
            more = (
                f"num_workers={workers + 1}" if workers < cores else f"fewer bytes (dtype=), all {cores} cores are busy"
            )
            found.append((cost.gather / workers, f"gather: the workers are busy copying rows; {more}"))
    else:
        text = (
            "gather: copying the rows is what it waits for; num_workers=1 does it during the step if the step leaves a"
            " core free, embeddings converted to float16 halve it"
        )
        found.append((cost.gather, text))
    if cost.transfer > 0 and not pinned:
        remedy = "pin_memory=True makes copies overlap the step" if not mapped else "preload the data to pin batches"
        found.append((cost.transfer, f"device copy: batches are not pinned; {remedy}"))
    return [text for seconds, text in sorted(found, key=lambda pair: -pair[0]) if seconds > 0]
