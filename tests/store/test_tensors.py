"""The contract of every stored tensor, for every format and placement.

Each check of :data:`CHECKS` runs with a pairwise choice of cases and tensors: every tensor occurs in every case, every
check runs in every case, and every check runs on every tensor that it applies to. So does every check on every kind of
tensor in every way in which rows are read, because the code differs there.
"""

import copy
import multiprocessing
import pickle
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from jasper_store.errors import ClosedError, IncompatibleOptionsError, InsufficientMemoryError
from jasper_store.formats.base import Inline
from jasper_store.memory.budget import measure
from jasper_store.store.opening import open_store
from jasper_store.store.resident import DeviceTensor
from tests.store.pairwise import pairs_of, pairwise
from tests.store.samples import WRITERS, tensors

CASES = [
    ("pt", "mmap"), ("safetensors", "mmap"), ("npy", "mmap"), ("hdf5", "mmap"), ("misaligned", "mmap"),
    ("strided", "mmap"), ("pt", "ram"), ("safetensors", "ram"), ("npy", "ram"), ("hdf5", "ram"), ("gzip", "ram"),
    ("misaligned", "ram"), ("strided", "ram"), ("gzip", "chunked"), ("safetensors", "device"), ("gzip", "device"),
]  # fmt: skip
VALUES = tensors()
NAMES = sorted(VALUES)
WITH_ROWS = [name for name in NAMES if VALUES[name].ndim and len(VALUES[name])]
UNSIGNED = {torch.uint16, torch.uint32, torch.uint64}
BLOCKS = [None, 1, 7, 1000]
# The tensors that each check applies to. Pairs of a case and a tensor that no other check needs go to the first.
CHECKS = {
    "take": NAMES,
    "facts": NAMES,
    "whole": NAMES,
    "owned": [name for name in NAMES if VALUES[name].numel()],
    "kinds of rows": WITH_ROWS,
    "index": WITH_ROWS,
    **{f"blocks of {rows}": NAMES for rows in BLOCKS},
    "bad rows": NAMES,
    "bad out": [name for name in NAMES if not VALUES[name].ndim or len(VALUES[name])],
    "hints": NAMES,
}


def path_of(case, name):
    """The way in which a case reads rows, and the kind of a tensor: what the code distinguishes."""
    written, place = case
    way = written if place == "mmap" and written in {"misaligned", "strided"} else place
    value = VALUES[name]
    kind = "unsigned" if value.dtype in UNSIGNED else "plain"
    return way, "scalar" if not value.ndim else kind if value.numel() else "empty"


PATHS = sorted({path_of(case, name) for case in CASES for name in NAMES})
CHOSEN = pairwise(
    CASES,
    NAMES,
    list(CHECKS),
    PATHS,
    allowed=lambda case, name, check, path: name in CHECKS[check] and path == path_of(case, name),
)


def chosen_for(check):
    """Parametrizes a check with its cases and tensors."""
    found = [(case, name) for case, name, each, _ in CHOSEN if each == check]
    return pytest.mark.parametrize(
        ("case", "name"), found, ids=lambda value: value if isinstance(value, str) else "-".join(value)
    )


every_case = pytest.mark.parametrize("case", CASES, ids="-".join)


def test_every_pair_is_chosen():
    every = [(case, name, check) for case in CASES for check, names in CHECKS.items() for name in names]
    chosen = {pair for case, name, check, path in CHOSEN for pair in pairs_of((case, name, check, path))}
    assert all(pairs_of((case, name, check, path_of(case, name))) <= chosen for case, name, check in every)
    assert {case for case, *_ in CHOSEN} == set(CASES)


def same(got, expected):
    """Bit for bit, which torch.equal is not for NaN."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    raw = [t.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for t in (got, expected)]
    assert torch.equal(*raw)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The store of a case, opened on first use."""
    stores = {}
    with ExitStack() as closing:

        def get(case):
            if case not in stores:
                written, place = case
                directory = tmp_path_factory.mktemp("-".join(case))
                WRITERS[written](directory, VALUES)
                store = quiet(directory) if place == "chunked" else open_store(directory, use_mmap=place == "mmap")
                stores[case] = closing.enter_context(store)
                if place == "device":
                    store.replace({name: DeviceTensor(store[name].spec, store[name].tensor()) for name in store})
            return stores[case]

        yield get


def quiet(directory):
    with pytest.warns(UserWarning, match="cannot be mapped"):
        return open_store(directory, use_mmap=True)


@chosen_for("facts")
def test_facts(opened, case, name):
    store = opened(case)
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


@chosen_for("whole")
def test_whole(opened, case, name):
    store = opened(case)
    same(store[name].tensor(), VALUES[name])


@chosen_for("take")
def test_take(opened, case, name):
    store = opened(case)
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


