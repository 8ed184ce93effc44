import os
import pickle
import shutil
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jasper_store.errors import (
    ClosedError,
    CorruptFileError,
    DatasetNotFoundError,
    IncompatibleOptionsError,
    InsufficientMemoryError,
    IntegrityError,
    PerformanceWarning,
    UnknownNameError,
)
from jasper_store.formats.base import Schema
from jasper_store.memory.budget import Bound, Budget
from jasper_store.paging.madvise import madvise_batcher
from jasper_store.store import resident
from jasper_store.store.opening import open_store, plan_store
from tests.builders import build_pt_dataset, jasper_tensors
from tests.store.samples import WRITERS, tensors, write_safetensors

GIB = 1 << 30
MAPS = Path("/proc/self/maps")
ROLLUP = Path("/proc/self/smaps_rollup")


def open_files():
    """Descriptors of this process; 0 where nobody says."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


@pytest.fixture
def dataset(tmp_path):
    write_safetensors(tmp_path, tensors())
    return tmp_path


class TestMapping:
    def test_names(self, dataset):
        with open_store(dataset) as store:
            assert set(store) == set(tensors())
            assert len(store) == len(tensors())
            assert "embs" in store
            assert "nothing" not in store
            assert store.get("nothing") is None
            assert store["embs"] is store["embs"]
            assert store.nbytes == sum(t.nbytes for t in tensors().values())
            assert store.format == "safetensors"
            assert store.path == dataset
            assert len({store, store}) == 1
            assert "15 tensors" in repr(store)

    def test_unknown_names_list_near_ones(self, dataset):
        with open_store(dataset) as store, pytest.raises(KeyError, match="did you mean 'scores'"):
            store["score"]

    def test_ragged(self, tmp_path):
        build_pt_dataset(tmp_path)
        expected = jasper_tensors()["pair_keyword_ids"]
        with open_store(tmp_path) as store:
            ragged = store.ragged("pair_keyword_ids")
            assert len(ragged) == len(expected)
            assert [row.tolist() for row in ragged] == expected
            assert ragged[-1].tolist() == expected[-1]
            assert ragged[0].dtype == torch.int64
            assert "rows" in repr(ragged)
            for row in (len(expected), -len(expected) - 1):
                with pytest.raises(IndexError, match="pair_keyword_ids"):
                    ragged[row]
            with pytest.raises(KeyError, match=r"use store\.ragged"):
                store["pair_keyword_ids"]
            with pytest.raises(KeyError, match="there are pair_keyword_ids"):
                store.ragged("question_embs")
            again = pickle.loads(pickle.dumps(ragged))
            assert [row.tolist() for row in again] == expected

    def test_damaged_ragged(self, tmp_path):
        np.save(tmp_path / "r.values.npy", np.arange(5))
        np.save(tmp_path / "r.offsets.npy", np.array([0, 3, 2, 9, -1]))
        with open_store(tmp_path) as store:
            ragged = store.ragged("r")
            assert ragged[0].tolist() == [0, 1, 2]
            for row in (1, 2, 3):
                with pytest.raises(IntegrityError, match=f"row {row}"):
                    ragged[row]
        np.save(tmp_path / "r.offsets.npy", np.zeros((0,), np.int64))
        with open_store(tmp_path) as store, pytest.raises(IntegrityError, match="expected values"):
            store.ragged("r")


class TestOpening:
    def test_placements(self, dataset):
        with open_store(dataset, use_mmap=False) as store:
            assert {t.placement for t in store.values()} == {"ram"}
            assert not store.use_mmap
        with open_store(dataset) as store:
            assert not store.use_mmap
        with open_store(dataset, memory_limit=0) as store:
            assert store.use_mmap
            assert store["embs"].placement == "mmap"
        with open_store(dataset, use_mmap=True) as store:
            assert {t.placement for t in store.values()} == {"mmap"}
            assert store.device == torch.device("cpu")

    def test_a_budget_between(self, dataset):
        reads = dict.fromkeys(tensors(), 0.0) | {"scores": 5.0, "embs": 1.0}
        size = tensors()["scores"].nbytes
        with open_store(dataset, memory_limit=int(size / 0.8) + 1, schema=Schema(reads_per_sample=reads)) as store:
            assert store["scores"].placement == "ram"
            assert store["embs"].placement == "mmap"

    def test_what_does_not_fit_is_refused_before_anything_is_read(self, dataset, monkeypatch):
        monkeypatch.setattr("jasper_store.store.build.load", lambda *a, **k: pytest.fail("data was touched"))
        with pytest.raises(InsufficientMemoryError, match="memory_limit") as caught:
            open_store(dataset, use_mmap=False, memory_limit=1000)
        assert caught.value.available == 800

    def test_plan_is_the_plan(self, dataset):
        plan = plan_store(dataset, memory_limit=3000)
        with open_store(dataset, memory_limit=3000) as store:
            assert store.plan.entries == plan.entries
            assert store.plan.budget.winner == plan.budget.winner

    def test_a_single_file(self, dataset):
        with open_store(dataset / "embs.safetensors") as store:
            assert list(store) == ["embs"]

    @pytest.mark.parametrize("kind", ["gzip", "misaligned"])
    def test_a_whole_tensor_that_would_have_to_be_copied_must_fit(self, tmp_path, monkeypatch, kind):
        WRITERS[kind](tmp_path, tensors())
        monkeypatch.setattr("jasper_store.store.tensors._SURELY_FITS", 0)
        monkeypatch.setattr("jasper_store.store.tensors.measure", lambda: Budget((Bound("test", 100, ""),)))
        with open_store(tmp_path, memory_limit=0) as store:
            with pytest.raises(InsufficientMemoryError, match=r"embs: its 3\.12 KiB") as caught:
                store["embs"].tensor()
            assert caught.value.available == 80
            assert torch.equal(store["embs"][:2], tensors()["embs"][:2])

    def test_nothing_there(self, tmp_path):
        for path in (tmp_path, tmp_path / "missing", tmp_path / "missing.safetensors"):
            with pytest.raises(DatasetNotFoundError):
                open_store(path)
        with pytest.raises(UnknownNameError):
            open_store(tmp_path, format="zarr")

    def test_cuda_that_is_not_there(self, dataset, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for device in ("cuda", "cuda:3"):
            with pytest.raises(IncompatibleOptionsError, match="no CUDA device"):
                open_store(dataset, device=device)
        with open_store(dataset, device="auto") as store:
            assert store.device == torch.device("cpu")
            assert "no CUDA device" in str(store.plan)

    @pytest.mark.parametrize("kind", ["safetensors", "pt", "hdf5", "gzip", "strided"])
    def test_progress_counts_every_byte_once(self, tmp_path, kind):
        WRITERS[kind](tmp_path, tensors())
        dataset, calls = tmp_path, []
        open_store(dataset, use_mmap=False, progress=lambda done, total: calls.append((done, total))).close()
        assert len({total for _, total in calls}) == 1
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)
        assert calls[-1][0] == calls[-1][1]

    def test_a_failing_load_leaves_nothing_open(self, dataset):
        def fail(done, total):
            raise RuntimeError("stop")

        before = open_files()
        with pytest.raises(RuntimeError, match="stop"):
            open_store(dataset, use_mmap=False, progress=fail)
        assert open_files() == before

    def test_nothing_is_left_open_after_close(self, dataset):
        madvise_batcher().backend  # noqa: B018 - it keeps one descriptor for the whole process
        before = open_files()
        for use_mmap in (True, False):
            store = open_store(dataset, use_mmap=use_mmap)
            store["embs"].take([0])
            store.close()
            assert open_files() == before
            assert not MAPS.exists() or str(dataset) not in MAPS.read_text()

    def test_closing_gives_back_memory_that_was_kept_for_results(self, tmp_path):
        rows = torch.arange(1 << 19).view(-1, 64)
        write_safetensors(tmp_path, {"rows": rows})
        store = open_store(tmp_path, use_mmap=True)
        for _ in range(3):
            taken = store["rows"].take(torch.arange(len(rows)))
        free, other = resident._BUFFERS.free_nbytes, store["rows"].take([5])
        store.close()
        assert resident._BUFFERS.free_nbytes < max(free, 1)
        assert torch.equal(taken, rows)
        assert torch.equal(other, rows[5:6])

    def test_closed(self, dataset):
        with open_store(dataset) as store:
            assert not store.closed
        assert store.closed
        assert "closed" in repr(store)
        for use in (
            lambda: store["embs"],
            lambda: len(store),
            lambda: list(store),
            lambda: store.ragged("embs"),
            store.residency,
            store.release,
            store.explain,
            store.memory_report,
            lambda: store.reopened(["embs"]),
            lambda: store.replace({}),
            store.__enter__,
            lambda: pickle.dumps(store),
        ):
            with pytest.raises(ClosedError, match="open it again"):
                use()

    def test_writes_into_views_reach_neither_file_nor_others(self, dataset):
        before = (dataset / "embs.safetensors").read_bytes()
        with open_store(dataset, use_mmap=True) as store, open_store(dataset, use_mmap=True) as other:
            store["embs"].tensor().zero_()
            store["embs"][3].fill_(7)
            assert not store["embs"].take([0]).any()
            assert torch.equal(other["embs"].tensor(), tensors()["embs"])
        assert (dataset / "embs.safetensors").read_bytes() == before

    def test_narrowing(self, dataset):
        values = tensors()
        for dtype in (torch.float16, torch.bfloat16):
            for options in ({"use_mmap": False}, {"memory_limit": 0}):
                with open_store(dataset, dtype=dtype, **options) as store:
                    for name, expected in values.items():
                        want = expected.to(dtype) if expected.is_floating_point() and expected.ndim > 1 else expected
                        assert store[name].dtype == want.dtype
                        assert torch.equal(store[name].tensor(), want), name
                        if len(want.shape) and len(want):
                            assert torch.equal(store[name].take([0]), want[:1])
                            assert torch.equal(store[name][-1], want[-1])
                            assert torch.equal(store[name].take([0], out=torch.empty_like(want[:1])), want[:1])
                            assert torch.equal(torch.cat(list(store[name].blocks(2)))[:1], want[:1])
                        assert store[name].nbytes == want.nbytes
                    assert "float32 to " in str(store.plan)
                    again = pickle.loads(pickle.dumps(store))
                    assert torch.equal(again["embs"].take([3, 1]), values["embs"].to(dtype)[[3, 1]])
        with pytest.raises(IncompatibleOptionsError, match="dtype"):
            open_store(dataset, dtype=torch.float16, use_mmap=True)

    def test_narrowing_chunked_data(self, tmp_path):
        WRITERS["gzip"](tmp_path, tensors())
        want = tensors()["embs"].bfloat16()
        for options in ({"use_mmap": False}, {"memory_limit": 0}):
            with open_store(tmp_path, dtype=torch.bfloat16, **options) as store:
                assert torch.equal(store["embs"].tensor(), want)
                assert torch.equal(store["embs"].take([4, 4, 0]), want[[4, 4, 0]])


class TestWarnings:
    def write_chunks(self, path, rows, chunk_rows):
        with h5py.File(path / "dataset.h5", "w") as file:
            file.create_dataset("x", (rows, 128), "f4", chunks=(chunk_rows, 128), compression="gzip")

    def test_chunks_that_dwarf_rows(self, tmp_path):
        self.write_chunks(tmp_path, 5000, 4096)
        with pytest.warns(PerformanceWarning, match=r"x: a row of 512 B .* chunk of 2\.00 MiB"):
            open_store(tmp_path, memory_limit=0).close()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            open_store(tmp_path).close()
            self.write_chunks(tmp_path, 5000, 1024)
            open_store(tmp_path, memory_limit=0).close()

    def test_warnings_point_at_the_caller(self, tmp_path):
        self.write_chunks(tmp_path, 10, 4)
        with pytest.warns(PerformanceWarning, match="cannot be mapped") as caught:
            open_store(tmp_path, use_mmap=True).close()
        assert "store.py" not in caught[0].filename

    def test_scattered_rows(self, tmp_path):
        np.save(tmp_path / "x.npy", np.asfortranarray(np.zeros((3000, 128), np.float32)))
        with pytest.warns(PerformanceWarning, match="rows are scattered"):
            open_store(tmp_path, use_mmap=True).close()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            open_store(tmp_path, use_mmap=False).close()


class TestTravelling:
    def test_a_pickle_is_small_whatever_is_in_it(self, tmp_path):
        save_file({f"tensor_{i}": torch.full((2,), float(i)) for i in range(1000)}, tmp_path / "many.safetensors")
        with open_store(tmp_path) as store:
            data = pickle.dumps(store)
            assert len(data) < 4096
            again = pickle.loads(data)
            assert again["tensor_999"].tensor().tolist() == [999.0] * 2
            assert again["tensor_0"].placement == "mmap"
            again.close()

    def test_a_schema_travels_too(self, dataset):
        reads = {f"name_{i}": 1.0 for i in range(20)} | {"embs": 7.0}
        schema = Schema(frozenset({"embs"}), {"embs": "e/m"}, {"x": "embs"}, reads)
        with open_store(dataset, schema=schema) as store:
            again = pickle.loads(pickle.dumps(store))
            assert [e.reads_per_sample for e in again.plan.entries if e.name == "embs"] == [7.0]

    def test_a_relative_path_travels_as_an_absolute_one(self, dataset, monkeypatch):
        monkeypatch.chdir(dataset.parent)
        data = pickle.dumps(open_store(dataset.name))
        monkeypatch.chdir("/")
        assert pickle.loads(data).path == dataset

    def test_files_that_changed_meanwhile_are_refused(self, dataset):
        store = open_store(dataset)
        data = pickle.dumps(store)
        save_file({"embs": torch.zeros(50, 16)}, dataset / "embs.safetensors")
        with pytest.raises(CorruptFileError, match="changed after the store was opened"):
            pickle.loads(data)

    def test_data_on_a_device_stays_there(self, dataset):
        store = open_store(dataset)
        store._reopen_spec.on_device = True
        with pytest.raises(IncompatibleOptionsError, match="num_workers=0"):
            pickle.dumps(store)

    def test_nothing_is_warned_of_twice(self, tmp_path):
        WRITERS["gzip"](tmp_path, tensors())
        with pytest.warns(PerformanceWarning):
            store = open_store(tmp_path, use_mmap=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pickle.loads(pickle.dumps(store)).close()


class TestReplacing:
    @pytest.mark.parametrize("use_mmap", [True, False])
    def test_reopened_then_adopted(self, dataset, use_mmap):
        old = tensors()["embs"]
        with open_store(dataset, use_mmap=use_mmap) as store:
            held = store["embs"]
            save_file({"embs": old + 1}, dataset / "new.tmp")
            (dataset / "new.tmp").replace(dataset / "embs.safetensors")
            fresh = store.reopened(["embs"])
            assert torch.equal(store["embs"].tensor(), old)
            assert torch.equal(fresh["embs"].tensor(), old + 1)
            store.replace(fresh)
            assert store["embs"] is fresh["embs"]
            assert torch.equal(held.tensor(), old)
            again = pickle.loads(pickle.dumps(store))
            assert torch.equal(again["embs"].tensor(), old + 1)
            assert torch.equal(pickle.loads(pickle.dumps(fresh["embs"])).tensor(), old + 1)

    def test_failures_leave_the_store_as_it_is(self, dataset):
        with open_store(dataset) as store:
            with pytest.raises(KeyError):
                store.reopened(["embs", "nothing"])
            (dataset / "embs.safetensors").unlink()
            with pytest.raises(DatasetNotFoundError, match="embs is no longer there"):
                store.reopened(["embs"])
            (dataset / "embs.safetensors").write_bytes(b"garbage!garbage!")
            with pytest.raises(CorruptFileError):
                store.reopened(["embs"])
            assert torch.equal(store["embs"].tensor(), tensors()["embs"])


class TestTelling:
    def test_explain(self, dataset):
        with open_store(dataset, use_mmap=True) as store:
            text = store.explain()
            for part in (
                str(dataset),
                "use_mmap=True",
                "file system",
                "gathers: ",
                "prefetching rows",
                "embs normal",
                "manifest: none",
            ):
                assert part in text
        with open_store(dataset, use_mmap=False) as store:
            assert "prefetching" not in store.explain()

    def test_memory_report(self, dataset):
        with open_store(dataset, use_mmap=False) as store:
            report = store.memory_report()
            assert report.held == store.nbytes
            assert report.process.total_rss > 0
            assert "embs" in str(report)
            assert report.to_dict()["held"] == store.nbytes
        with open_store(dataset, use_mmap=True) as store:
            assert store.memory_report().held == 0
            assert set(store.residency()) == set(store)
            store.release()
            assert torch.equal(store["embs"].tensor(), tensors()["embs"])


def private_bytes():
    with ROLLUP.open() as file:
        fields = dict(line.split(":") for line in file if ":" in line)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("Private_Clean", "Private_Dirty"))


@pytest.mark.skipif(not ROLLUP.exists(), reason="needs Linux's smaps_rollup")
@pytest.mark.parametrize("kind", ["safetensors", "npy", "hdf5"])
def test_a_sparse_file_larger_than_memory(tmp_path, kind):
    """60 GiB that take no disk: opened, read here and there, with next to no memory of its own."""
    if shutil.disk_usage(tmp_path).free < GIB:
        pytest.skip("needs a file system with sparse files and some room")
    rows = 60 * GIB // 1536
    path = tmp_path / {"safetensors": "x.safetensors", "npy": "x.npy", "hdf5": "dataset.h5"}[kind]
    if kind == "npy":
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(1, 384))
        with path.open("r+b") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, 384)})
            file.truncate(file.tell() + rows * 1536)
    elif kind == "safetensors":
        text = f'{{"x":{{"dtype":"F32","shape":[{rows},384],"data_offsets":[0,{rows * 1536}]}}}}'.encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(file.tell() + rows * 1536)
    else:
        with h5py.File(path, "w") as file:
            made = file.create_dataset("x", (rows, 384), "f4")
            made[rows - 1] = 1.0
    if kind != "hdf5":
        with path.open("r+b") as file:
            file.seek(-1536, os.SEEK_END)
            file.write(np.ones(384, np.float32).tobytes())
    before = private_bytes()
    with open_store(tmp_path, use_mmap=True) as store:
        x = store["x"]
        assert x.shape == (rows, 384)
        index = torch.randint(rows, (2000,), generator=torch.Generator().manual_seed(0))
        x.announce(index)
        assert not x.take(index[index != rows - 1]).any()
        assert x[-1].sum() == 384
        assert x.take([rows - 1, 0]).sum() == 384
        block = next(x.blocks())
        assert not block.any()
        assert private_bytes() - before < 64 << 20
        again = pickle.loads(pickle.dumps(store))
        assert again["x"][-1].sum() == 384


def test_more_files_than_may_be_open(tmp_path):
    resource = pytest.importorskip("resource")
    for i in range(80):
        np.save(tmp_path / f"t{i}.npy", np.zeros(2))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for spare in (40, 41):
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files() + spare, hard))
        try:
            with pytest.raises(IncompatibleOptionsError, match="ulimit -n"):
                open_store(tmp_path, use_mmap=True)
            open_store(tmp_path, use_mmap=False).close()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_store_and_a_plan_are_readable_in_a_notebook(tmp_path):
    save_file({f"t{i:02}": torch.zeros(8, 16, dtype=torch.float16) for i in range(14)}, tmp_path / "a.safetensors")
    with open_store(tmp_path, use_mmap=True) as store:
        lines = repr(store).splitlines()
        assert lines[0] == f"TensorStore({str(tmp_path)!r}): safetensors, 14 tensors in mmap 3.50 KiB"
        assert lines[1].split() == ["t00", "float16", "[8,", "16]", "mmap"]
        assert len(lines) == 14
        assert lines[-1].strip() == "... and 2 more"
        assert store._ipython_key_completions_() == [f"t{i:02}" for i in range(14)]
        assert repr(store.plan) == str(store.plan)
        assert "tensor" in repr(store.plan).splitlines()[0]
