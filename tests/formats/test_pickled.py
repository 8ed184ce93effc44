from __future__ import annotations

import os
import pickle
import struct
import time

import numpy as np
import pytest
import torch

import jasper_store as js
from jasper_store.errors import CorruptFileError, DatasetNotFoundError
from jasper_store.formats.base import Extent, Schema
from jasper_store.formats.pickled import PickleFormat
from jasper_store.formats.registry import locate
from tests.formats import damage
from tests.formats.confined import open_confined
from tests.formats.conformance import read, same

ROWS = np.random.default_rng(0).standard_normal((50, 12), dtype=np.float32)
IDS = [f"doc {i}" for i in range(50)]
PROTOCOLS = (3, 4, 5)


def dump(path, value, protocol=4):
    with path.open("wb") as file:
        pickle.dump(value, file, protocol)
    return path


def specs_of(path):
    return {spec.name: spec for spec in PickleFormat().locate(path, Schema())}


def skipped(path):
    return {one.name: one.reason for one in PickleFormat().skipped(path, Schema())}


def values_of(spec):
    """Values that need not be aligned."""
    assert isinstance(spec.location, Extent)
    raw = np.fromfile(spec.path, np.uint8, spec.nbytes, offset=spec.location.offset)
    flat = torch.from_numpy(raw).view(spec.dtype) if len(raw) else torch.empty(0, dtype=spec.dtype)
    return flat.as_strided(spec.shape, spec.location.strides or torch.empty(spec.shape, device="meta").stride())


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("rows", [ROWS, np.tile(ROWS, (1000, 1)), ROWS.astype(np.float16), ROWS[:0]])
def test_what_tevatron_writes(tmp_path, protocol, rows):
    # Small arrays lie inside a frame, large ones between two.
    path = dump(tmp_path / "corpus.pkl", (rows, IDS), protocol)
    (spec,) = specs_of(path).values()
    assert spec.name == "corpus"
    assert same(values_of(spec), torch.from_numpy(rows.copy()))
    assert skipped(path).keys() == {"corpus.ids"}
    assert read(spec).shape == rows.shape


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int64", "float64", "complex64"])
def test_arrays(tmp_path, protocol, dtype):
    values = (ROWS * 9).astype(dtype)
    for array in (values, np.asfortranarray(values), values[::2, ::3], values[0], values[0, 0:1].reshape(())):
        (spec,) = specs_of(dump(tmp_path / "x.pickle", array, protocol)).values()
        assert same(values_of(spec), torch.from_numpy(np.array(array)))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tuples_and_dictionaries(tmp_path, protocol):
    numbers, words = np.arange(50), np.array(["a", "b"])
    path = dump(tmp_path / "x.pkl", (ROWS, numbers, words, None), protocol)
    assert {
        name: same(values_of(spec), torch.from_numpy(v))
        for (name, spec), v in zip(specs_of(path).items(), (ROWS, numbers), strict=True)
    } == {"x": True, "x.1": True}
    assert skipped(path) == {"x.2": "an array of strings or objects", "x.3": "None"}
    objects = np.array([None, {}], dtype=object)
    path = dump(tmp_path / "x.pkl", {"emb": ROWS, "again": ROWS, "ids": IDS, "n": numbers, "o": objects}, protocol)
    specs = specs_of(path)
    assert list(specs) == ["emb", "again", "n"]
    assert same(values_of(specs["again"]), torch.from_numpy(ROWS))
    assert skipped(path) == {"ids": "a list of 50", "o": "an array of strings or objects"}


def test_ids_of_millions_are_not_looked_at(tmp_path):
    path = dump(tmp_path / "x.pkl", (ROWS, [f"{i:020}" for i in range(2_000_000)]))
    assert path.stat().st_size > 40 << 20
    started = time.process_time()
    assert list(specs_of(path)) == ["x"]
    assert skipped(path) == {"x.ids": "a list beside the array"}
    # Half a minute if each were read.
    assert time.process_time() - started < 1


def test_numbers_of_numpy_among_ids(tmp_path):
    path = dump(tmp_path / "x.pkl", (ROWS, tuple(np.int64(i) for i in range(3))))
    assert list(specs_of(path)) == ["x"]
    assert skipped(path) == {"x.ids": "a tuple of 3"}


@pytest.mark.filterwarnings("ignore:.*is skipped:jasper_store.errors.JasperStoreWarning")
def test_a_store_and_a_conversion(tmp_path):
    path = dump(tmp_path / "corpus.pkl", (ROWS, IDS))
    for place in (path, tmp_path):
        with js.open(place) as store:
            assert np.array_equal(store["corpus"].take([49, 0]).numpy(), ROWS[[49, 0]])
    js.convert(path, tmp_path / "out")
    spec = next(spec for spec in locate(tmp_path / "out", "safetensors", Schema()).specs if spec.name == "corpus")
    assert same(read(spec), torch.from_numpy(ROWS))
    with js.open(tmp_path / "out") as store:
        assert store.ids("corpus.ids").of(range(50)) == list(map(str, IDS))


