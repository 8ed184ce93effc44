from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from jasper_store.errors import ClosedError, CorruptFileError, IncompatibleOptionsError
from jasper_store.formats.base import Chunked, Schema
from jasper_store.formats.hdf5 import source as hdf5_source
from jasper_store.formats.hdf5.chunks import ChunkedReader
from jasper_store.formats.hdf5.deflate import inflate
from jasper_store.formats.hdf5.format import Hdf5Format
from jasper_store.formats.hdf5.source import OpenChunks
from tests.formats.conformance import relaxed, same, values

# What a file may have been written with, and whether its chunks are read around the library.
PIPELINES: dict[str, tuple[dict[str, Any], bool]] = {
    "chunked": ({}, True),
    "gzip": ({"compression": "gzip"}, True),
    "shuffle": ({"shuffle": True}, True),
    "shuffle+gzip": ({"compression": 1, "shuffle": True}, True),
    "lzf": ({"compression": "lzf"}, False),
    "shuffle+lzf": ({"compression": "lzf", "shuffle": True}, False),
    "gzip+fletcher32": ({"compression": "gzip", "fletcher32": True}, False),
    "scaleoffset": ({"scaleoffset": 0}, False),
}
DTYPES = ["f4", "f2", "f8", "i8", "u1", "?"]


def locate(path, name="x"):
    return next(spec for spec in Hdf5Format().locate(path, Schema()) if spec.name == name)


def gather(reader, rows):
    rows = torch.as_tensor(rows, dtype=torch.int64)
    out = torch.empty((len(rows), *reader.spec.shape[1:]), dtype=reader.spec.dtype)
    reader.read_rows(rows, out)
    return out


@pytest.fixture
def compressed(tmp_path):
    """A file of 1000 rows that this library wrote, and its values."""
    tensor = values(torch.float32, (1000, 24))
    writer = Hdf5Format().writer(tmp_path / "x.h5", Schema(), compression="gzip")
    writer.begin("x", tensor.dtype, (24,), len(tensor))
    writer.append(tensor)
    writer.end()
    writer.close()
    return tmp_path / "x.h5", tensor


@pytest.mark.parametrize("pipeline", PIPELINES)
@relaxed
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_rows_are_those_of_the_library(tmp_path, pipeline, shape, dtype, data):
    options, direct = PIPELINES[pipeline]
    if pipeline == "scaleoffset":
        dtype = "i8"
    path = tmp_path / "x.h5"
    path.unlink(missing_ok=True)
    chunks = tuple(data.draw(st.integers(1, n)) for n in shape)
    # The low bits alone, so that no filter that works on numbers is asked for more than it can hold.
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    with h5py.File(path, "w", libver=data.draw(st.sampled_from(["earliest", "latest"]))) as file:
        dataset = file.create_dataset("x", shape=shape, dtype=dtype, chunks=chunks, **options)
        # Some rows may never be written: their chunks do not exist.
        written = data.draw(st.integers(0, shape[0]))
        dataset[:written] = array[:written]
        expected = torch.from_numpy(dataset[()])
    reader = ChunkedReader(locate(path))
    rows = data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=12))
    assert same(gather(reader, rows), expected[rows])
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    out = torch.empty((stop - start, *shape[1:]), dtype=expected.dtype)
    reader.read_block(start, stop, out)
    assert same(out, expected[start:stop])
    assert reader._open is not None
    assert reader._open.index.direct == direct
    reader.close()


