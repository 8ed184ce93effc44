"""Maps: views of every dtype, private writes, sizes beyond RAM, lifetimes, refusals."""

from __future__ import annotations

import errno
import gc
import mmap as real_mmap
import os
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings, strategies as st

from jasper_store.errors import (
    ClosedError,
    CorruptFileError,
    DatasetNotFoundError,
    IncompatibleOptionsError,
    InsufficientMemoryError,
)
from jasper_store.paging import mapping
from jasper_store.paging.mapping import FileMap, mappable, view

DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.bool,
]  # fmt: skip

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7, 3), (2, 3, 5), (0,), (0, 4), (4, 0)], ids=str)
def test_views_hold_the_files_values(tmp_path, dtype, shape):
    count = int(np.prod(shape, dtype=np.int64))
    source = torch.arange(max(count, 1)).remainder(2 if dtype is torch.bool else 100).to(dtype)
    raw = source.view(torch.uint8).numpy().tobytes()
    fmap = FileMap(write(tmp_path / "data", b"\0" * 64 + raw))
    found = view(fmap, 64, dtype, shape)
    assert found.dtype == dtype
    assert found.shape == shape
    assert torch.equal(found, source[:count].view(shape))


def test_strided_views(tmp_path):
    values = torch.arange(30, dtype=torch.int32)
    fmap = FileMap(write(tmp_path / "data", values.numpy().tobytes()))
    assert torch.equal(view(fmap, 0, torch.int32, (5, 6), (1, 5)), values.as_strided((5, 6), (1, 5)))
    assert torch.equal(view(fmap, 8, torch.int32, (3,), (9,)), values[2::9][:3])
    assert torch.equal(view(fmap, 4, torch.int32, (4, 2), (0, 1)), values[1:3].expand(4, 2))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_view_is_refused_exactly_when_it_leaves_the_file(tmp_path_factory, data):
    size = data.draw(st.integers(1, 200))
    fmap = FileMap(write(tmp_path_factory.mktemp("map") / "data", bytes(size)))
    offset = data.draw(st.integers(0, 40)) * 4
    shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
    strides = data.draw(st.one_of(st.none(), st.lists(st.integers(0, 6), min_size=len(shape), max_size=len(shape))))
    steps = strides if strides is not None else torch.empty(shape).stride()
    last = sum((n - 1) * s for n, s in zip(shape, steps, strict=True))
    inside = 0 in shape or offset + 4 * (last + 1) <= size
    if inside:
        assert view(fmap, offset, torch.int32, shape, strides).shape == tuple(shape)
    else:
        with pytest.raises(CorruptFileError, match="truncated"):
            view(fmap, offset, torch.int32, shape, strides)


@pytest.mark.parametrize(("offset", "shape", "strides"), [(-4, (1,), None), (0, (-1,), None), (0, (2,), (-1,))])
def test_negative_places_are_refused(tmp_path, offset, shape, strides):
    fmap = FileMap(write(tmp_path / "data", bytes(64)))
    with pytest.raises(CorruptFileError, match="0 or more"):
        view(fmap, offset, torch.int32, shape, strides)


def test_hostile_sizes_are_refused(tmp_path):
    fmap = FileMap(write(tmp_path / "data", bytes(64)))
    with pytest.raises(CorruptFileError, match="truncated"):
        view(fmap, 0, torch.float32, (1 << 62, 1 << 62))
    with pytest.raises(CorruptFileError, match="truncated"):
        view(fmap, 1 << 63, torch.float32, (1,))


def test_misaligned_values_are_refused_with_the_remedy(tmp_path):
    fmap = FileMap(write(tmp_path / "data", bytes(64)))
    assert not mappable(6, torch.float32)
    assert mappable(6, torch.bfloat16)
    with pytest.raises(CorruptFileError, match="convert"):
        view(fmap, 6, torch.float32, (2,))


def test_a_write_stays_private(tmp_path):
    path = write(tmp_path / "data", bytes(range(200)))
    path.chmod(0o444)
    fmap = FileMap(path)
    assert fmap.writable
    values = view(fmap, 8, torch.uint8, (100,))
    values.fill_(7)
    assert values.sum() == 700
    assert path.read_bytes() == bytes(range(200))
    assert FileMap(path).bytes[8] == 8


def test_views_outlive_the_map(tmp_path):
    fmap = FileMap(write(tmp_path / "data", bytes(range(100))))
    values, row = view(fmap, 0, torch.uint8, (10, 10)), view(fmap, 50, torch.uint8, (5,))
    fmap.close()
    fmap.close()
    del fmap
    gc.collect()
    assert values[9, 9] == 99
    assert row.tolist() == [50, 51, 52, 53, 54]


@linux
def test_the_last_view_unmaps_and_no_descriptor_stays_open(tmp_path):
    path = write(tmp_path / "data", bytes(8192))
    before = psutil.Process().num_fds()
    fmap = FileMap(path)
    values = view(fmap, 0, torch.uint8, (10,))
    fmap.close()
    assert str(path) in Path("/proc/self/maps").read_text()
    del values, fmap
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert psutil.Process().num_fds() == before


