import contextlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from jasper_store.errors import ClosedError, CorruptFileError, IncompatibleOptionsError, UnknownNameError
from jasper_store.formats.base import Schema
from jasper_store.paging import madvise as paging, residency
from jasper_store.store import warmup
from jasper_store.store.opening import open_store
from jasper_store.store.warmup import warm

MIB = 1 << 20


@pytest.fixture(autouse=True)
def small_windows(monkeypatch, tmp_path):
    monkeypatch.setattr(warmup, "WINDOW", MIB)
    locks = tmp_path / "locks"
    locks.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(locks))


@pytest.fixture
def dataset(tmp_path):
    """Three tensors of 4 MiB, written through to the disk so that they can be dropped from the cache."""
    directory = tmp_path / "data"
    directory.mkdir()
    for name in ("a", "b", "c"):
        path = directory / f"{name}.npy"
        np.save(path, np.ones((4096, 256), np.float32))
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    return directory


def lock_files():
    return list(Path(tempfile.gettempdir()).iterdir())


SCHEMA = Schema(reads_per_sample={"a": 1.0, "b": 6.0, "c": 0.0})


def evicted(store):
    """Whether this file system lets go of pages; tmpfs has nowhere else to keep them."""
    store.release()
    return sum(store.residency().values()) < store.nbytes // 2


def test_everything_is_resident_afterwards(dataset):
    with open_store(dataset, use_mmap=True, schema=SCHEMA) as store:
        evicted(store)
        calls = []
        before = store.residency()
        report = warm(store, progress=lambda done, total: calls.append((done, total)))
        assert [entry.name for entry in report.tensors] == ["b", "a", "c"]
        assert {entry.name: entry.before for entry in report.tensors} == before
        assert all(entry.after == entry.nbytes == store[entry.name].nbytes for entry in report.tensors)
        assert not any(entry.skipped for entry in report.tensors)
        # Windows share their outermost pages with their neighbours.
        assert abs(report.bytes_read - (store.nbytes - sum(before.values()))) <= 24 * paging.PAGE
        assert report.after == report.nbytes == store.nbytes
        assert calls[-1] == (store.nbytes, store.nbytes)
        assert len(calls) == 12
        assert "100.0 %" in str(report)
        assert json.loads(json.dumps(report.to_dict()))["after"] == store.nbytes
        again = warm(store)
        assert again.bytes_read == 0
        assert again.before == store.nbytes


def test_the_budget_is_kept_and_the_rest_is_named(dataset):
    with open_store(dataset, use_mmap=True, schema=SCHEMA) as store:
        cold = evicted(store)
        report = warm(store, budget=6 * MIB)
        b, a, c = report.tensors
        assert b.skipped == ""
        assert a.skipped == "stopped at 50.0 %: the budget is spent"
        assert c.skipped == "stopped at 0.0 %: the budget is spent"
        if cold:
            assert report.after <= 7 * MIB
            assert b.after == b.nbytes
        assert warm(store, budget=0).bytes_read == 0
        assert warm(store, budget="6 MiB").budget == 6 * MIB
        with pytest.raises(IncompatibleOptionsError, match=r"budget='-1': expected a size such as 8GiB"):
            warm(store, budget="-1")


def test_some_tensors_in_the_order_given(dataset):
    with open_store(dataset, use_mmap=True) as store:
        report = warm(store, tensors=["c", "a", "c"])
        assert [entry.name for entry in report.tensors] == ["c", "a"]
        with pytest.raises(UnknownNameError, match="there are a, b, c"):
            warm(store, tensors=["zzz"])
    with pytest.raises(ClosedError):
        warm(store)


def test_tensors_in_memory_are_skipped(dataset):
    with open_store(dataset, use_mmap=False) as store:
        assert warm(store).tensors == ()
        (entry,) = warm(store, tensors=["a"]).tensors
        assert "in memory already" in entry.skipped


def test_where_populating_is_not_possible_files_are_read(dataset, monkeypatch):
    monkeypatch.setattr(paging, "populate", lambda *args: False)
    with open_store(dataset, use_mmap=True) as store:
        evicted(store)
        report = warm(store)
        assert report.after == store.nbytes


