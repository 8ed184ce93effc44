"""A tensor in many parts is the tensor in one: every format, number of parts and placement, to the bit."""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import pickle
import time
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save_file

import jasper_store as js
from jasper_store.errors import ClosedError, CorruptFileError, DatasetNotFoundError
from jasper_store.formats.base import Extent, Parts, Schema, TensorSpec
from jasper_store.formats.npy import NpyFormat
from jasper_store.formats.parts import join, parts_of
from jasper_store.native import gather, parts as native_parts
from jasper_store.native.parts import UNMAPPED, PartTable, PlacedParts
from jasper_store.paging import residency
from jasper_store.paging.residency import mapped_cached_bytes
from jasper_store.store import part_maps, parted
from jasper_store.store.direct_rows import direct_readers_for
from jasper_store.store.opening import open_store, plan_store
from jasper_store.store.parted import PartedTensor
from jasper_store.store.store import TensorStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from jasper_store.store.tensors import StoredTensor

FORMATS = ("safetensors", "npy", "hdf5", "pt")
N = 2400


def whole() -> dict[str, torch.Tensor]:
    """Row shapes and dtypes that take different ways: runs for streaming stores, odd bytes, single numbers, bits."""
    g = torch.Generator().manual_seed(3)
    return {
        "embs": torch.randn(N, 160, generator=g),
        "half": torch.randn(N, 3, 5, generator=g).half(),
        "labels": torch.randint(-(2**60), 2**60, (N,), generator=g),
        "words": torch.randint(0, 2**16, (N, 3), generator=g).to(torch.uint16),
        "flags": torch.rand(N, generator=g) > 0.5,
    }


def cut(n_parts: int, n: int = N, seed: int = 0) -> list[tuple[int, int]]:
    """Where parts begin and end; unequal, and some of more than three are empty."""
    g = torch.Generator().manual_seed(seed)
    inner = torch.randint(0, n + 1, (n_parts - 1,), generator=g).sort().values.tolist()
    bounds = [0, *inner, n]
    return list(itertools.pairwise(bounds))


def write(directory: Path, storage: str, name: str, number: str, rows: torch.Tensor) -> Path:
    """A part by the format's own library."""
    array = rows.numpy() if rows.dtype != torch.uint16 else rows.view(torch.int16).numpy().view(np.uint16)
    if storage == "hdf5":
        path = directory / f"part{number}.h5"
        with h5py.File(path, "a") as file:
            file.create_dataset(name, data=array)
        return path
    path = directory / f"{name}{number}.{storage}"
    if storage == "npy":
        np.save(path, array)
    elif storage == "pt":
        torch.save(rows.clone(), path)
    else:
        save_file({name: rows.clone()}, path)
    return path


