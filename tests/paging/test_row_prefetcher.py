"""Prefetching of rows that a caller names ahead, once they are cached: whose page faults are seen, and who must probe."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from jasper_store.paging import prefetch_policy
from jasper_store.paging.row_prefetcher import RowPrefetcher

BATCH, ROW_NBYTES = 64, 4096


class Caller:
    """One that prefetches and gathers rows, on a machine whose pages are cached until :meth:`evict`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = self.read = self.faults = 0
        self.evicted = False
        batcher = SimpleNamespace(backend="process_madvise", prefetch=self._prefetch)
        monkeypatch.setattr(prefetch_policy, "madvise_batcher", lambda: batcher)
        monkeypatch.setattr(prefetch_policy, "_RusageCounters", lambda: self)
        monkeypatch.setattr("sys.platform", "linux")
        monkeypatch.setattr("jasper_store.paging.madvise.advise", lambda *_: True)
        self.prefetcher = RowPrefetcher(0, ROW_NBYTES, ROW_NBYTES, 1 << 20)
        self.rows = torch.arange(BATCH) * 100  # scattered: neighbours would be one range

    def pages_read(self) -> int:
        return self.read

    def major_faults(self) -> int:
        return self.faults

    def _prefetch(self, ranges: object) -> None:
        self.calls += 1
        self.read += len(ranges) if self.evicted else 0  # type: ignore[arg-type]

    def evict(self) -> None:
        self.evicted = True

    def gather(self) -> None:
        self.prefetcher.before_gather(self.rows)
        self.faults += BATCH if self.evicted else 0
        self.prefetcher.after_gather(BATCH)

    def by_turns(self, batches: int) -> int:
        """Calls that reached the kernel while this thread prefetched and gathered."""
        before = self.calls
        for _ in range(batches):
            self.prefetcher.prefetch_ahead(self.rows)
            self.gather()
        return self.calls - before

    def ahead_only(self, batches: int) -> int:
        """The same while others gather."""
        before = self.calls
        for _ in range(batches):
            self.prefetcher.prefetch_ahead(self.rows)
        return self.calls - before


def test_by_turns_nothing_is_probed_and_eviction_is_noticed_by_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    caller = Caller(monkeypatch)
    caller.by_turns(100)
    assert not caller.prefetcher.prefetching
    assert caller.by_turns(1000) == 0
    caller.evict()
    assert caller.by_turns(100) > 50
    assert caller.prefetcher.prefetching


def test_where_others_gather_eviction_is_noticed_by_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    caller = Caller(monkeypatch)
    caller.ahead_only(100)
    assert not caller.prefetcher.prefetching
    assert 0 < caller.ahead_only(640) <= 11
    caller.evict()
    caller.ahead_only(128)
    assert caller.prefetcher.prefetching


def test_gathers_of_another_thread_do_not_count_as_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    caller = Caller(monkeypatch)
    caller.by_turns(100)
    before = caller.calls
    for _ in range(640):
        caller.prefetcher.prefetch_ahead(caller.rows)
        thread = threading.Thread(target=caller.gather)
        thread.start()
        thread.join()
    assert caller.calls > before
