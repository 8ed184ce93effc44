"""Prefetching: exactly the pages of the rows, the same on every backend, in every process."""

from __future__ import annotations

import errno
import os
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jasper_store.paging import madvise as paging, syscalls
from jasper_store.paging.madvise import PAGE, MadviseBatcher, madvise_batcher, row_ranges, span
from jasper_store.paging.mapping import FileMap
from jasper_store.paging.residency import cached_bytes, drop_cache

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
BASE = 1 << 40


def pages_of(ranges):
    return [page for start, nbytes in ranges.tolist() for page in range(start // PAGE, (start + nbytes) // PAGE)]


@given(
    address=st.integers(0, 3 * PAGE),
    stride=st.one_of(st.integers(1, 300), st.integers(1, 5 * PAGE), st.sampled_from([PAGE, PAGE - 1, PAGE + 1, 1536])),
    data=st.data(),
    rows=st.lists(st.integers(0, 5000), max_size=60),
)
@settings(max_examples=300)
def test_ranges_cover_exactly_the_pages_of_the_rows(address, stride, data, rows):
    nbytes = data.draw(st.integers(1, stride))
    ranges = row_ranges(BASE + address, stride, nbytes, np.array(rows, dtype=np.int64))
    expected: set[int] = set()
    for row in rows:
        begin = BASE + address + row * stride
        expected.update(range(begin // PAGE, (begin + nbytes - 1) // PAGE + 1))
    assert ranges.dtype == np.int64
    assert ranges.flags.c_contiguous
    assert ranges.shape[1:] == (2,)
    assert pages_of(ranges) == sorted(expected)
    assert (ranges % PAGE == 0).all()
    assert (ranges[1:, 0] > ranges[:-1].sum(axis=1)).all()


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int64, np.uint64])
def test_rows_of_every_integer_type(dtype):
    rows = np.array([200, 3, 3, 255], dtype=dtype)
    expected = row_ranges(BASE, 1536, 1536, rows.astype(np.int64))
    assert np.array_equal(row_ranges(BASE, 1536, 1536, rows), expected)


def test_nothing_to_prefetch():
    assert row_ranges(BASE, 8, 8, np.array([], dtype=np.int64)).shape == (0, 2)
    assert row_ranges(BASE, 0, 0, np.array([1, 2])).shape == (0, 2)
    assert span(BASE, 0).shape == (0, 2)
    madvise_batcher().prefetch(np.empty((0, 2), dtype=np.int64))


def test_one_range():
    assert span(BASE + 5, 10).tolist() == [[BASE, PAGE]]
    assert span(BASE + PAGE - 1, 2).tolist() == [[BASE, 2 * PAGE]]


# ------------------------------------------------------------------------------------------------ backends


class Kernel:
    """System calls that remember what was asked, and refuse as told."""

    def __init__(self, monkeypatch, *, pidfd=0, refuse=(), short=None):
        self.prefetched: list[tuple[int, int]] = []
        self.refuse = list(refuse)
        self.short = short
        self.calls = 0
        self.pidfd_error = pidfd
        self.hole = -1
        monkeypatch.setattr(syscalls, "pidfd_open", self.pidfd_open)
        monkeypatch.setattr(syscalls, "process_madvise", self.process_madvise)
        monkeypatch.setattr(syscalls, "madvise", self.madvise)

    def pidfd_open(self, pid):
        return (-1, self.pidfd_error) if self.pidfd_error else (os.open(os.devnull, os.O_RDONLY), 0)

    def process_madvise(self, pidfd, iovec, count, advice):
        assert count <= 1024
        if self.refuse:
            error = self.refuse.pop(0)
            if error:
                return -1, error
        if count == 0:
            return 0, 0
        self.calls += 1
        import ctypes

        pairs = np.ctypeslib.as_array((ctypes.c_int64 * (2 * count)).from_address(iovec)).reshape(-1, 2).tolist()
        done = 0
        for address, nbytes in pairs:
            if address == self.hole:
                return (done, 0) if done else (-1, errno.ENOMEM)
            take = nbytes if self.short is None else min(nbytes, self.short - done)
            if take:
                self.prefetched.append((address, take))
            done += take
            if self.short is not None and done >= self.short:
                break
        return done, 0

    def madvise(self, address, nbytes, advice):
        if address == self.hole:
            return errno.ENOMEM
        self.prefetched.append((address, nbytes))
        return 0

    def pages(self):
        return pages_of(np.array(self.prefetched, dtype=np.int64).reshape(-1, 2))


@pytest.fixture
def ranges():
    rows = np.random.default_rng(0).integers(0, 100_000, 2500)
    return row_ranges(BASE, 3 * PAGE, 5000, rows)


def test_one_call_for_1024_ranges(monkeypatch, ranges):
    kernel = Kernel(monkeypatch)
    one = MadviseBatcher()
    assert one.backend == "process_madvise"
    one.prefetch(ranges)
    assert kernel.calls == -(-len(ranges) // 1024)
    assert kernel.pages() == pages_of(ranges)


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS, errno.EINVAL])
def test_madvise_where_the_many_are_refused(monkeypatch, ranges, error):
    kernel = Kernel(monkeypatch, refuse=[error])
    one = MadviseBatcher()
    assert one.backend == "madvise"
    one.prefetch(ranges)
    assert kernel.pages() == pages_of(ranges)
    assert kernel.calls == 0


def test_madvise_where_there_is_no_pidfd(monkeypatch, ranges):
    kernel = Kernel(monkeypatch, pidfd=errno.ENOSYS)
    one = MadviseBatcher()
    assert one.backend == "madvise"
    one.prefetch(ranges)
    assert kernel.pages() == pages_of(ranges)


def test_nothing_where_there_is_no_libc(monkeypatch, ranges):
    kernel = Kernel(monkeypatch, pidfd=errno.ENOSYS)
    monkeypatch.setattr(syscalls, "libc", lambda: None)
    one = MadviseBatcher()
    assert one.backend == "none"
    one.prefetch(ranges)
    assert not kernel.prefetched


def test_a_permission_that_is_taken_away_later(monkeypatch, ranges):
    kernel = Kernel(monkeypatch)
    one = MadviseBatcher()
    assert one.backend == "process_madvise"
    kernel.refuse = [0, errno.EPERM, errno.EPERM]  # the second thousand, then the question whether it is the call
    one.prefetch(ranges)
    assert [one.backend] == ["madvise"]  # a list, or mypy holds on to the first answer
    assert kernel.pages() == pages_of(ranges)


@pytest.mark.parametrize("short", [PAGE, 7 * PAGE, 100 * PAGE])
def test_a_kernel_that_does_less_than_it_was_asked(monkeypatch, short):
    kernel = Kernel(monkeypatch, short=short)
    wanted = row_ranges(BASE, 16 * PAGE, 10 * PAGE, np.arange(30))
    MadviseBatcher().prefetch(wanted)
    assert kernel.pages() == pages_of(wanted)


@pytest.mark.parametrize("position", [0, 5, -1])
def test_a_range_that_is_not_mapped_is_passed_over(monkeypatch, position):
    kernel = Kernel(monkeypatch)
    wanted = row_ranges(BASE, 16 * PAGE, PAGE, np.arange(30))
    kernel.hole = int(wanted[position, 0])
    MadviseBatcher().prefetch(wanted)
    assert sorted(kernel.pages()) == [page for page in pages_of(wanted) if page != kernel.hole // PAGE]


def test_ranges_given_in_another_layout(monkeypatch, ranges):
    kernel = Kernel(monkeypatch)
    MadviseBatcher().prefetch(np.asfortranarray(ranges))
    assert kernel.pages() == pages_of(ranges)


# ------------------------------------------------------------------------------------------------ the real kernel


@pytest.fixture
def cold(tmp_path):
    """A file of which nothing is cached, mapped for random rows."""
    path = tmp_path / "data"
    with path.open("wb") as handle:
        handle.write(np.random.default_rng(0).bytes(3000 * PAGE))
        handle.flush()
        os.fsync(handle.fileno())
    drop_cache(path, 0, 3000 * PAGE)
    if cached_bytes(path, 0, 3000 * PAGE) != 0:
        pytest.skip("this file system does not let go of its cache (tmpfs), or does not tell")
    fmap = FileMap(path)
    paging.advise(fmap.address, fmap.nbytes, "random")
    return fmap


@linux
@pytest.mark.parametrize("backend", ["process_madvise", "madvise"])
def test_prefetched_pages_arrive_and_no_others(cold, monkeypatch, backend):
    if backend == "madvise":
        monkeypatch.setattr(syscalls, "pidfd_open", lambda _: (-1, errno.ENOSYS))
    one = MadviseBatcher()
    if one.backend != backend:
        pytest.skip(f"this process may only use {one.backend}")
    rows = np.arange(0, 2990, 2)
    one.prefetch(row_ranges(cold.address, PAGE, PAGE, rows))
    for row in rows.tolist():  # in the cache, if still on their way
        assert int(cold.bytes[row * PAGE]) >= 0
    assert cached_bytes(cold.fileno(), 0, cold.nbytes) == len(rows) * PAGE


@linux
def test_a_map_that_is_gone_is_harmless(cold):
    gone = row_ranges(cold.address, PAGE, PAGE, np.arange(0, 3000, 2))
    cold.close()
    madvise_batcher().prefetch(gone)


@linux
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_prefetches_its_own_memory(cold):
    one = madvise_batcher()
    backend, parents = one.backend, one._pidfd
    child = os.fork()
    if child == 0:
        status = 1
        try:
            private = FileMap(cold.path)  # an address that the parent does not map
            paging.advise(private.address, private.nbytes, "random")
            one.prefetch(row_ranges(private.address, PAGE, PAGE, np.array([7, 9])))
            int(private.bytes[7 * PAGE])
            int(private.bytes[9 * PAGE])
            good = one.backend == backend and one._pid == os.getpid()
            status = 0 if good and cached_bytes(cold.path, 0, cold.nbytes) == 2 * PAGE else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert one._pidfd == parents
    assert one._pid == os.getpid()


@linux
def test_results_do_not_depend_on_the_backend(cold, monkeypatch):
    rows = np.random.default_rng(1).integers(0, 2999, 200)
    expected = np.fromfile(cold.path, dtype=np.uint8).reshape(3000, PAGE)[rows]
    values = cold.bytes.view(3000, PAGE)
    for pidfd_error, library in ((0, True), (errno.EPERM, True), (errno.EPERM, False)):
        if pidfd_error:
            monkeypatch.setattr(syscalls, "pidfd_open", lambda _: (-1, errno.EPERM))
        if not library:
            monkeypatch.setattr(syscalls, "libc", lambda: None)
        MadviseBatcher().prefetch(row_ranges(cold.address, PAGE, PAGE, rows))
        assert np.array_equal(values[rows].numpy(), expected)
        paging.drop(cold.address, cold.nbytes, cold.fileno())


def test_system_calls_that_this_machine_does_not_number(monkeypatch):
    monkeypatch.setattr(syscalls, "_has_numbers", lambda: False)
    assert syscalls.pidfd_open(1) == (-1, errno.ENOSYS)
    assert syscalls.process_madvise(1, 0, 0, 3) == (-1, errno.ENOSYS)
    assert syscalls.cachestat(0, 0, 1) == (-1, errno.ENOSYS)