@chosen_for("owned")
def test_taken_rows_are_owned(opened, case, name):
    store = opened(case)
    tensor = store[name]
    got = tensor.take([0, tensor.n_rows - 1])
    assert got.numel()
    got.zero_()
    same(tensor.tensor(), VALUES[name])


@chosen_for("kinds of rows")
def test_kinds_of_rows(opened, case, name):
    store = opened(case)
    expected = VALUES[name]
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


@chosen_for("index")
def test_index(opened, case, name):
    store = opened(case)
    expected = VALUES[name]
    n = len(expected)
    for index in (0, n - 1, -1, -n, np.int64(0), torch.tensor(-1)):
        same(store[name][index], expected[int(index)])
    for index in (slice(None), slice(1, -1), slice(-3, None), slice(0, None, 3), slice(5, 2), slice(n, n + 9)):
        same(store[name][index], expected[index])
    same(store[name][::-2], expected[torch.arange(n - 1, -1, -2)])
    for index in ([-1, 0], torch.tensor([-n, -1, 0]), np.array([-1])):
        same(store[name][index], expected[torch.as_tensor(index)])
    assert len([*store[name]]) == n


@pytest.mark.parametrize(
    ("case", "name", "rows_per_block"),
    [(case, name, rows) for rows in BLOCKS for case, name, check, _ in CHOSEN if check == f"blocks of {rows}"],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_blocks(opened, case, name, rows_per_block):
    store = opened(case)
    expected = VALUES[name]
    for drop_behind in (False, True):
        blocks = [b.clone() for b in store[name].blocks(rows_per_block, drop_behind=drop_behind)]
        if not expected.ndim:
            same(torch.cat(blocks).reshape(()), expected)
        elif len(expected):
            assert all(len(b) == (rows_per_block or len(expected)) for b in blocks[:-1])
            same(
                torch.cat(blocks) if expected.dtype not in UNSIGNED else torch.stack([r for b in blocks for r in b]),
                expected,
            )
        else:
            assert blocks == []


@chosen_for("bad rows")
def test_bad_rows(opened, case, name):
    store = opened(case)
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


@chosen_for("bad out")
def test_bad_out(opened, case, name):
    store = opened(case)
    tensor = store[name]
    for out in (
        torch.empty((2, *tensor.row_shape), dtype=tensor.dtype),
        torch.empty((1, *tensor.row_shape), dtype=torch.complex64),
        torch.empty((1, *tensor.row_shape), dtype=tensor.dtype, device="meta"),
    ):
        with pytest.raises(IncompatibleOptionsError, match=f"{name}: out must be"):
            tensor.take([0], out=out)


@chosen_for("hints")
def test_hints_change_nothing(opened, case, name):
    store = opened(case)
    tensor = store[name]
    tensor.prefetch([0, 10**9, -5])
    tensor.prefetch([])
    tensor.prefetch(range(tensor.n_rows))
    assert tensor.residency() >= 0
    tensor.drop()
    same(tensor.tensor(), VALUES[name])


@given(rows=st.lists(st.integers(0, 49), max_size=200))
@every_case
def test_any_rows_in_any_order(opened, case, rows):
    index = torch.tensor(rows, dtype=torch.int64)
    same(opened(case)["embs"].take(index), VALUES["embs"][index])


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
@every_case
def test_a_fork_keeps_everything(opened, case):
    store = opened(case)
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


@every_case
def test_a_pickled_tensor_is_that_tensor_of_its_store(opened, case):
    store = opened(case)
    again, tensor = pickle.loads(pickle.dumps((store, store["embs"])))
    assert again["embs"] is tensor
    alone = pickle.loads(pickle.dumps(store["embs"]))
    same(alone.tensor(), VALUES["embs"])
    same(copy.deepcopy(store)["embs"].tensor(), VALUES["embs"])
    again.close()


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy])
@every_case
def test_a_copied_store_is_one_of_its_own_with_the_same_plan(opened, case, copying):
    store = opened(case)
    with copying(store) as copied:
        assert type(copied) is type(store)
        assert copied is not store
        assert copied.plan is store.plan
        for name, tensor in copied.items():
            # The device of these tests is the host's memory in disguise, of which the plan knows nothing.
            assert tensor.placement == ("ram" if case[1] == "device" else store[name].placement)
        same(copied["embs"].tensor(), VALUES["embs"])
    assert copied.closed
    assert not store.closed
    same(pickle.loads(pickle.dumps(store["embs"])).tensor(), VALUES["embs"])


def test_a_copy_of_a_store_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    WRITERS["npy"](tmp_path, VALUES)
    with open_store(tmp_path, use_mmap=False) as store:
        little = measure(memory_limit=10)
        monkeypatch.setattr("jasper_store.store.store.measure", lambda: little)
        with pytest.raises(InsufficientMemoryError, match="a copy of the store would preload"):
            copy.deepcopy(store)


@every_case
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
            lambda t: t.prefetch([0]),
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