def test_chunked_data_is_warmed_by_reading_its_file_once(tmp_path):
    path = tmp_path / "dataset.h5"
    with h5py.File(path, "w") as file:
        for name in ("a", "b"):
            file.create_dataset(name, data=np.random.default_rng(0).random((1000, 256)), compression="gzip")
    with pytest.warns(UserWarning, match="cannot be mapped"):
        store = open_store(tmp_path, use_mmap=True)
    with store:
        residency.drop_cache(path, 0, path.stat().st_size)
        a, b = warm(store).tensors
        assert {a.skipped, b.skipped} == {"", "its file was warmed as a whole already"}
        assert a.after == a.nbytes == path.stat().st_size


def test_less_memory_than_thought_stops_it(dataset, monkeypatch):
    sizes = iter([100 * MIB, 5 * MIB])
    monkeypatch.setattr(warmup._Limit, "_measured", staticmethod(lambda: next(sizes)))
    monkeypatch.setattr(warmup, "_REMEASURE", 4)
    with open_store(dataset, use_mmap=True, schema=SCHEMA) as store:
        report = warm(store)
        assert [entry.skipped[:7] for entry in report.tensors] == ["", "stopped", "stopped"]
        assert report.budget == 5 * MIB


def warm_elsewhere(directory, lock_directory, start, queue):
    tempfile.tempdir = lock_directory
    with open_store(directory, use_mmap=True) as store:
        start.wait()
        report = warm(store)
        queue.put((report.bytes_read, report.after))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_ranks_of_a_node_take_turns(dataset):
    context = multiprocessing.get_context("fork")
    start, queue = context.Barrier(2), context.Queue()
    with open_store(dataset, use_mmap=True) as store:
        cold = evicted(store)
        total = store.nbytes
    processes = [
        context.Process(target=warm_elsewhere, args=(dataset, tempfile.gettempdir(), start, queue)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    reports = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert [after for _, after in reports] == [total, total]
    assert lock_files() == []
    if cold:
        assert min(read for read, _ in reports) == 0
        assert sum(read for read, _ in reports) <= total


def test_no_lock_file_stays_behind(dataset):
    seen = set()
    with open_store(dataset, use_mmap=True) as store:
        warm(store, progress=lambda done, total: seen.update(lock_files()))
    assert len(seen) == 1
    assert lock_files() == []


def test_no_place_for_a_lock_is_no_error(dataset, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(dataset / "nowhere"))
    with open_store(dataset, use_mmap=True) as store:
        assert warm(store).after == store.nbytes
        assert torch.equal(store["a"].take([0]), torch.ones(1, 256))


def in_huge_pages(path) -> int:
    """Bytes of a file that this process maps in huge pages."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("FilePmdMapped:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages for files are Linux's")
def test_files_are_warmed_in_huge_pages_where_there_are_any(tmp_path, monkeypatch):
    monkeypatch.setattr(warmup, "WINDOW", 64 * MIB)
    np.save(tmp_path / "emb.npy", np.ones((32 * MIB // 1024, 256), np.float32))
    with (tmp_path / "emb.npy").open("r+b") as file:
        os.fsync(file.fileno())
    with open_store(tmp_path, use_mmap=True) as store:
        evicted(store)
        report = warm(store)
        assert report.after == store.nbytes
        assert torch.equal(store["emb"].take([0, 32767]), torch.ones(2, 256))
        huge = in_huge_pages(tmp_path / "emb.npy")
        if not huge:
            pytest.skip("this file system has no huge pages, or there is no memory for them")
        assert huge >= 16 * MIB
    maps = Path("/proc/self/maps").read_text()
    assert maps.count(str(tmp_path / "emb.npy")) <= 1  # the map for reading is gone


def test_a_file_cut_while_it_is_warmed_is_no_crash(tmp_path):
    np.save(tmp_path / "emb.npy", np.ones((16 * MIB // 1024, 256), np.float32))
    with open_store(tmp_path, use_mmap=True) as store:
        os.truncate(tmp_path / "emb.npy", 4 * MIB)
        with contextlib.suppress(CorruptFileError):
            warm(store)
