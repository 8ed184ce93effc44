"""Preloading: the file's bytes at every size, conversion, progress, truncation, what stays in the page cache."""

from __future__ import annotations

import mmap
import os
import sys
import threading

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings, strategies as st

from jasper_store.errors import (
    CorruptFileError,
    DatasetNotFoundError,
    IncompatibleOptionsError,
    InsufficientMemoryError,
)
from jasper_store.paging import preload, reader, residency, syscalls
from jasper_store.paging.preload import RangeReader, empty, read_converted, read_into

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks that small files have many of."""
    monkeypatch.setattr(reader, "BLOCK", 8192)
    monkeypatch.setattr(reader, "_MIN_DIRECT_NBYTES", 0)
    monkeypatch.setattr(reader, "_DIRECT_READ_NBYTES", 4096)
    monkeypatch.setattr(preload, "_CONVERT_BLOCK", 4096)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("preload") / "data"
    path.write_bytes(np.random.default_rng(0).bytes(300_001))
    return path


@given(
    offset=st.integers(0, 9000),
    nbytes=st.one_of(st.integers(0, 100), st.integers(8190, 8194), st.integers(0, 290_000)),
    threads=st.sampled_from([None, 1, 3]),
    drop_behind=st.booleans(),
)
@settings(max_examples=60)
def test_memory_equals_the_file(file, offset, nbytes, threads, drop_behind):
    out = empty((nbytes,), torch.uint8)
    seen: list[int] = []
    read_into(file, offset, out, threads=threads, on_bytes=seen.append, drop_behind=drop_behind)
    assert out.numpy().tobytes() == file.read_bytes()[offset : offset + nbytes]
    assert sum(seen) == nbytes


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64, torch.int16], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (0, 2)], ids=str)
def test_every_dtype_and_shape(tmp_path, dtype, shape):
    source = torch.arange(int(np.prod(shape, dtype=np.int64))).remainder(2).to(dtype).view(shape)
    (tmp_path / "data").write_bytes(b"x" * 8 + source.reshape(-1).view(torch.uint8).numpy().tobytes())
    out = empty(shape, dtype)
    read_into(tmp_path / "data", 8, out)
    assert torch.equal(out, source)


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16, torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_conversion_is_that_of_to(tmp_path, wanted, threads):
    source = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)) * 1e3
    (tmp_path / "data").write_bytes(bytes(12) + source.numpy().tobytes())
    out = empty((5000, 3), wanted)
    seen: list[int] = []
    read_converted(tmp_path / "data", 12, torch.float32, out, threads=threads, on_bytes=seen.append)
    assert torch.equal(out, source.to(wanted))
    assert sum(seen) == source.nbytes


def test_conversion_from_bfloat16_and_of_a_scalar(tmp_path):
    source = torch.tensor(1.5, dtype=torch.bfloat16)
    (tmp_path / "data").write_bytes(source.view(torch.int16).numpy().tobytes())
    out = empty((), torch.float32)
    read_converted(tmp_path / "data", 0, torch.bfloat16, out)
    assert out == 1.5


def test_large_buffers_are_page_aligned_and_writable():
    out = empty((3 << 20,), torch.uint8)
    assert sys.platform != "linux" or out.data_ptr() % residency.PAGE == 0
    out.fill_(1)
    assert out.sum() == 3 << 20
    assert empty((0, 5), torch.float32).shape == (0, 5)
    assert empty((), torch.int64).shape == ()
    assert empty((2, 1 << 20), torch.bfloat16).shape == (2, 1 << 20)


@linux
def test_a_kernel_without_huge_pages(monkeypatch):
    class Plain(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Plain)
    assert empty((1 << 20,), torch.float32).fill_(2).sum() == 2 << 20


def test_memory_that_is_not_there():
    with pytest.raises(InsufficientMemoryError, match="use_mmap=True") as caught:
        empty((1 << 58,), torch.float32)
    assert caught.value.needed == 1 << 60


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("convert", [False, True])
def test_a_truncated_file(file, threads, convert):
    def read():
        if convert:
            read_converted(file, 0, torch.float32, empty((100_000,), torch.float16), threads=threads)
        else:
            read_into(file, 0, empty((300_002,), torch.uint8), threads=threads)

    with pytest.raises(CorruptFileError, match="300,001: the file is truncated"):
        read()


def test_a_missing_file(tmp_path):
    with pytest.raises(DatasetNotFoundError):
        read_into(tmp_path / "none", 0, empty((1,), torch.uint8))


def test_a_file_that_fails_while_it_is_read(tmp_path):
    if not hasattr(os, "preadv"):
        pytest.skip("opens directories only where preadv is")
    with pytest.raises(CorruptFileError, match="failed"):
        read_into(tmp_path, 0, empty((1,), torch.uint8))


def test_only_contiguous_host_tensors(file):
    with pytest.raises(IncompatibleOptionsError, match="contiguous"):
        read_into(file, 0, torch.empty(4, 4, dtype=torch.uint8).t()[:2])
    with pytest.raises(IncompatibleOptionsError, match="meta"):
        read_into(file, 0, torch.empty(4, device="meta"))
    with pytest.raises(IncompatibleOptionsError, match="contiguous"):
        read_converted(file, 0, torch.float32, torch.empty(4, 4, dtype=torch.float16).t()[:2])


@pytest.mark.parametrize("threads", [1, 3])
def test_progress_may_stop_the_read(file, threads):
    class StopError(Exception):
        pass

    def stop(_):
        raise StopError

    before = threading.active_count()
    with pytest.raises(StopError):
        read_into(file, 0, empty((300_000,), torch.uint8), threads=threads, on_bytes=stop)
    assert threading.active_count() == before


def test_progress_is_told_in_the_calling_thread(file):
    threads = set()
    read_into(file, 0, empty((300_000,), torch.uint8), threads=3, on_bytes=lambda _: threads.add(threading.get_ident()))
    assert threads == {threading.get_ident()}


def test_nothing_stays_open(file):
    process = psutil.Process()
    before = len(process.open_files())
    for _ in range(3):
        read_into(file, 0, empty((300_001,), torch.uint8), threads=2, drop_behind=True)
    assert len(process.open_files()) == before


def test_reading_in_pieces(file):
    whole = torch.empty(300_001, dtype=torch.uint8)
    with RangeReader(file, 1, 300_000, threads=2) as opened:
        for start in range(0, 300_000, 70_000):
            opened.read(start, whole[1 + start : min(start + 70_000, 300_000) + 1])
    opened.close()
    assert whole[1:].numpy().tobytes() == file.read_bytes()[1:]


def test_without_preadv(file, monkeypatch):
    monkeypatch.delattr(os, "preadv", raising=False)
    out = empty((290_000,), torch.uint8)
    read_into(file, 77, out, threads=2)
    assert out.numpy().tobytes() == file.read_bytes()[77:290_077]


@linux
@pytest.mark.parametrize("pieces", [False, True])
def test_drop_behind_spares_what_was_cached_before(tmp_path, pieces):
    if syscalls.cachestat(0, 0, 0)[1] == 38:
        pytest.skip("needs cachestat, Linux 6.5")
    path, size = tmp_path / "data", 32 * 8192
    path.write_bytes(np.random.default_rng(1).bytes(size))
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        residency.drop_cache(file.fileno(), 0, size)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.seek(0)
        file.read(16 * 8192)  # the first half is somebody's
        if residency.cached_bytes(file.fileno(), 0, size) not in range(16 * 8192, 20 * 8192):
            pytest.skip("this file system does not let go of its cache")
    out = empty((size,), torch.uint8)
    if pieces:
        with RangeReader(path, 0, size, drop_behind=True) as opened:
            for start in range(0, size, 5 * 8192):
                opened.read(start, out[start : start + 5 * 8192])
    else:
        read_into(path, 0, out, drop_behind=True)
    kept = residency.cached_bytes(path, 0, 16 * 8192)
    left = residency.cached_bytes(path, 20 * 8192, 12 * 8192)
    assert (kept, left) == (16 * 8192, 0)
    assert out.numpy().tobytes() == path.read_bytes()