def test_use_after_close(tmp_path):
    with FileMap(write(tmp_path / "data", bytes(16))) as fmap:
        assert not fmap.closed
        assert "16 bytes" in repr(fmap)
    assert fmap.closed
    assert "closed" in repr(fmap)
    for use in (lambda: fmap.bytes, fmap.fileno, lambda: view(fmap, 0, torch.uint8, (0,))):
        with pytest.raises(ClosedError, match="closed"):
            use()


def test_an_empty_file(tmp_path):
    fmap = FileMap(write(tmp_path / "data", b""))
    assert fmap.nbytes == 0
    assert fmap.bytes.shape == (0,)
    assert view(fmap, 0, torch.float32, (0, 3)).shape == (0, 3)
    with pytest.raises(CorruptFileError):
        view(fmap, 0, torch.float32, (1,))


def test_a_map_pickles_as_its_path(tmp_path):
    fmap = FileMap(write(tmp_path / "data", bytes(range(100))))
    data = pickle.dumps(fmap)
    assert len(data) < 1024
    assert pickle.loads(data).bytes[99] == 99


def test_missing_files_and_directories(tmp_path):
    with pytest.raises(DatasetNotFoundError, match="cannot be read"):
        FileMap(tmp_path / "missing")
    with pytest.raises(DatasetNotFoundError, match="regular file"):
        FileMap(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(DatasetNotFoundError, match="regular file"):
            FileMap(tmp_path / "pipe")


@linux
def test_a_file_larger_than_memory(tmp_path):
    path = tmp_path / "sparse"
    rows = (60 << 30) // 1536
    with path.open("wb") as file:
        file.truncate(rows * 1536)
        file.seek((rows - 1) * 1536)
        file.write(np.full(384, 2.5, dtype="<f4").tobytes())
    values = view(FileMap(path), 0, torch.float32, (rows, 384))
    assert values[torch.tensor([0, rows // 2, rows - 1])].sum(dim=1).tolist() == [0, 0, 960]


class Refusing:
    """The mmap module, refusing some of the ways to map."""

    def __init__(self, refuse, error):
        self.refuse, self.error = refuse, error

    def __getattr__(self, name):
        return getattr(real_mmap, name)

    def mmap(self, *args, **kwargs):
        if self.refuse(kwargs):
            raise self.error
        return real_mmap.mmap(*args, **kwargs)


def test_a_read_only_map_where_a_writable_one_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "data", bytes(range(100)))
    refuse = Refusing(lambda how: how.get("access") != real_mmap.ACCESS_READ, OSError(errno.ENOMEM, "no"))
    monkeypatch.setattr(mapping, "mmap", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fmap = FileMap(path)
        values = view(fmap, 0, torch.int16, (50,))
    assert not fmap.writable
    assert "read-only" in repr(fmap)
    del fmap
    gc.collect()
    assert values[0] == 256
    assert torch.index_select(values, 0, torch.tensor([1])).item() == 2 + 3 * 256


def test_a_refused_map_names_the_limits(tmp_path, monkeypatch):
    path = write(tmp_path / "data", bytes(100))
    monkeypatch.setattr(mapping, "mmap", Refusing(lambda _: True, OSError(errno.ENOMEM, "Cannot allocate memory")))
    with pytest.raises(InsufficientMemoryError) as caught:
        FileMap(path)
    assert caught.value.needed == 100
    if sys.platform == "linux":
        for name in ("overcommit_memory", "max_map_count", "RLIMIT_AS"):
            assert name in str(caught.value)


def test_a_file_system_that_cannot_map(tmp_path, monkeypatch):
    path = write(tmp_path / "data", bytes(100))
    monkeypatch.setattr(mapping, "mmap", Refusing(lambda _: True, OSError(errno.ENODEV, "No such device")))
    with pytest.raises(IncompatibleOptionsError, match="use_mmap=False"):
        FileMap(path)


def test_a_file_that_shrinks_while_it_is_opened(tmp_path, monkeypatch):
    path = write(tmp_path / "data", bytes(100))
    monkeypatch.setattr(mapping, "mmap", Refusing(lambda _: True, ValueError("mmap length is greater than file size")))
    with pytest.raises(CorruptFileError, match="shrank"):
        FileMap(path)


def test_other_systems_map_copy_on_write(tmp_path, monkeypatch):
    path = write(tmp_path / "data", bytes(range(100)))
    monkeypatch.setattr(sys, "platform", "darwin")
    fmap = FileMap(path)
    monkeypatch.undo()
    assert fmap.writable
    fmap.bytes[0] = 9
    assert fmap.bytes[:2].tolist() == [9, 1]
    assert path.read_bytes() == bytes(range(100))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_childs_writes_stay_its_own(tmp_path):
    fmap = FileMap(write(tmp_path / "data", bytes(100)))
    values = fmap.bytes
    child = os.fork()
    if child == 0:
        values[0] = 1
        os._exit(0 if values[0] == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert values[0] == 0
