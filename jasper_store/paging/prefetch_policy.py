"""When to prefetch: two counters of the process tell whether rows still come from the disk.

Prefetching rows that are cached costs five times their gather, so a reader of cached rows must stop; when its pages
are evicted later, it must start again. The kernel counts both cases for free (measured in docs/notes-paging.md):

* while prefetching is on: the blocks that this thread requested from the disk *during* the prefetch call. If there
  are none for a thousand ranges in a row, prefetching is wasted;
* while prefetching is off: the process's major page faults, those that waited for a disk. A few in one gather mean
  that prefetching would have paid.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

from jasper_store.paging.madvise import madvise_batcher
from jasper_store.paging.residency import PAGE

if TYPE_CHECKING:
    import numpy as np

__all__ = ["IoCounters", "PrefetchPolicy"]

# Prefetching a cached row costs 0.5 us, a page fault that waits for a fast disk 70 us.
_ROWS_PER_MISS = 128
_MIN_ROWS = 2 * _ROWS_PER_MISS  # One fault alone, say of a log file, proves nothing.
_PATIENCE = 1024
_MAX_PATIENCE = 1 << 16
_HASTY_BATCHES = 16  # Prefetching that starts again within so many batches was stopped too early.
_BLOCK_NBYTES = 512  # Unit of ru_inblock, whatever the disk's block size is.


class IoCounters(Protocol):
    """Source of the counters; tests have their own."""

    def pages_read(self) -> int:
        """Pages that this thread has requested from the disk so far."""

    def major_faults(self) -> int:
        """Page faults that waited for a disk so far, in all threads of this process."""


class _RusageCounters:
    """getrusage(2): 0.4 us for a thread, 0.7 us for a process."""

    def __init__(self) -> None:
        import resource

        self._getrusage = resource.getrusage
        self._process = resource.RUSAGE_SELF
        # macOS counts for the process only; reads of other threads then keep prefetching on for longer.
        self._thread = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)

    def pages_read(self) -> int:
        return self._getrusage(self._thread).ru_inblock * _BLOCK_NBYTES // PAGE

    def major_faults(self) -> int:
        return self._getrusage(self._process).ru_majflt


class PrefetchPolicy:
    """Decides whether one reader should prefetch its rows. One per reader, not shared between two.

    A reader is anything that prefetches and gathers the same rows: the ``take`` of one tensor, or a loader that
    prefetches later batches. Per batch, call in this order::

        if policy.should_prefetch():
            policy.prefetch(row_ranges(...))
        ...                                   # gather
        policy.record_gather(len(rows))

    Prefetching is on at first. It stops when of 1,024 ranges in a row (almost) every page was cached. If stopping
    soon proves wrong, it waits for twice as many ranges the next time, up to 65,536, so that a file system that does
    not count its reads (some network ones) is nearly always prefetched. It starts again as soon as the major faults
    of a gather cost more than prefetching: one for 128 rows.

    Args:
        probe_every: while off, prefetch one batch in so many anyway; 0 never does. For a loader whose workers
            gather, so that their page faults are not counted here.
        counters: those of this process by default.
    """

    def __init__(self, probe_every: int = 0, counters: IoCounters | None = None) -> None:
        self._counters: IoCounters | None = (
            counters if counters is not None or sys.platform == "win32" else _RusageCounters()
        )
        self._probe_every = probe_every
        self._on = True
        self._patience = _PATIENCE
        self._batches_off = 0  # since prefetching stopped
        # Of the current window: rows prefetched (on) or gathered (off), and pages that had to be read for them.
        self._rows = 0
        self._pages = 0
        self._faults = 0 if self._counters is None else self._counters.major_faults()

    @property
    def prefetching(self) -> bool:
        """Whether prefetching is on."""
        return self._on

    def should_prefetch(self) -> bool:
        """Whether to prefetch the next batch; call once per batch. False if the system has no such call."""
        if not self._on:
            self._batches_off += 1
            if not self._probe_every or self._batches_off % self._probe_every:
                return False
        return madvise_batcher().backend != "none"

    def prefetch(self, ranges: np.ndarray) -> None:
        """Prefetch page ranges, and record how many of their pages had to be read."""
        counters = self._counters
        if counters is None or len(ranges) == 0:
            madvise_batcher().prefetch(ranges)
            return
        before = counters.pages_read()
        madvise_batcher().prefetch(ranges)
        read = counters.pages_read() - before
        if not self._on:
            if read * _ROWS_PER_MISS >= len(ranges):
                self._start()
            return
        self._rows += len(ranges)
        self._pages += read
        if self._rows >= self._patience:
            paid = self._pages * _ROWS_PER_MISS >= self._rows
            self._rows = self._pages = 0
            if not paid:
                self._on = False
                self._batches_off = 0

    def record_gather(self, n_rows: int) -> None:
        """Record a gather of ``n_rows`` rows; its page faults may turn prefetching on again."""
        counters = self._counters
        if counters is None:
            return
        now = counters.major_faults()
        missed = now - self._faults
        self._faults = now
        if self._on:
            return
        self._rows += n_rows
        self._pages += max(missed, 0)  # Below 0 after a fork: a child's counters start at 0.
        if self._pages * _ROWS_PER_MISS >= max(self._rows, _MIN_ROWS):
            self._start()
        elif self._rows >= _PATIENCE:
            self._rows = self._pages = 0

    def _start(self) -> None:
        hasty = self._batches_off < _HASTY_BATCHES
        self._patience = min(self._patience * 2, _MAX_PATIENCE) if hasty else _PATIENCE
        self._on = True
        self._rows = self._pages = 0