def make(directory: Path, storage: str, n_parts: int, values: dict[str, torch.Tensor] | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    for name, tensor in (values or whole()).items():
        for k, (start, stop) in enumerate(cut(n_parts)):
            write(directory, storage, name, f"-{k:05d}-of-{n_parts:05d}", tensor[start:stop])
    return directory


def opened(directory: Path, placement: str) -> TensorStore:
    if placement == "hybrid":
        return open_store(directory, memory_limit=200_000)
    return open_store(directory, use_mmap=placement == "mapped")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    root = tmp_path_factory.mktemp("parts")

    def get(storage: str, n_parts: int) -> Path:
        path = root / f"{storage}-{n_parts}"
        return path if path.exists() else make(path, storage, n_parts)

    return get


COUNTS = [1, 2, 7, pytest.param(1000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("placement", ["mapped", "ram", "hybrid"])
@pytest.mark.parametrize("n_parts", COUNTS)
@pytest.mark.parametrize("storage", FORMATS)
def test_as_one(made: Callable[[str, int], Path], storage: str, n_parts: int, placement: str) -> None:
    g = torch.Generator().manual_seed(n_parts)
    with opened(made(storage, n_parts), placement) as store:
        if n_parts > 1 and placement == "mapped":
            assert all(isinstance(store[name], PartedTensor) for name in whole())
        for name, expected in whole().items():
            tensor = store[name]
            assert tuple(tensor.shape) == tuple(expected.shape)
            assert tensor.dtype == expected.dtype
            for n in (0, 1, 33, 3000):
                rows = torch.randint(0, N, (n,), generator=g)
                assert_same(tensor.take(rows), take(expected, rows))
                out = torch.empty_like(take(expected, rows))
                assert tensor.take(rows, out=out) is out
                assert_same(out, take(expected, rows))
            strided = torch.randint(0, N, (50, 2), generator=g)[:, 1]
            assert_same(tensor.take(strided), take(expected, strided))
            for start, stop in ((0, N), (5, 5), (N - 3, N), (100, 1900)):
                assert_same(tensor[start:stop], expected[start:stop])
            assert_same(tensor[-1], expected[-1])
            assert_same(tensor.tensor(), expected)
            assert_same(torch.cat([block.clone() for block in tensor.blocks(501, drop_behind=True)]), expected)
            tensor.prefetch([-1, N, 0, N - 1])
            tensor.drop_runs(np.array([0, 50, 2000]), np.array([40, 2300, N + 5]))
            assert_same(tensor.take(torch.arange(N)), expected)
            for bad in (-1, N):
                with pytest.raises(IndexError, match=rf"{name}: row {bad} at position 2 is out of range"):
                    tensor.take([0, N - 1, bad])


@pytest.mark.parametrize("n_parts", COUNTS)
@pytest.mark.parametrize("storage", FORMATS)
def test_workers_serve_the_same_epoch(made: Callable[[str, int], Path], storage: str, n_parts: int) -> None:
    fields = {"x": "embs[i]", "y": "labels[i]"}
    with js.Dataset(made(storage, n_parts), fields, use_mmap=True) as dataset:
        epochs = []
        for workers in (0, 2):
            loader = js.create_loader(dataset, batch_size=128, num_workers=workers, drop_last=False)
            epochs.append([(batch["x"].clone(), batch["y"].clone()) for batch in loader])
    values = whole()
    order = {int(label): row for row, label in enumerate(values["labels"])}
    seen = torch.cat([y for _, y in epochs[0]])
    assert torch.equal(seen.sort().values, values["labels"].sort().values)
    for (x, y), (other_x, other_y) in zip(*epochs, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
        assert torch.equal(x, values["embs"][[order[int(label)] for label in y]])


def take(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(tensor.numpy()[rows.numpy()])


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_without_the_kernel(made: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "kernel", lambda: None)
    monkeypatch.setattr(native_parts, "library", lambda: None)
    test_as_one(made, "npy", 7, "mapped")


def test_narrowed(made: Callable[[str, int], Path]) -> None:
    expected = whole()["embs"].to(torch.bfloat16)
    for limit, placement in ((200_000, "mmap"), (None, "ram")):
        with open_store(made("npy", 7), memory_limit=limit, dtype=torch.bfloat16) as store:
            assert store["embs"].placement == placement
            rows = torch.randint(0, N, (700,))
            assert torch.equal(store["embs"].take(rows), expected[rows])
            assert torch.equal(store["embs"].tensor(), expected)


def test_a_slice_within_a_part_is_a_view_that_outlives_the_store(made: Callable[[str, int], Path]) -> None:
    with open_store(made("npy", 2), use_mmap=True) as store:
        (_, edge), _ = cut(2)
        address = store["embs"][edge - 10 : edge].data_ptr()
        view = store["embs"][edge - 10 : edge]
        assert view.data_ptr() == address
        assert store["embs"][edge - 10 : edge + 1].data_ptr() != address
        view[0] = 0  # private
        fresh = open_store(made("npy", 2), use_mmap=True)
        assert torch.equal(fresh["embs"][edge - 10 : edge], whole()["embs"][edge - 10 : edge])
    assert torch.equal(view[1:], whole()["embs"][edge - 9 : edge])
    with pytest.raises(ClosedError):
        store["embs"].take([0])


def test_files_need_no_descriptors(made: Callable[[str, int], Path]) -> None:
    with open_store(made("npy", 7), use_mmap=True) as store:
        before = len(list(Path("/proc/self/fd").iterdir()))
        store["embs"].take(torch.arange(N))
        assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("max_maps", [1, 3])
def test_more_files_than_may_be_mapped(
    made: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch, max_maps: int
) -> None:
    monkeypatch.setattr(part_maps.PartMaps.__init__, "__kwdefaults__", {"max_maps": max_maps})
    expected = whole()["embs"]
    with open_store(made("npy", 7), use_mmap=True) as store:
        for seed in range(5):
            rows = torch.randint(0, N, (500,), generator=torch.Generator().manual_seed(seed))
            assert torch.equal(store["embs"].take(rows), expected[rows])
            assert torch.equal(store["embs"][100:2000], expected[100:2000])


def _in_child(source: Any, queue: Any) -> None:
    queue.put(source["embs"].take(torch.arange(0, N, 7)).numpy().tobytes())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(made: Callable[[str, int], Path], method: Literal["fork", "spawn"]) -> None:
    with open_store(made("safetensors", 7), use_mmap=True) as store:
        store["embs"].take([0])
        context: Any = get_context(method)
        queue = context.Queue()
        child = context.Process(target=_in_child, args=(store, queue))
        child.start()
        assert queue.get(timeout=120) == whole()["embs"][::7].numpy().tobytes()
        child.join()
        copy = pickle.loads(pickle.dumps(store))
        assert len(pickle.dumps(store)) < 4096
        assert torch.equal(copy["embs"].take([N - 1]), whole()["embs"][-1:])


def test_the_pickle_of_a_store_whose_part_changed_is_refused(tmp_path: Path) -> None:
    directory = make(tmp_path / "d", "npy", 2, {"embs": whole()["embs"]})
    with open_store(directory, use_mmap=True) as store:
        raw = pickle.dumps(store)
    write(directory, "npy", "embs", "-00001-of-00002", whole()["embs"][cut(2)[1][0] :] + 1)
    os.utime(directory / "embs-00001-of-00002.npy", ns=(1, 1))
    with pytest.raises(CorruptFileError, match="changed after the store was opened"):
        pickle.loads(raw)


def test_residency_warmup_and_drop(made: Callable[[str, int], Path]) -> None:
    directory = made("safetensors", 7)
    os.sync()
    with open_store(directory, use_mmap=True) as store:
        tensor = store["embs"]
        for path in tensor.spec.paths:
            residency.drop_cache(path, 0, path.stat().st_size)
        before = tensor.residency()
        report = js.warm_up(store)
        assert tensor.residency() == tensor.nbytes
        assert before <= tensor.nbytes
        assert {entry.name for entry in report.tensors} == set(whole())
        assert report.after == report.nbytes


def test_prefetched_rows_are_read_before_they_are_taken(made: Callable[[str, int], Path]) -> None:
    os.sync()
    with open_store(made("npy", 7), use_mmap=True) as store:
        tensor = store["embs"]
        rows = torch.arange(0, N, 97)
        for path in tensor.spec.paths:
            residency.drop_cache(path, 0, path.stat().st_size)
        if tensor.residency() > tensor.nbytes // 2:
            pytest.skip("the page cache of this file system cannot be dropped")
        tensor.prefetch(rows)
        held = parted.PartedTensor._locate(tensor, rows.numpy())  # type: ignore[arg-type]
        deadline = time.monotonic() + 20
        while not all(mapped_cached_bytes(int(address) // 4096 * 4096, 4096) for address in held):
            assert time.monotonic() < deadline, "prefetched pages are not in the page cache"
            time.sleep(0.01)


def test_closing_releases_the_maps(made: Callable[[str, int], Path]) -> None:
    directory = made("npy", 7)
    gc.disable()  # without the help of the collector
    try:
        with open_store(directory, use_mmap=True) as store:
            store["embs"].take([0, N - 1])
            assert str(directory) in Path("/proc/self/maps").read_text()
        assert str(directory) not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()


def test_plan_counts_parts(made: Callable[[str, int], Path]) -> None:
    text = str(plan_store(made("npy", 7), use_mmap=True))
    assert "parts in" in text
    assert plan_store(made("npy", 7)).nbytes == sum(t.numel() * t.element_size() for t in whole().values())


def test_convert_and_verify(made: Callable[[str, int], Path], tmp_path: Path) -> None:
    js.convert(made("npy", 7), tmp_path / "one", "safetensors")
    with open_store(tmp_path / "one") as store:
        for name, expected in whole().items():
            assert isinstance(store[name].spec.location, Extent)
            assert_same(store[name].tensor(), expected)


def test_direct_reads(made: Callable[[str, int], Path]) -> None:
    with open_store(made("npy", 7), use_mmap=True) as store:
        made_readers = direct_readers_for([store["embs"]], 1)
        if not made_readers:
            pytest.skip("the file system does not read directly")
        reader = made_readers[0]
        rows = torch.randperm(N)[:900].numpy()
        which = np.zeros(900, np.int64)
        which[::50] = -1
        reader.begin(which, rows)
        addresses, _memory = reader.finish()
        expected = whole()["embs"].numpy()[rows]
        expected[::50] = 0
        got = np.stack([np.frombuffer(ctypes.string_at(int(a), 640), np.float32) for a in addresses])
        assert np.array_equal(got, expected)
        reader.close()


# ---- what is recognised


def test_numbers(tmp_path: Path) -> None:
    x = whole()["labels"]
    for style, total in (("_{:03d}", None), (".{:02d}", None), ("-{:05d}", None), ("-{:05d}-of-00003", 3)):
        directory = tmp_path / style.strip("-_.{}:")
        directory.mkdir()
        for first in (0, 1):
            for k in range(3):
                write(directory, "npy", f"from{first}", style.format(k + first), x[k * 800 : (k + 1) * 800])
        with open_store(directory) as store:
            assert set(store) == {"from0", "from1"}
            assert torch.equal(store["from1"].tensor(), x)
            assert torch.equal(store["from0"].tensor(), x)
        assert total in (None, 3)


def test_what_is_no_numbering(tmp_path: Path) -> None:
    x = whole()["labels"]
    for name in ("layer_1", "layer_2", "year_2023", "year_2024", "a_00"):
        write(tmp_path, "npy", name, "", x)
    with open_store(tmp_path) as store:
        assert set(store) == {"layer_1", "layer_2", "year_2023", "year_2024", "a_00"}


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        (["_00", "_02"], "none of number 1"),
        (["-00000-of-00003", "-00001-of-00003"], "none of number 2"),
        (["-00002-of-00002", "-00003-of-00002"], "2 as the first"),
        (["-00001-of-00002", "-1-of-00002", "-00002-of-00002"], "number 1 twice"),
    ],
)
def test_numbers_that_are_missing_or_twice(tmp_path: Path, numbers: list[str], says: str) -> None:
    for number in numbers:
        write(tmp_path, "npy", "embs", number, whole()["labels"])
    with pytest.raises(CorruptFileError, match=says) as caught:
        open_store(tmp_path)
    assert "embs" in str(caught.value)


def test_parts_that_do_not_fit_name_the_file(tmp_path: Path) -> None:
    x = whole()["embs"]
    for k, rows in enumerate((x, x[:, :3], x)):
        write(tmp_path, "npy", "embs", f"_{k:02d}", rows)
    with pytest.raises(
        CorruptFileError, match=r"embs_01\.npy: expected a part of 'embs', float32 rows of shape \[160\]"
    ):
        open_store(tmp_path)
    write(tmp_path, "npy", "embs", "_01", x.double())
    with pytest.raises(CorruptFileError, match=r"embs_01\.npy.*found float64 rows"):
        open_store(tmp_path)
    np.save(tmp_path / "embs_01.npy", np.asfortranarray(x.numpy()))
    with pytest.raises(CorruptFileError, match=r"embs_01\.npy.*no runs of bytes"):
        open_store(tmp_path)
    np.save(tmp_path / "embs_01.npy", np.float32(3))
    with pytest.raises(CorruptFileError, match=r"embs_01\.npy.*a scalar"):
        open_store(tmp_path)


def test_a_part_that_is_cut_is_named(tmp_path: Path) -> None:
    directory = make(tmp_path / "d", "npy", 7, {"embs": whole()["embs"]})
    cut_file = directory / "embs-00003-of-00007.npy"
    os.truncate(cut_file, cut_file.stat().st_size - 7)
    with pytest.raises(CorruptFileError, match=r"embs-00003-of-00007\.npy"):
        open_store(directory)


def test_a_part_that_is_cut_or_gone_before_it_is_mapped(tmp_path: Path) -> None:
    directory = make(tmp_path / "d", "npy", 2, {"embs": whole()["embs"]})
    store = open_store(directory, use_mmap=True)
    last = directory / "embs-00001-of-00002.npy"
    raw = last.read_bytes()
    os.truncate(last, 5000)
    with pytest.raises(CorruptFileError, match=r"embs-00001-of-00002\.npy: a part of embs needs"):
        store["embs"].take([N - 1])
    last.unlink()
    with pytest.raises(DatasetNotFoundError, match=r"embs-00001-of-00002\.npy"):
        store["embs"].take([N - 1])
    last.write_bytes(raw)
    assert torch.equal(store["embs"].take([N - 1]), whole()["embs"][-1:])
    os.truncate(last, 5000)
    with pytest.raises(CorruptFileError, match="was truncated"):  # some of the next takes looks at that file
        takes(store["embs"], 8)


def takes(tensor: StoredTensor, count: int) -> None:
    for _ in range(count):
        tensor.take([0])


def shards(directory: Path) -> dict[str, torch.Tensor]:
    """Sharded as models on the hub are: each tensor whole, in one of the files."""
    values = whole()
    names = list(values)
    weight_map = {}
    for k, some in enumerate((names[:2], names[2:3], names[3:])):
        file = f"model-{k + 1:05d}-of-00003.safetensors"
        save_file({name: values[name].clone() for name in some}, directory / file)
        weight_map.update(dict.fromkeys(some, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return values


@pytest.mark.parametrize("index", [True, False])
def test_shards_as_the_hub_has_them(tmp_path: Path, index: bool) -> None:
    values = shards(tmp_path)
    if not index:
        (tmp_path / "model.safetensors.index.json").unlink()
    with open_store(tmp_path, use_mmap=True) as store:
        assert set(store) == set(values)
        for name, expected in values.items():
            assert_same(store[name].tensor(), expected)


@pytest.mark.parametrize("use_mmap", [True, False])
def test_shards_that_the_hubs_own_library_wrote(tmp_path: Path, use_mmap: bool) -> None:
    hub = pytest.importorskip("huggingface_hub")
    root = tmp_path / "hub"
    root.mkdir()
    values = {f"emb{k}": torch.randn(100, 64) for k in range(5)} | {"label": torch.arange(100)}
    hub.save_torch_state_dict(values, root, max_shard_size="60KB")
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    assert len(before) > 3
    plan = js.plan(root, memory_limit="100KB")
    assert {plan.placement(name) for name in values} == {"ram", "mmap"}
    assert js.warm_up(root).after
    with js.Dataset(root, use_mmap=use_mmap) as dataset:
        batches = list(js.create_loader(dataset, batch_size=32, shuffle=False, drop_last=False))
    for name, expected in values.items():
        assert torch.equal(torch.cat([batch[name] for batch in batches]), expected)
    assert js.verify(root).ok
    js.convert(root, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.index.json"))
    after = {path.name: path.read_bytes() for path in root.iterdir()}
    assert {name for name in after.keys() - before.keys() if name[0] != "."} <= {"jasper_store.json"}
    assert all(after[name] == content for name, content in before.items())


def test_a_bad_index_is_refused(tmp_path: Path) -> None:
    shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for text, says in (
        ("[", "a JSON object"),
        ('{"weight_map": [1]}', "a JSON object"),
        (json.dumps({"weight_map": {"a": "../x.safetensors"}}), "files in its directory"),
        (json.dumps({"weight_map": {"a": "gone.safetensors"}}), r"the file 'gone\.safetensors'"),
        (json.dumps({"weight_map": {"a": 300 * "a"}}), "the file 'aaa"),
        (json.dumps({"weight_map": {**good["weight_map"], "more": "model-00001-of-00003.safetensors"}}), "'more'"),
    ):
        index.write_text(text)
        with pytest.raises(CorruptFileError, match=says):
            open_store(tmp_path)


def test_convert_leaves_a_stale_index_behind(tmp_path: Path) -> None:
    source, target = tmp_path / "hub", tmp_path / "out"
    source.mkdir()
    values = shards(source)
    js.convert(source, target, "safetensors")
    assert not list(target.glob("*.index.json"))
    with open_store(target) as store:
        assert set(store) == set(values)


def test_a_list_of_files(tmp_path: Path) -> None:
    x = whole()["embs"]
    files = [write(tmp_path, "npy", "embs", f"_{k:02d}", x[a:b]) for k, (a, b) in enumerate(cut(5))]
    with js.open(files[1:4], use_mmap=True) as store:
        assert torch.equal(store["embs"].tensor(), x[cut(5)[1][0] : cut(5)[3][1]])
    (tmp_path / "other").mkdir()
    same = [write(tmp_path, "npy", "x", "", x[:100]), write(tmp_path / "other", "npy", "x", "", x[100:])]
    with js.open(same) as store:
        assert torch.equal(store["x"].tensor(), x)
    with js.open(same[::-1]) as store:
        assert torch.equal(store["x"].tensor(), torch.cat([x[100:], x[:100]]))


# ---- the table


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.one_of(st.integers(1, 5), st.integers(1, 3000)), min_size=1, max_size=40),
    native=st.booleans(),
    data=st.data(),
)
def test_a_row_is_found(lengths: list[int], native: bool, data: st.DataObject) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = np.array(data.draw(st.lists(st.integers(0, int(starts[-1]) - 1), max_size=30)), np.int64)
    expected = np.searchsorted(starts, rows, side="right") - 1
    bases = np.arange(len(lengths), dtype=np.int64) * 10**12
    missing = data.draw(st.integers(-1, len(lengths) - 1))
    if missing >= 0:
        bases[missing] = UNMAPPED
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(native_parts, "library", lambda: None)
        table = PartTable(starts, 12)
        placed = PlacedParts(table, bases)
        assert np.array_equal(table.parts_of(rows), expected)
        out = torch.zeros(len(rows), dtype=torch.int64)
        found = placed.locate(torch.from_numpy(rows), out)
        wanted = np.where(expected == missing, UNMAPPED, bases[expected] + rows * 12) if len(rows) else rows
        assert found == (-2 if (expected == missing).any() else -1)
        assert np.array_equal(out.numpy(), wanted)
        if len(rows):
            bad = rows.copy()
            bad[-1] = data.draw(st.sampled_from([-1, int(starts[-1]), 2**62, -(2**63)]))
            assert placed.locate(torch.from_numpy(bad), out) == len(rows) - 1


def test_join_and_parts_of_are_inverse() -> None:
    specs = [TensorSpec("p", torch.float32, (n, 2), Extent(Path(f"/{n}"), 8 * n)) for n in (3, 0, 5)]
    one = join("x", specs)
    assert isinstance(one.location, Parts)
    assert one.shape == (8, 2)
    assert [(part.shape, part.location) for part in parts_of(one)] == [
        (spec.shape, spec.location) for spec in specs if spec.n_rows
    ]
    twice = join("y", [one, one])
    assert twice.paths == one.paths
    assert twice.n_rows == 16


def test_a_tensor_is_taken(made: Callable[[str, int], Path]) -> None:
    tensor: StoredTensor
    with open_store(made("pt", 2), use_mmap=True) as store:
        tensor = store["embs"]
        assert tensor.spec.path == tensor.spec.paths[0]
        assert "parts" in store.explain() or "mmap" in store.explain()


# ---- many files, remembered


@pytest.fixture
def many(tmp_path: Path) -> Path:
    directory = tmp_path / "many"
    directory.mkdir()
    for k in range(100):
        np.save(directory / f"x_{k:03d}.npy", np.arange(k * 10, k * 10 + 10, dtype=np.int64))
    return directory


def headers_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    read: list[Path] = []
    real = NpyFormat.locate

    def locate(self: NpyFormat, path: Path, schema: Schema) -> list[TensorSpec]:
        read.append(path)
        return real(self, path, schema)

    monkeypatch.setattr(NpyFormat, "locate", locate)
    return read


def test_a_verified_directory_of_many_files_opens_without_their_headers(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert js.verify(many).ok
    assert {path.name for path in many.iterdir() if path.suffix != ".npy"} <= {
        "jasper_store.json",
        ".jasper_store.json.lock",
    }
    read = headers_read(monkeypatch)
    for use_mmap in (True, False):
        with open_store(many, use_mmap=use_mmap) as store:
            assert torch.equal(store["x"].tensor(), torch.arange(1000))
            assert torch.equal(pickle.loads(pickle.dumps(store))["x"].take([999, 0]), torch.tensor([999, 0]))
    with js.Dataset(many) as dataset:
        assert len(dataset) == 1000
    assert not read


def test_a_verified_directory_of_many_files_opens_without_an_object_for_each(many: Path) -> None:
    """The garbage collector walks through what an opening keeps: a tenth of a second at each third opening, once."""
    assert js.verify(many).ok
    gc.collect()
    before = sum(type(each) is type(many) for each in gc.get_objects())
    with open_store(many, use_mmap=True) as store:
        assert sum(type(each) is type(many) for each in gc.get_objects()) < before + 50
        assert len(store.specs[0].paths) == 100


@pytest.mark.parametrize("change", ["replaced", "added", "removed", "touched"])
def test_what_was_remembered_counts_only_while_nothing_changes(
    many: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    assert js.verify(many).ok
    expected = torch.arange(1000)
    if change == "replaced":
        np.save(many / "x_099.npy", np.arange(5, dtype=np.int64))
        expected = torch.cat([torch.arange(990), torch.arange(5)])
    elif change == "added":
        np.save(many / "x_100.npy", np.arange(5, dtype=np.int64))
        expected = torch.cat([torch.arange(1000), torch.arange(5)])
    elif change == "removed":
        (many / "x_099.npy").unlink()
        expected = torch.arange(990)
    else:
        os.utime(many / "x_050.npy", ns=(1, 1))
    read = headers_read(monkeypatch)
    with open_store(many) as store:
        assert torch.equal(store["x"].tensor(), expected)
        assert not store.is_verified("headers")
    assert read
    assert js.verify(many).ok
    read.clear()
    with open_store(many) as store:
        assert torch.equal(store["x"].tensor(), expected)
        assert store.is_verified("headers")
    assert not read


def test_a_manifest_that_remembers_nonsense_is_refused_or_passed_over(many: Path) -> None:
    assert js.verify(many).ok
    path = many / "jasper_store.json"
    good = json.loads(path.read_text())
    for key, value in (("names", ["../x"] * 100), ("sizes", [0] * 100), ("mtimes_ns", "x"), ("samples", [1])):
        bad = json.loads(json.dumps(good))
        bad["found"]["files"][key] = value
        path.write_text(json.dumps(bad))
        with pytest.raises(CorruptFileError):
            open_store(many)
