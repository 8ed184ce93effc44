"""Knowing when not to announce: whether the disk is still being read, told by two counters of the process.

Announcing rows that are cached costs five times their gather, so a warm reader must stop; and when its pages are
evicted later, it must begin again. The kernel counts both sides for free (measured in docs/notes-paging.md):

* while announcing: the blocks that this thread asked of the disk *during* the announcement. None, for a thousand
  ranges on end, and it was waste;
* while silent: the process's major page faults, those that waited for a disk. A few in one gather, and announcing
  would have paid.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

from jasper_store.paging.madvise import madvise_batcher
from jasper_store.paging.residency import PAGE

if TYPE_CHECKING:
    import numpy as np

__all__ = ["IoCounters", "PrefetchPolicy"]

# Announcing a cached row costs 0.5 us, a page fault that waits alone for a fast disk 70 us.
_ROWS_PER_MISS = 128
_MIN_ROWS = 2 * _ROWS_PER_MISS  # One fault alone, say of a log file, proves nothing.
_PATIENCE = 1024
_MAX_PATIENCE = 1 << 16
_SOON = 16  # Batches.
_BLOCK = 512  # Unit of ru_inblock, whatever the disk's is.


class IoCounters(Protocol):
    """Where the counters come from; a test brings its own."""

    def pages_read(self) -> int:
        """Pages that this thread has asked of the disk so far."""

    def major_faults(self) -> int:
        """Page faults of this process, all threads, that waited for a disk so far."""


class _System:
    """getrusage(2): 0.4 us for a thread, 0.7 us for a process."""

    def __init__(self) -> None:
        import resource

        self._getrusage = resource.getrusage
        self._process = resource.RUSAGE_SELF
        # macOS counts for the process only; other threads' reads then keep the announcing on for longer.
        self._thread = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)

    def pages_read(self) -> int:
        return self._getrusage(self._thread).ru_inblock * _BLOCK // PAGE

    def major_faults(self) -> int:
        return self._getrusage(self._process).ru_majflt


class PrefetchPolicy:
    """Decides whether one reader should announce its rows. One per reader, not shared between two.

    A reader is whatever announces and gathers the same rows: the ``take`` of one tensor, or a loader that looks
    ahead. Use it in this order, per batch::

        if watch.should_announce():
            watch.announce(row_ranges(...))
        ...                                   # gather
        watch.after(len(rows))

    It begins announcing. It stops when 1 024 ranges in a row had (almost) every page in the cache; where stopping
    soon proves wrong, it waits twice as long the next time, up to 65 536 ranges, so that a file system that does
    not count its reads (some network ones) is announced nearly always. It begins again as soon as a gather's
    major faults cost more than announcing does: one for 128 rows.

    Args:
        probe_every: when silent, announce one batch in so many anyway. For a loader whose workers do the
            gathering, so that their page faults are not counted here; 0 never does.
        usage: counters; this process's own by default.
    """

    def __init__(self, probe_every: int = 0, usage: IoCounters | None = None) -> None:
        self._usage: IoCounters | None = usage if usage is not None or sys.platform == "win32" else _System()
        self._probe_every = probe_every
        self._on = True
        self._patience = _PATIENCE
        self._silent = 0  # batches since falling silent
        self._rows = 0  # rows of the present window: announced, or gathered in silence
        self._pages = 0  # pages that had to be read for them
        self._faults = 0 if self._usage is None else self._usage.major_faults()

    @property
    def prefetching(self) -> bool:
        """Whether it announces at present."""
        return self._on

    def should_prefetch(self) -> bool:
        """Whether to announce the next batch; ask once per batch. False where the system has no such call."""
        if madvise_batcher().backend == "none":
            return False
        if self._on:
            return True
        self._silent += 1
        return self._probe_every > 0 and self._silent % self._probe_every == 0

    def announce(self, ranges: np.ndarray) -> None:
        """Announce page ranges, and note how many of their pages had to be read."""
        usage = self._usage
        if usage is None or len(ranges) == 0:
            madvise_batcher().announce(ranges)
            return
        before = usage.pages_read()
        madvise_batcher().announce(ranges)
        read = usage.pages_read() - before
        if not self._on:
            if read * _ROWS_PER_MISS >= len(ranges):
                self._start()
            return
        self._rows += len(ranges)
        self._pages += read
        if self._rows >= self._patience:
            worth = self._pages * _ROWS_PER_MISS >= self._rows
            self._rows = self._pages = 0
            if not worth:
                self._on = False
                self._silent = 0

    def after(self, n_rows: int) -> None:
        """Note a gather of ``n_rows`` rows; its page faults may start the announcing again."""
        usage = self._usage
        if usage is None:
            return
        now = usage.major_faults()
        missed = now - self._faults
        self._faults = now
        if self._on:
            return
        self._rows += n_rows
        self._pages += max(missed, 0)  # Below 0 after a fork: a child's counters start again.
        if self._pages * _ROWS_PER_MISS >= max(self._rows, _MIN_ROWS):
            self._start()
        elif self._rows >= _PATIENCE:
            self._rows = self._pages = 0

    def _start(self) -> None:
        # Silence that was broken at once was a wrong verdict.
        wrong = self._silent < _SOON
        self._patience = min(self._patience * 2, _MAX_PATIENCE) if wrong else _PATIENCE
        self._on = True
        self._rows = self._pages = 0