# ---- what is refused


class Harm:
    def __init__(self, where):
        self.where = where

    def __reduce__(self):
        return os.mkdir, (str(self.where),)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_is_executed(tmp_path, protocol):
    for value in (Harm(tmp_path / "done"), (Harm(tmp_path / "done"), IDS), {"a": ROWS, "b": Harm(tmp_path / "done")}):
        path = dump(tmp_path / "x.pkl", value, protocol)
        with pytest.raises(CorruptFileError, match=r"none is ever executed: it asks for posix\.mkdir"):
            specs_of(path)
    # What comes behind the array of a pair is not even looked at.
    path = dump(tmp_path / "x.pkl", (ROWS, [Harm(tmp_path / "done")]), 4)
    assert list(specs_of(path)) == ["x"]
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([], "an array, (array, ids) or a dictionary of arrays was expected, found a list of 0"),
        ([("id", ROWS)], "found a list of 1"),
        ("text", "found 'text'"),
        (3, "found 3"),
        (ROWS.astype(">f4"), "has the dtype '>f4', which torch has not"),
        (ROWS.astype(np.longdouble), "has the dtype '<f16', which torch has not"),
        ({3: ROWS}, "needs texts as keys"),
        ({"n" * 5000: ROWS}, "a name of 5000 characters"),
    ],
)
def test_what_is_no_array(tmp_path, value, found):
    with pytest.raises(CorruptFileError) as caught:
        specs_of(dump(tmp_path / "x.pkl", value))
    assert found in str(caught.value)


def test_strings_alone(tmp_path):
    path = dump(tmp_path / "x.pkl", np.array(["a", "b"]))
    with pytest.raises(DatasetNotFoundError, match=r"x \(an array of strings or objects\)"):
        locate(path, "auto", Schema())


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_protocols_that_hold_arrays_as_texts(tmp_path, protocol):
    with pytest.raises(CorruptFileError, match=r"(no pickle of protocol 2 or later|_codecs\.encode).*numpy\.save"):
        specs_of(dump(tmp_path / "x.pkl", ROWS, protocol))


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x04.", b"\x80\x04]", b"x" * 1000, b"\x80\x04" + b"0" * 10])
def test_what_is_no_pickle(tmp_path, content):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"x\.pkl"):
        specs_of(tmp_path / "x.pkl")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_array_of_another_size_than_its_shape(tmp_path, protocol):
    path = dump(tmp_path / "x.pkl", ROWS, protocol)
    raw = path.read_bytes()
    assert raw.count(b"K\x32K\x0c") == 1
    path.write_bytes(raw.replace(b"K\x32K\x0c", b"K\x32K\x0d"))
    with pytest.raises(CorruptFileError, match=r"shape \[50, 13\] needs 2600 bytes, found 2400"):
        specs_of(path)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", [(ROWS[:5], IDS[:5]), {"a": ROWS[:5], "ids": IDS[:5]}])
def test_any_damage(tmp_path, protocol, value):
    path = dump(tmp_path / "x.pkl", value, protocol)
    outcomes = damage.run("pickle", path, tmp_path, protocol, 600)
    assert outcomes["cut refused"] > 590
    assert outcomes["flip refused"] > 50


def test_hostile_pickles_take_neither_time_nor_memory(tmp_path):
    head = b"\x80\x04"
    files = {
        "deep": head + b"]" * 1_000_000 + b"a" * 999_999 + b".",
        "marks": head + b"(" * (5 << 20) + b".",
        "twice": head + b")" + b"\x94h\x00\x86" * 100_000 + b".",
        "bytes": head + b"\x8e" + struct.pack("<Q", 2**63) + b"x" * (1 << 20),
        "text": head + b"X" + struct.pack("<I", 2**32 - 1) + b"x" * (1 << 20),
        "name": head + b"c" + b"n" * (50 << 20) + b"\n.",
    }
    paths = []
    for name, content in files.items():
        paths.append(tmp_path / f"{name}.pkl")
        paths[-1].write_bytes(content)
    for name, outcome in open_confined("pickle", paths, seconds=20, nbytes=2 << 30).items():
        assert outcome.what == "refused", (name, outcome)
        # A list of nothing takes 56 bytes, of which its instruction is one.
        assert outcome.grown < 80 * min(len(files[name]), 4 << 20), (name, outcome)


def test_other_pickles_beside_a_dataset_are_skipped(tmp_path):
    np.save(tmp_path / "emb.npy", ROWS)
    dump(tmp_path / "vocabulary.pkl", {"a": 1})
    dump(tmp_path / "model.pkl", Harm(tmp_path / "done"))
    located = locate(tmp_path, "auto", Schema())
    assert [spec.name for spec in located.specs] == ["emb"]
    assert {one.path.name for one in located.skipped} == {"vocabulary.pkl", "model.pkl"}