def test_fill_values(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", shape=(10, 5), chunks=(2, 3), dtype="f4", fillvalue=2.5, compression="gzip")
        dataset[4:6] = 1
        expected = torch.from_numpy(dataset[()])
    assert same(gather(ChunkedReader(locate(tmp_path / "x.h5")), range(10)), expected)


def test_chunks_whose_filters_were_skipped(tmp_path):
    array = np.arange(40, dtype="<i4").reshape(10, 4)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", data=array, chunks=(5, 4), compression="gzip", shuffle=True)
        # Both filters off, as a writer does for data that would only grow.
        dataset.id.write_direct_chunk((5, 0), (array[5:] * 2).tobytes(), filter_mask=0b11)
    out = gather(ChunkedReader(locate(tmp_path / "x.h5")), range(10))
    assert out.tolist() == [*array[:5].tolist(), *(array[5:] * 2).tolist()]


@pytest.mark.parametrize("order", [range(12), [5, 3, 4, 0, 1, 2, 11, 10, 9, 8, 6, 7]])
def test_blocks_of_whole_chunks_wherever_they_lie(tmp_path, order):
    array = np.random.default_rng(0).integers(0, 1000, (59, 3)).astype("<i4")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", shape=(59, 3), dtype="<i4", chunks=(5, 3), compression="gzip", shuffle=True)
        for i in order:
            dataset[5 * i : 5 * i + 5] = array[5 * i : 5 * i + 5]
            if i == 7:
                # Among its neighbours, with both filters off.
                dataset.id.write_direct_chunk((35, 0), array[35:40].tobytes(), filter_mask=3)
    with contextlib.closing(ChunkedReader(locate(tmp_path / "x.h5"))) as reader:
        for start, stop in [(0, 59), (0, 55), (3, 41), (35, 40), (58, 59)]:
            out = torch.empty((stop - start, 3), dtype=torch.int32)
            reader.read_block(start, stop, out)
            assert same(out, torch.from_numpy(array[start:stop]))


def test_each_chunk_is_read_once(compressed, monkeypatch):
    path, tensor = compressed
    reads = []

    def counted(raw, nbytes):
        reads.append(nbytes)
        return inflate(raw, nbytes)

    monkeypatch.setattr(hdf5_source, "inflate", counted)
    spec = locate(path)
    rows = torch.randint(1000, (5000,), generator=torch.Generator().manual_seed(0))
    assert same(gather(ChunkedReader(spec), rows), tensor[rows])
    assert isinstance(spec.location, Chunked)
    assert spec.location.chunk_shape is not None
    assert len(reads) == -(-1000 // spec.location.chunk_shape[0])


def test_bfloat16_and_bool(tmp_path):
    for dtype in (torch.bfloat16, torch.bool):
        tensor = values(dtype, (500, 3))
        path = tmp_path / f"{dtype}.h5"
        writer = Hdf5Format().writer(path, Schema(), compression="gzip")
        writer.begin("x", dtype, (3,), 500)
        writer.append(tensor)
        writer.end()
        writer.close()
        assert same(gather(ChunkedReader(locate(path)), [499, 0, 499]), tensor[[499, 0, 499]])


@pytest.mark.parametrize("row", [-1, 1000, 2**62])
def test_rows_outside(compressed, row):
    reader = ChunkedReader(locate(compressed[0]))
    with pytest.raises(IndexError, match=rf"x: row {row} is outside \[0, 1000\)"):
        gather(reader, [0, row])
    with pytest.raises(IndexError, match="outside"):
        reader.read_block(0, 1001, torch.empty(1001, 24))
    with pytest.raises(IndexError, match="outside"):
        reader.read_block(5, 4, torch.empty(0, 24))


def test_out_that_does_not_fit(compressed):
    reader = ChunkedReader(locate(compressed[0]))
    rows = torch.tensor([1, 2])
    for out in (
        torch.empty(3, 24),
        torch.empty(2, 24, dtype=torch.float64),
        torch.empty(24, 2).t(),
        torch.empty(2, 24, device="meta"),
    ):
        with pytest.raises(IncompatibleOptionsError, match="out must be contiguous host memory"):
            reader.read_rows(rows, out)


def test_no_rows(compressed):
    assert gather(ChunkedReader(locate(compressed[0])), []).shape == (0, 24)


def test_a_tensor_with_an_extent_needs_no_reader(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = [1, 2]
    with pytest.raises(IncompatibleOptionsError, match="not stored in chunks"):
        ChunkedReader(locate(tmp_path / "x.h5"))


def test_closed(compressed):
    reader = ChunkedReader(locate(compressed[0]))
    gather(reader, [1])
    reader.close()
    reader.close()
    with pytest.raises(ClosedError):
        gather(reader, [1])
    with pytest.raises(ClosedError):
        gather(pickle.loads(pickle.dumps(reader)), [1])


@pytest.mark.parametrize("name", ["chunked", "gzip", "lzf"])
def test_closing_waits_for_what_is_being_read(tmp_path, monkeypatch, name):
    options, direct = PIPELINES[name]
    array = np.arange(3000.0).reshape(1000, 3)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=array, chunks=(64, 3), **options)
    reader = ChunkedReader(locate(tmp_path / "x.h5"))
    reading, go_on = threading.Event(), threading.Event()
    read = OpenChunks.read if direct else OpenChunks.span

    def held(*args):
        reading.set()
        assert go_on.wait(60)
        return read(*args)

    monkeypatch.setattr(OpenChunks, read.__name__, held)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(gather, reader, range(1000))
        assert reading.wait(60)
        source = reader._open
        assert source is not None
        reader.close()
        with pytest.raises(ClosedError):
            gather(reader, [1])
        os.fstat(source.fd)
        go_on.set()
        assert same(found.result(), torch.from_numpy(array))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(source.fd)


def test_closing_under_many_readers(compressed):
    path, tensor = compressed
    for _ in range(30):
        reader = ChunkedReader(locate(path))
        start = threading.Barrier(5)

        def work(reader=reader, start=start):
            start.wait()
            try:
                while True:
                    assert same(gather(reader, [999, 3, 500]), tensor[[999, 3, 500]])
            except ClosedError:
                return True

        with ThreadPoolExecutor(4) as pool:
            found = [pool.submit(work) for _ in range(4)]
            start.wait()
            time.sleep(0.002)
            reader.close()
            assert all(future.result() for future in found)
        assert reader._open is None


def test_no_handle_is_kept_after_closing(compressed):
    # torch and the thread pool may open files of their own the first time.
    reader = ChunkedReader(locate(compressed[0]))
    gather(reader, range(1000))
    reader.close()
    before = set(Path("/proc/self/fd").iterdir())
    reader = ChunkedReader(locate(compressed[0]))
    gather(reader, range(1000))
    reader.close()
    assert set(Path("/proc/self/fd").iterdir()) <= before


def test_it_pickles_small_and_without_handles(compressed):
    path, tensor = compressed
    reader = ChunkedReader(locate(path))
    gather(reader, [1])
    raw = pickle.dumps(reader)
    assert len(raw) < 2000
    assert same(gather(pickle.loads(raw), [7]), tensor[[7]])


def _in_child(reader, rows, queue):
    queue.put(gather(reader, rows).tolist())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("method", "name"), [("fork", "chunked"), ("fork", "lzf"), ("spawn", "chunked")])
def test_it_goes_on_in_another_process(tmp_path, method, name):
    options, _ = PIPELINES[name]
    array = np.arange(3000.0).reshape(1000, 3)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=array, chunks=(64, 3), **options)
    reader = ChunkedReader(locate(tmp_path / "x.h5"))
    gather(reader, range(1000))
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(reader, [999, 5], queue))
    child.start()
    assert queue.get(timeout=120) == array[[999, 5]].tolist()
    child.join()
    assert child.exitcode == 0
    assert same(gather(reader, [3]), torch.from_numpy(array[[3]]))


