"""What every stored tensor owes its user, for every format and place."""

import copy
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from jasper_store.errors import ClosedError, IncompatibleOptionsError
from jasper_store.formats.base import Inline
from jasper_store.store.resident import DeviceTensor
from jasper_store.store.store import open_store
from tests.store.samples import WRITERS, tensors

CASES = [
    ("pt", "mmap"), ("safetensors", "mmap"), ("npy", "mmap"), ("hdf5", "mmap"), ("misaligned", "mmap"),
    ("strided", "mmap"), ("pt", "ram"), ("safetensors", "ram"), ("npy", "ram"), ("hdf5", "ram"), ("gzip", "ram"),
    ("misaligned", "ram"), ("strided", "ram"), ("gzip", "chunked"), ("safetensors", "device"), ("gzip", "device"),
]  # fmt: skip
VALUES = tensors()
NAMES = sorted(VALUES)
WITH_ROWS = [name for name in NAMES if VALUES[name].ndim and len(VALUES[name])]


def same(got, expected):
    """Bit for bit, which torch.equal is not for NaN."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    raw = [t.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for t in (got, expected)]
    assert torch.equal(*raw)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def store(request, tmp_path_factory):
    written, place = request.param
    directory = tmp_path_factory.mktemp(f"{written}-{place}")
    WRITERS[written](directory, VALUES)
    with quiet(directory) if place == "chunked" else open_store(directory, use_mmap=place == "mmap") as opened:
        if place == "device":
            opened.replace({name: DeviceTensor(opened[name].spec, opened[name].tensor()) for name in opened})
        yield opened


def quiet(directory):
    with pytest.warns(UserWarning, match="cannot be mapped"):
        return open_store(directory, use_mmap=True)


@pytest.mark.parametrize("name", NAMES)
class TestEveryTensor:
    def test_facts(self, store, name):
        tensor, expected = store[name], VALUES[name]
        assert tensor.shape == expected.shape
        assert tensor.dtype == expected.dtype
        assert tensor.nbytes == expected.nbytes
        assert tensor.ndim == expected.ndim
        assert tensor.n_rows == (len(expected) if expected.ndim else 1)
        assert tensor.device == torch.device("cpu")
        assert name in repr(tensor)
        if expected.ndim:
            assert len(tensor) == len(expected)
        else:
            with pytest.raises(TypeError):
                len(tensor)

    def test_whole(self, store, name):
        same(store[name].tensor(), VALUES[name])

    def test_take(self, store, name):
        expected = VALUES[name] if VALUES[name].ndim else VALUES[name].reshape(1)
        n = len(expected)
        g = torch.Generator().manual_seed(n)
        for rows in ([], [0] * 5, list(range(n)), torch.randint(max(n, 1), (3 * n,), generator=g).tolist()):
            if n or not rows:
                index = torch.tensor(rows, dtype=torch.int64)
                got = store[name].take(index)
                same(got, expected[index])
                out = torch.empty_like(got)
                assert store[name].take(index, out=out) is out
                same(out, expected[index])
                strided = torch.empty((*got.shape, 2), dtype=got.dtype)[..., 0]
                assert store[name].take(index, out=strided) is strided
                same(strided, expected[index])

    def test_taken_rows_are_owned(self, store, name):
        n = store[name].n_rows
        if n:
            got = store[name].take([0, n - 1])
            if got.numel():
                got.zero_()
                same(store[name].tensor(), VALUES[name])

    def test_kinds_of_rows(self, store, name):
        expected = VALUES[name]
        if name not in WITH_ROWS:
            return
        last = len(expected) - 1
        for rows in (
            [last, 0],
            (last, 0),
            np.array([last, 0]),
            np.array([last, 0], dtype=np.uint8),
            torch.tensor([last, 0], dtype=torch.int32),
            torch.tensor([last, 7, 0])[::2],
        ):
            same(store[name].take(rows), expected[torch.tensor([last, 0])])
        same(
            store[name].take(range(last, -1, -1)),
            expected.flip(0) if expected.dtype not in UNSIGNED else expected[torch.arange(last, -1, -1)],
        )

    def test_index(self, store, name):
        expected = VALUES[name]
        if name not in WITH_ROWS:
            return
        n = len(expected)
        for index in (0, n - 1, -1, -n, np.int64(0), torch.tensor(-1)):
            same(store[name][index], expected[int(index)])
        for index in (slice(None), slice(1, -1), slice(-3, None), slice(0, None, 3), slice(5, 2), slice(n, n + 9)):
            same(store[name][index], expected[index])
        same(store[name][::-2], expected[torch.arange(n - 1, -1, -2)])
        for index in ([-1, 0], torch.tensor([-n, -1, 0]), np.array([-1])):
            same(store[name][index], expected[torch.as_tensor(index)])
        assert len([*store[name]]) == n

    @pytest.mark.parametrize("rows_per_block", [None, 1, 7, 1000])
    def test_blocks(self, store, name, rows_per_block):
        expected = VALUES[name]
        for drop_behind in (False, True):
            blocks = [b.clone() for b in store[name].blocks(rows_per_block, drop_behind=drop_behind)]
            if not expected.ndim:
                same(torch.cat(blocks).reshape(()), expected)
            elif len(expected):
                assert all(len(b) == (rows_per_block or len(expected)) for b in blocks[:-1])
                same(
                    torch.cat(blocks)
                    if expected.dtype not in UNSIGNED
                    else torch.stack([r for b in blocks for r in b]),
                    expected,
                )
            else:
                assert blocks == []

    def test_bad_rows(self, store, name):
        tensor = store[name]
        n = tensor.n_rows
        for value in (n, -1, 2**40, -(2**63)):
            rows = torch.tensor([0, value] if n else [value])
            found = rf"{name}: row {value} at position {len(rows) - 1} is out of range"
            for named in (rows, rows.tolist()):
                with pytest.raises(IndexError, match=found):
                    tensor.take(named)
            out = torch.empty((len(rows), *tensor.row_shape), dtype=tensor.dtype)
            with pytest.raises(IndexError, match=found):
                tensor.take(rows, out=out)
        for wrong in (
            [0.5],
            [True],
            torch.zeros(2, 2, dtype=torch.int64),
            torch.tensor(0),
            torch.tensor([True]),
            ["0"],
            None,
            [2**70],
            [[0], [0, 1]],
        ):
            with pytest.raises(IndexError, match=name):
                tensor.take(wrong)
        for index in (n, -n - 1, (0, 0), None, ..., 0.0, "0", True):
            with pytest.raises(IndexError, match=name):
                tensor[index]

    def test_bad_out(self, store, name):
        tensor = store[name]
        if not tensor.n_rows:
            return
        for out in (
            torch.empty((2, *tensor.row_shape), dtype=tensor.dtype),
            torch.empty((1, *tensor.row_shape), dtype=torch.complex64),
            torch.empty((1, *tensor.row_shape), dtype=tensor.dtype, device="meta"),
        ):
            with pytest.raises(IncompatibleOptionsError, match=f"{name}: out must be"):
                tensor.take([0], out=out)

    def test_hints_change_nothing(self, store, name):
        tensor = store[name]
        tensor.announce([0, 10**9, -5])
        tensor.announce([])
        tensor.announce(range(tensor.n_rows))
        assert tensor.residency() >= 0
        tensor.drop()
        same(tensor.tensor(), VALUES[name])


UNSIGNED = {torch.uint16, torch.uint32, torch.uint64}


@given(st.lists(st.integers(0, 49), max_size=200))
@pytest.mark.parametrize("name", ["embs"])
def test_any_rows_in_any_order(store, name, rows):
    index = torch.tensor(rows, dtype=torch.int64)
    same(store[name].take(index), VALUES[name][index])


def read_all(store, queue=None):
    """In another process: rows of every tensor as bytes."""
    found = {}
    for name, tensor in store.items():
        rows = tensor.take(range(tensor.n_rows))
        found[name] = (tensor.placement, rows.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if queue is not None:
        queue.put(found)
    return found


def expected_bytes():
    return {
        n: v.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if v.numel() else b"" for n, v in VALUES.items()
    }


def in_a_fork(store):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=read_all, args=(store, queue))
    process.start()
    found = queue.get(timeout=120)
    process.join()
    return found


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_keeps_everything(store):
    read_all(store)
    found = in_a_fork(store)
    assert {n: b for n, (_, b) in found.items()} == expected_bytes()
    assert {n: p for n, (p, _) in found.items()} == {n: t.placement for n, t in store.items()}


def read_stores(stores, queue):
    queue.put([read_all(store) for store in stores])


def test_a_spawned_process_maps_again(tmp_path):
    stores = []
    for written, place in CASES:
        directory = tmp_path / f"{written}-{place}"
        directory.mkdir()
        WRITERS[written](directory, VALUES)
        stores.append(quiet(directory) if place == "chunked" else open_store(directory, use_mmap=place == "mmap"))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=read_stores, args=(stores, queue))
    process.start()
    for store, found in zip(stores, queue.get(timeout=120), strict=True):
        assert {n: b for n, (_, b) in found.items()} == expected_bytes()
        left = {name for name, (place, _) in found.items() if place == "ram"}
        assert left <= {spec.name for spec in store.specs if isinstance(spec.location, Inline)}
        store.close()
    process.join()


def test_a_pickled_tensor_is_that_tensor_of_its_store(store):
    again, tensor = pickle.loads(pickle.dumps((store, store["embs"])))
    assert again["embs"] is tensor
    alone = pickle.loads(pickle.dumps(store["embs"]))
    same(alone.tensor(), VALUES["embs"])
    same(copy.deepcopy(store)["embs"].tensor(), VALUES["embs"])
    again.close()


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_closed(case, tmp_path):
    written, place = case
    WRITERS[written](tmp_path, VALUES)
    store = quiet(tmp_path) if place == "chunked" else open_store(tmp_path, use_mmap=place == "mmap")
    held = dict(store)
    views = {name: tensor.tensor() for name, tensor in held.items()}
    scan = held["embs"].blocks(1)
    next(scan)
    store.close()
    store.close()
    for name, tensor in held.items():
        for use in (
            lambda t: t.take([0]),
            lambda t: t.take(torch.tensor([0])),
            lambda t: t[0],
            lambda t: t[:],
            lambda t: t[[0]],
            lambda t: t.tensor(),
            lambda t: t.announce([0]),
            lambda t: t.residency(),
            lambda t: t.drop(),
            lambda t: next(t.blocks()),
        ):
            with pytest.raises(ClosedError, match=name):
                use(tensor)
        assert name in repr(tensor)
        tensor.close()
        same(views[name], VALUES[name])
    with pytest.raises(ClosedError):
        next(scan)
