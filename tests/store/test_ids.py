"""Rows by id and ids by row: a dictionary is the oracle, collisions and damage are planted."""

from __future__ import annotations

import pickle
import tracemalloc
import warnings

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import save_file

import jasper_store as js
from jasper_store.conversion.writer import DirectoryWriter
from jasper_store.errors import (
    ClosedError,
    IncompatibleOptionsError,
    InsufficientMemoryError,
    IntegrityError,
    PerformanceWarning,
    UnknownNameError,
)
from jasper_store.store import ids as module
from tests.formats.conformance import relaxed

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
some_ids = st.lists(text, unique=True, max_size=40)
IDS = ["a", "größe", "", "日本語", "😀 x", "a\0b", "aa", "b"]
PARTS = ("values", "offsets", "hashes", "order")


def write(path, ids, fmt="safetensors"):
    with DirectoryWriter(path, fmt, overwrite=True) as writer:
        writer.append_ids("ids", ids)
    return path


def opened(path, **options):
    """The ids in memory, of a store that stays open as long as they do."""
    return js.open(path, **options).ids("ids")


def without_hashes(path):
    """A copy of what is there, as a dataset that another program wrote would be: no hashes."""
    for part in ("hashes", "order"):
        (path / f"ids.{part}.safetensors").unlink()
    return path


def replace(path, part, tensor):
    """Another tensor in the place of one that was written, unnoticed by the manifest."""
    (path / "jasper_store.json").unlink(missing_ok=True)
    (path / f"ids.{part}.safetensors").unlink(missing_ok=True)
    save_file({part: torch.from_numpy(np.array(tensor))}, path / f"ids.{part}.safetensors")
    return path


@relaxed
@given(some_ids, st.lists(st.one_of(text, st.integers(0, 39)), max_size=20), st.booleans(), st.booleans())
def test_a_dictionary_says_the_same(tmp_path, every, asked, mapped, hashes):
    path = write(tmp_path / "set", every)
    ids = opened(path if hashes else without_hashes(path), use_mmap=mapped)
    oracle = {one: row for row, one in enumerate(every)}
    wanted = [every[one % len(every)] if isinstance(one, int) and every else str(one) for one in asked]
    unknown = [one for one in wanted if one not in oracle]
    if unknown:
        with pytest.raises(UnknownNameError) as caught:
            ids.rows(wanted)
        assert f"the first at position {wanted.index(unknown[0])} of {len(wanted)}" in str(caught.value)
        assert f"{unknown[0]!r:.60}" in str(caught.value)
    known = [one for one in wanted if one in oracle]
    rows = ids.rows(known)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [oracle[one] for one in known]
    assert ids.of(rows) == known
    assert ids.of(range(len(ids))) == every


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("collide", ["all", "some"])
def test_planted_collisions(tmp_path, monkeypatch, collide, at_once):
    """Ids of one hash are told apart by their strings, in batches of any size."""

    def weak(values, lengths):
        return lengths.astype(np.uint64) // (1 << 40 if collide == "all" else 2)

    monkeypatch.setattr(module, "hash_block", weak)
    monkeypatch.setattr("jasper_store.conversion.writer.hash_block", weak)
    monkeypatch.setattr(module, "_PAIRS_AT_ONCE", 5 * at_once)
    monkeypatch.setattr(module, "_IDS_AT_ONCE", 2 * at_once)
    monkeypatch.setattr(module, "_BYTES_AT_ONCE", 7 * at_once)
    every = [*IDS, *(f"id {i}" for i in range(50))]
    ids = opened(write(tmp_path / "set", every))
    assert ids._trusted() is not None
    order = torch.randperm(len(every)).tolist()
    assert ids.rows([every[i] for i in order]).tolist() == order
    assert ids.of(order) == [every[i] for i in order]
    with pytest.raises(UnknownNameError, match=r"found 'id 50', 'c', the first at position 1 of 3"):
        ids.rows(["a", "id 50", "c"])