def test_many_threads_at_once(compressed):
    path, tensor = compressed
    reader = ChunkedReader(locate(path))
    start = threading.Barrier(8)

    def work(seed):
        rows = torch.randint(1000, (300,), generator=torch.Generator().manual_seed(seed))
        start.wait()
        return same(gather(reader, rows), tensor[rows])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    reader.close()


def test_a_damaged_chunk_is_named(compressed):
    path, tensor = compressed
    with h5py.File(path) as file:
        info = file["x"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[info.byte_offset + info.size // 2] ^= 1
    path.write_bytes(content)
    reader = ChunkedReader(locate(path))
    with pytest.raises(CorruptFileError, match="'x' is damaged") as caught:
        gather(reader, [0])
    assert caught.value.tensor == "x"
    assert same(gather(reader, [999]), tensor[[999]])


def test_a_file_that_shrinks_under_the_reader(compressed):
    path, _ = compressed
    reader = ChunkedReader(locate(path))
    gather(reader, [0])
    os.truncate(path, 5000)
    with pytest.raises(CorruptFileError, match="truncated"):
        gather(reader, [999])


def test_a_file_that_is_replaced(tmp_path, compressed):
    path, tensor = compressed
    spec = locate(path)
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file.create_dataset("x", data=np.zeros((10, 2)), chunks=(5, 2))
    old = ChunkedReader(spec)
    gather(old, [0])
    shutil.move(other, path)
    # Who has the old file open goes on with it; who opens by the old spec is told.
    assert same(gather(old, [999]), tensor[[999]])
    with pytest.raises(CorruptFileError, match="no longer what it was"):
        gather(ChunkedReader(spec), [0])
    path.unlink()
    with pytest.raises(FileNotFoundError):
        gather(ChunkedReader(spec), [0])


def test_chunks_of_impossible_sizes_never_reach_the_library(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", data=np.zeros(60), compression="lzf", chunks=(30,))
        # All filters skipped, yet fewer bytes than a chunk has: the library would read beyond them.
        dataset.id.write_direct_chunk((0,), b"x" * 100, filter_mask=0b1)
    with pytest.raises(CorruptFileError, match="should have 240 bytes, found 100"):
        gather(ChunkedReader(locate(tmp_path / "x.h5")), [0])


def test_one_thread_gives_the_same(compressed):
    path, tensor = compressed
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        reader = ChunkedReader(locate(path))
        assert same(gather(reader, range(1000)), tensor)
        assert reader._open is not None
        assert reader._open.pool is None
    finally:
        torch.set_num_threads(threads)
