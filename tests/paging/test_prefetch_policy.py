"""When to prefetch: a simulated page cache, and what the policy decides."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from jasper_store.paging import prefetch_policy as module
from jasper_store.paging.madvise import PAGE
from jasper_store.paging.prefetch_policy import PrefetchPolicy


class Machine:
    """A page cache, the counters of a process that uses it, and one reader with its policy."""

    def __init__(self, monkeypatch, *, counts_reads=True, backend="process_madvise", **options):
        self.cached: set[int] = set()
        self.read = 0
        self.faults = 0
        self.counts_reads = counts_reads
        self.prefetched = 0
        monkeypatch.setattr(module, "madvise_batcher", lambda: SimpleNamespace(backend=backend, prefetch=self.prefetch))
        self.policy = PrefetchPolicy(counters=self, **options)
        self.rng = np.random.default_rng(0)

    def pages_read(self):
        return self.read

    def major_faults(self):
        return self.faults

    def prefetch(self, ranges):
        pages = set((ranges[:, 0] // PAGE).tolist())
        if self.counts_reads:
            self.read += len(pages - self.cached)
        self.cached |= pages
        self.prefetched += 1

    def batches(self, count, size=256, pages=100_000, keep=None):
        """Number of batches that were prefetched, and page faults that prefetching would have spared."""
        self.prefetched, faults = 0, self.faults
        for _ in range(count):
            rows = np.unique(self.rng.integers(0, pages, size))
            if self.policy.should_prefetch():
                self.policy.prefetch(np.stack([rows * PAGE, np.full(len(rows), PAGE)], axis=1))
            self.faults += len(set(rows.tolist()) - self.cached)
            self.cached |= set(rows.tolist())
            self.policy.record_gather(size)
            if keep is not None:
                self.cached = set(list(self.cached)[-keep:])
        return self.prefetched, self.faults - faults


def test_cold_rows_are_always_prefetched(monkeypatch):
    machine = Machine(monkeypatch)
    assert machine.batches(200, pages=10**9, keep=10_000) == (200, 0)


@pytest.mark.parametrize("size", [1, 32, 256, 2048])
def test_resident_rows_soon_are_not(monkeypatch, size):
    machine = Machine(monkeypatch)
    machine.cached = set(range(100_000))
    prefetched, _ = machine.batches(1500 if size == 1 else 100, size)
    assert prefetched <= -(-1100 // size) + 1
    assert not machine.policy.prefetching
    assert machine.batches(100, size) == (0, 0)


def test_a_warming_cache_is_prefetched_until_it_is_warm(monkeypatch):
    machine = Machine(monkeypatch)
    _, faults = machine.batches(4000, pages=50_000)
    assert not machine.policy.prefetching
    assert len(machine.cached) > 0.99 * 50_000
    assert faults < 0.02 * 50_000


@pytest.mark.parametrize("size", [1, 256, 2048])
def test_it_begins_again_when_pages_vanish(monkeypatch, size):
    machine = Machine(monkeypatch)
    machine.cached = set(range(100_000))
    machine.batches(1500 if size == 1 else 100, size)
    machine.cached.clear()
    prefetched, faults = machine.batches(100, size)
    assert prefetched >= 92
    assert faults <= max(size, 8)


def test_one_fault_alone_proves_nothing(monkeypatch):
    machine = Machine(monkeypatch)
    machine.cached = set(range(100_000))
    machine.batches(10)
    for _ in range(20):
        machine.faults += 1
        assert machine.batches(10) == (0, 0) or machine.faults > 0
        assert not machine.policy.prefetching


def test_uncounted_reads_are_nearly_always_prefetched(monkeypatch):
    machine = Machine(monkeypatch, counts_reads=False)
    machine.batches(2000, pages=10**9, keep=1000)  # learning
    prefetched, _ = machine.batches(1000, pages=10**9, keep=1000)
    assert prefetched >= 990


def test_patience_comes_back(monkeypatch):
    machine = Machine(monkeypatch, counts_reads=False)
    machine.batches(2000, pages=10**9, keep=1000)
    machine.cached = set(range(100_000))
    machine.batches(1000)
    assert not machine.policy.prefetching
    machine.cached.clear()
    machine.batches(10)
    machine.counts_reads = True
    machine.cached = set(range(100_000))
    assert machine.batches(100)[0] < 10


def test_a_reader_whose_workers_gather_probes(monkeypatch):
    machine = Machine(monkeypatch, probe_every=8)
    everything = set(range(100_000))
    machine.cached = everything.copy()

    def ahead(count):
        machine.prefetched = 0
        for _ in range(count):
            if machine.policy.should_prefetch():
                rows = np.unique(machine.rng.integers(0, 100_000, 256))
                machine.policy.prefetch(np.stack([rows * PAGE, np.full(len(rows), PAGE)], axis=1))
        return machine.prefetched

    assert ahead(100) < 20
    assert not machine.policy.prefetching
    machine.cached.clear()
    assert ahead(100) > 80
    machine.cached = everything
    ahead(20)
    assert ahead(80) == 10


def test_without_the_system_call_nothing_is_prefetched(monkeypatch):
    machine = Machine(monkeypatch, backend="none")
    assert machine.batches(50, pages=10**9)[0] == 0


def test_a_fork_sets_the_counters_back(monkeypatch):
    machine = Machine(monkeypatch)
    machine.faults = 1000
    machine.cached = set(range(100_000))
    machine.batches(10)
    machine.faults = 0
    assert machine.batches(10) == (0, 0)
    assert not machine.policy.prefetching


def test_without_counters_it_always_prefetches(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(module, "madvise_batcher", lambda: SimpleNamespace(backend="madvise", prefetch=lambda _: None))
    policy = PrefetchPolicy()
    monkeypatch.undo()
    policy.prefetch(np.empty((0, 2), dtype=np.int64))
    policy.record_gather(5)
    assert policy.prefetching


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_this_systems_counters_rise(tmp_path):
    import mmap
    import os

    from jasper_store.paging import madvise as paging
    from jasper_store.paging.mapping import FileMap
    from jasper_store.paging.residency import cached_bytes, drop_cache

    path = tmp_path / "data"
    path.write_bytes(bytes(64 * mmap.PAGESIZE))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    drop_cache(path, 0, 64 * mmap.PAGESIZE)
    if cached_bytes(path, 0, 64 * mmap.PAGESIZE) != 0:
        pytest.skip("this file system does not let go of its cache (tmpfs), or does not tell")
    counters = module._RusageCounters()
    fmap = FileMap(path)
    paging.advise(fmap.address, fmap.nbytes, "random")
    read, faults = counters.pages_read(), counters.major_faults()
    int(fmap.bytes[5 * PAGE])
    assert counters.major_faults() > faults
    if counters.pages_read() == read:
        pytest.skip("this file system does not count its reads")
    read = counters.pages_read()
    paging.madvise_batcher().prefetch(paging.row_ranges(fmap.address, PAGE, PAGE, np.arange(20, 30)))
    assert counters.pages_read() >= read + 10