@pytest.mark.parametrize("pairs", [1, 2, 1 << 20])
@pytest.mark.parametrize("collide", [False, True])
def test_an_id_of_several_rows(tmp_path, monkeypatch, pairs, collide):
    monkeypatch.setattr(module, "_PAIRS_AT_ONCE", pairs)
    if collide:
        for place in ("jasper_store.conversion.writer", "jasper_store.store.ids"):
            monkeypatch.setattr(f"{place}.hash_block", lambda _, lengths: np.zeros(len(lengths), np.uint64))
    ids = opened(write(tmp_path / "set", ["x", "é", "y", "é", "z", "é"]))
    assert ids.rows(["z", "x"]).tolist() == [4, 0]
    with pytest.raises(IntegrityError, match=r"one row with the id 'é', found several: 1, 3") as caught:
        ids.rows(["x", "é"])
    assert caught.value.tensor == "ids"
    assert ids.of([5, 1]) == ["é", "é"]


@pytest.mark.parametrize("fmt", ["safetensors", "npy", "hdf5", "pt"])
@pytest.mark.parametrize("mapped", [True, False])
def test_every_format_and_placement(tmp_path, fmt, mapped):
    ids = opened(write(tmp_path / "set", IDS, fmt), use_mmap=mapped)
    assert repr(ids) == "Ids('ids', 8 ids)"
    assert len(ids) == 8
    assert ids.rows(np.array(["b", "größe"])).tolist() == [7, 1]
    assert ids.of(torch.tensor([7, 7, 2], dtype=torch.int32)) == ["b", "b", ""]
    copy = pickle.loads(pickle.dumps(ids))
    assert copy.rows(("aa",)).tolist() == [6]
    assert copy._trusted() is not None


def test_what_is_no_list_of_ids(tmp_path):
    ids = opened(write(tmp_path / "set", IDS))
    assert ids.rows([]).shape == (0,)
    assert ids.of([]) == []
    with pytest.raises(IncompatibleOptionsError, match="pass it in a list"):
        ids.rows("a")
    with pytest.raises(IntegrityError, match="found a int at position 1"):
        ids.rows(["a", 3])
    with pytest.raises(IntegrityError, match="UTF-8 cannot hold at position 0"):
        ids.rows(["\udc00"])
    for rows, why in (
        ([8], "row 8 at position 0"),
        ([0, -1], "row -1 at position 1"),
        ([[0]], "1-D"),
        ([0.5], "whole"),
    ):
        with pytest.raises(IndexError, match=why):
            ids.of(rows)


def test_many_unknown_ids_are_counted(tmp_path):
    ids = opened(write(tmp_path / "set", IDS))
    with pytest.raises(UnknownNameError, match=r"among its 8, found '0', '1', '2', '3', '4' and 95 more") as caught:
        ids.rows([str(i) for i in range(100)])
    assert caught.value.tensor == "ids"


def test_a_store_without_such_ids(tmp_path):
    with DirectoryWriter(tmp_path / "set") as writer:
        writer.append_ids("ids", IDS)
        writer.append_ragged("words", [[1]])
    store = js.open(tmp_path / "set")
    for name in ("id", "words", "ids.values"):
        with pytest.raises(KeyError, match=f"no strings '{name}' in .*; there are ids"):
            store.ids(name)
    with pytest.raises(KeyError, match=r"holds strings; use store.ids\('ids'\)"):
        store["ids"]
    found = store.ids("ids")
    store.close()
    with pytest.raises(ClosedError):
        store.ids("ids")
    for ask in (lambda: found.rows(["a"]), lambda: found.of([0])):
        with pytest.raises(ClosedError):
            ask()


# ---- hashes that are not those of the ids


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("hashes", np.zeros(8, np.uint64)),
        ("hashes", np.zeros(7, np.uint64)),
        ("hashes", np.zeros(8, np.int64)),
        ("hashes", np.arange(8, dtype=np.uint64)[::-1].copy()),
        ("order", np.full(8, 9)),
        ("order", np.full(8, -1)),
        ("order", np.zeros(8, np.int32)),
    ],
)
def test_hashes_of_something_else_are_computed_anew(tmp_path, part, tensor):
    ids = opened(replace(write(tmp_path / "set", IDS), part, tensor))
    assert ids._trusted() is None
    assert ids.rows(IDS).tolist() == list(range(8))


