"""Residency and letting go: truth on this system, and documented answers where a call is missing."""

from __future__ import annotations

import errno
import os
import sys
import time

import numpy as np
import pytest

from jasper_store.paging import madvise as paging, residency, syscalls
from jasper_store.paging.mapping import FileMap
from jasper_store.paging.residency import PAGE, cached_bytes, drop_cache, mapped_cached_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
SIZE = 40 * PAGE


@pytest.fixture
def file(tmp_path):
    """A file of which nothing is cached."""
    path = tmp_path / "data"
    with path.open("wb") as handle:
        handle.write(np.random.default_rng(0).bytes(SIZE))
        handle.flush()
        os.fsync(handle.fileno())
    drop_cache(path, 0, SIZE)
    if cached_bytes(path, 0, SIZE) != 0:
        pytest.skip("this file system does not let go of its cache (tmpfs), or does not tell")
    return path


def let_go(address, nbytes, path, offset=0, spared=0):
    """Drop a range until no more than some bytes of its whole pages are cached; the bytes left.

    A page that waits in another core's batch for its place in the kernel's lists cannot be let go at that moment.
    """
    first, last = -(-offset // PAGE) * PAGE, (offset + nbytes) // PAGE * PAGE
    for _ in range(40):
        assert paging.drop(address, nbytes, path, offset)
        left = cached_bytes(path, first, last - first)
        if left <= spared:
            break
        time.sleep(0.05)
    return left


def no_cachestat(monkeypatch, error=errno.ENOSYS):
    monkeypatch.setattr(syscalls, "cachestat", lambda *_: (-1, error))


@pytest.mark.parametrize("old_kernel", [False, True])
def test_what_was_read_is_cached(file, monkeypatch, old_kernel):
    if old_kernel:
        no_cachestat(monkeypatch)
    fmap = FileMap(file)
    paging.advise(fmap.address, SIZE, "random")
    assert cached_bytes(file, 0, SIZE) == 0
    int(fmap.bytes[3 * PAGE])
    assert cached_bytes(file, 0, SIZE) == PAGE
    assert cached_bytes(fmap.fileno(), 3 * PAGE, PAGE) == PAGE
    assert cached_bytes(file, 4 * PAGE, SIZE) == 0
    assert paging.residency(fmap.address, SIZE, file) == PAGE
    assert paging.residency(fmap.address, SIZE) == PAGE
    assert paging.residency(fmap.address + 3 * PAGE, 10, file, 3 * PAGE) == 10


@pytest.mark.parametrize("old_kernel", [False, True])
@pytest.mark.parametrize(("offset", "nbytes"), [(0, 0), (5, -1), (SIZE, 10), (SIZE * 2, 10)])
def test_ranges_without_bytes(file, monkeypatch, old_kernel, offset, nbytes):
    if old_kernel:
        no_cachestat(monkeypatch)
    file.read_bytes()
    assert cached_bytes(file, offset, nbytes) == 0


def test_where_the_kernel_will_not_tell(file, monkeypatch):
    no_cachestat(monkeypatch, errno.EPERM)
    assert cached_bytes(file, 0, SIZE) is None
    fmap = FileMap(file)
    assert paging.residency(fmap.address, SIZE, file) == 0


def test_an_old_kernel_is_not_believed_about_other_owners_files(file, monkeypatch):
    no_cachestat(monkeypatch)
    monkeypatch.setattr(residency, "_owns", lambda _: False)
    assert cached_bytes(file, 0, SIZE) is None


def test_without_any_call(file, monkeypatch):
    no_cachestat(monkeypatch)
    monkeypatch.setattr(syscalls, "libc", lambda: None)
    fmap = FileMap(file)
    assert cached_bytes(file, 0, SIZE) is None
    assert mapped_cached_bytes(fmap.address, SIZE) is None
    assert paging.residency(fmap.address, SIZE) == 0
    assert paging.residency(fmap.address, 0) == 0
    assert not paging.populate(fmap.address, SIZE)
    assert not paging.advise(fmap.address, SIZE, "random")
    assert not paging.drop(fmap.address, SIZE)


def test_mincore_in_windows(file, monkeypatch):
    monkeypatch.setattr(residency, "_MINCORE_WINDOW", 4 * PAGE)
    fmap = FileMap(file)
    file.read_bytes()
    assert mapped_cached_bytes(fmap.address, SIZE) == SIZE
    assert mapped_cached_bytes(fmap.address + 100, SIZE - 200) == SIZE - 200


def test_without_fadvise(file, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise")
    assert not drop_cache(file, 0, SIZE)


# ------------------------------------------------------------------------------------------------ drop and populate


def test_drop_evicts_and_keeps_private_writes(file):
    fmap = FileMap(file)
    values = fmap.bytes
    before = values.clone()
    values[5 * PAGE] += 1
    assert cached_bytes(file, 0, SIZE) == SIZE
    assert let_go(fmap.address, SIZE, file, spared=PAGE) in {0, PAGE}
    before[5 * PAGE] += 1
    assert values.equal(before)


def test_drop_spares_pages_shared_with_neighbours(file):
    fmap = FileMap(file)
    fmap.bytes.sum()
    assert let_go(fmap.address + 1, 3 * PAGE, file, 1) == 0
    assert cached_bytes(file, 0, PAGE) == PAGE
    assert cached_bytes(file, 3 * PAGE, SIZE - 3 * PAGE) == SIZE - 3 * PAGE
    assert not paging.drop(fmap.address + 1, PAGE)


def test_drop_evicts_pages_prefetched_and_never_touched(file):
    fmap = FileMap(file)
    paging.populate(fmap.address, 2 * PAGE)
    file.read_bytes()
    assert let_go(fmap.address, SIZE, file) == 0


def test_populate_brings_a_range_in(file):
    fmap = FileMap(file)
    paging.advise(fmap.address, SIZE, "random")
    if not paging.populate(fmap.address + 10 * PAGE + 5, PAGE):
        pytest.skip("needs MADV_POPULATE_READ, Linux 5.14")
    assert cached_bytes(file, 10 * PAGE, 2 * PAGE) == 2 * PAGE
    assert cached_bytes(file, 12 * PAGE, SIZE - 12 * PAGE) == 0
    assert not paging.populate(fmap.address, 0)


def test_populate_past_a_truncated_file_fails_without_a_crash(file):
    fmap = FileMap(file)
    os.truncate(file, PAGE)
    assert not paging.populate(fmap.address, SIZE)


@pytest.mark.parametrize("how", ["normal", "random", "sequential"])
def test_advice_is_taken(file, how):
    fmap = FileMap(file)
    assert paging.advise(fmap.address + 7, 100, how)
    assert not paging.advise(fmap.address, 0, how)