def test_hashes_of_two_datasets_one_after_another(tmp_path):
    one, two = [f"a{i}" for i in range(400)], ["b0", "b1"]
    write(tmp_path / "one", one)
    write(tmp_path / "two", two)
    path = write(tmp_path / "set", one + two)
    for part, base in (("hashes", 0), ("order", len(one))):
        parts = [js.open(tmp_path / name)[f"ids.{part}"].tensor().numpy() for name in ("one", "two")]
        replace(path, part, np.concatenate([parts[0], parts[1] + np.array(base, parts[1].dtype)]))
    ids = opened(path)
    assert ids.rows(one + two).tolist() == list(range(402))


def test_a_row_that_does_not_exist_behind_the_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SAMPLED", 1)
    path = write(tmp_path / "set", IDS)
    order = js.open(path)["ids.order"].tensor().numpy().copy()
    order[1:] = 99
    ids = opened(replace(path, "order", order))
    with pytest.raises(IntegrityError, match=r"a row outside of \[0, 8\)"):
        ids.rows(IDS)


# ---- damage


@pytest.mark.parametrize(
    ("offsets", "why"),
    [
        ([0, 2, 5], "the last id ends at byte 5 of 4"),
        ([0, 3, 2, 4], "row 1 is said to be -1 bytes from 3"),
        ([-1, 2, 4], "row 0 is said to be 3 bytes from -1"),
        ([0, 9, 4], "row 0 is said to be 9 bytes from 0"),
    ],
)
def test_offsets_that_are_no_offsets(tmp_path, offsets, why):
    path = write(tmp_path / "set", ["ab", "cd"])
    without_hashes(path)
    replace(path, "offsets", np.array(offsets))

    def look():
        ids = opened(path)
        with pytest.raises(IntegrityError, match=why):
            ids.of(range(len(ids)))
        ids.rows(["ab"])

    with pytest.raises(IntegrityError, match=why):
        look()


def test_an_id_that_claims_a_terabyte(tmp_path):
    """A chunked dataset that was never written may claim any size, and its file has some kilobytes."""
    with h5py.File(tmp_path / "dataset.h5", "w") as file:
        file.create_dataset("ids.values", shape=(1 << 40,), dtype="u1", chunks=(1 << 20,))
        file["ids.offsets"] = np.array([0, 1 << 40])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerformanceWarning)
        ids = opened(tmp_path, use_mmap=True)
    for ask in (lambda: ids.of([0]), lambda: ids.rows(["a"])):
        with pytest.raises(IntegrityError, match="row 0 is said to be 1099511627776 bytes"):
            ask()


def test_more_ids_than_can_be_sorted(tmp_path):
    with h5py.File(tmp_path / "dataset.h5", "w") as file:
        file["ids.values"] = np.empty(0, "u1")
        file.create_dataset("ids.offsets", shape=(1 << 50,), dtype="i8", chunks=(1 << 17,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerformanceWarning)
        ids = opened(tmp_path, use_mmap=True)
    assert ids.of([5, 1 << 40]) == ["", ""]
    with pytest.raises(InsufficientMemoryError, match=r"the hashes of 1,125,899,906,842,623 ids are not there"):
        ids.rows(["a"])


def test_bytes_that_are_no_utf8(tmp_path):
    path = replace(write(tmp_path / "set", ["ab", "cd"]), "values", np.array([97, 98, 255, 100], np.uint8))
    ids = opened(path)
    assert ids.of([0]) == ["ab"]
    with pytest.raises(IntegrityError, match="row 1 is no UTF-8"):
        ids.of([0, 1])


# ---- many


def test_a_lookup_makes_no_object_for_each_id(tmp_path):
    """Of 200 000 ids, a lookup of ten holds what the ten take; also where the hashes have to be computed: 16 bytes each."""
    n = 200_000
    path = write(tmp_path / "set", [f"document {i}" for i in range(n)])
    wanted = [f"document {i}" for i in range(0, n, n // 10)]
    for hashes, limit in ((True, 1 << 20), (False, 24 * n)):
        ids = opened(path if hashes else without_hashes(path), use_mmap=True)
        tracemalloc.start()
        try:
            assert ids.rows(wanted).tolist() == list(range(0, n, n // 10))
            assert ids.of(ids.rows(wanted)) == wanted
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < limit
