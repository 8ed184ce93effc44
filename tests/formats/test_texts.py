"""Strings in files: skipped as tensors, and read as the UTF-8 that Python would make of them."""

from __future__ import annotations

import os

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from jasper_store.errors import CorruptFileError, IntegrityError
from jasper_store.formats import texts as module
from jasper_store.formats.base import Schema, TensorSpec
from jasper_store.formats.hdf5.format import Hdf5Format
from jasper_store.formats.npy import NpyFormat
from jasper_store.formats.pt.format import PtFormat
from jasper_store.formats.registry import locate
from jasper_store.formats.texts import SkippedMemo, encode, encode_bytes, encode_unicode, text_names, text_parts
from tests.formats.conformance import relaxed

IDS = ["a", "größe", "", "日本語", "😀 x", "a\0b", "é" * 40]
NONE = Schema()

# What numpy's fixed width can hold: it takes zeros at the end for padding.
strings = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6).map(lambda text: text.rstrip("\0")))


def joined(blocks):
    """All strings of some blocks."""
    found = []
    for values, lengths in blocks:
        raw, at = values.tobytes(), 0
        for length in lengths.tolist():
            found.append(raw[at : at + length].decode())
            at += length
        assert at == len(raw)
    return found


@given(strings)
def test_unicode_as_python_encodes_it(rows):
    width = max(map(len, rows), default=1) or 1
    codes = np.array(rows, dtype=f"<U{width}").view("<u4").reshape(len(rows), width)
    assert joined([encode_unicode("x", codes, 0)]) == rows == joined([encode("x", rows)])


@given(strings)
def test_bytes_as_they_are(rows):
    width = max((len(row.encode()) for row in rows), default=1) or 1
    raw = np.array([row.encode() for row in rows], dtype=f"S{width}").view(np.uint8).reshape(len(rows), width)
    assert joined([encode_bytes("x", raw, 0)]) == rows


@pytest.mark.parametrize("code", [0xD800, 0xDFFF, 0x110000, 0xFFFFFFFF])
def test_numbers_that_are_no_characters(code):
    with pytest.raises(IntegrityError, match="row 11 is no text"):
        encode_unicode("x", np.array([[97, 0], [98, code]], np.uint32), 10)


@pytest.mark.parametrize("rows", [[b"ok", b"\xff"], [b"\xc3", b"\xa9"], [b"o\xc3", b"\xa9"]])
def test_bytes_that_are_no_utf8(rows):
    """Also where two rows together would be: a string ends with its own characters."""
    wrong = next(i for i, row in enumerate(rows) if row.decode(errors="replace").encode() != row)
    with pytest.raises(IntegrityError, match=f"row {7 + wrong} is no text"):
        encode_bytes("x", np.array(rows).view(np.uint8).reshape(len(rows), -1), 7)


@pytest.mark.parametrize(
    ("rows", "why"), [(["a", 3], "a int at position 6"), (["\ud800"], "UTF-8 cannot hold at position 5")]
)
def test_what_is_no_string(rows, why):
    with pytest.raises(IntegrityError, match=why):
        encode("x", rows, 5)


def columns(fmt, path):
    return {texts.name: joined(texts.blocks()) for texts in fmt.texts(path, NONE)}


@relaxed
@given(strings, st.sampled_from(["<U", ">U", "S"]))
def test_npy(tmp_path, rows, kind):
    array = np.array([row.encode() for row in rows] if kind == "S" else rows, dtype=kind if rows else f"{kind}1")
    np.save(tmp_path / "ids.npy", array)
    expected = {"ids": rows} if array.dtype.itemsize else {}
    assert columns(NpyFormat(), tmp_path / "ids.npy") == expected
    assert len(NpyFormat().skipped(tmp_path / "ids.npy", NONE)) == 1


@pytest.mark.parametrize(
    "rows",
    [IDS, [], ["a"] * 300, ["a", 1], ["a", None], [b"a"], [["a"], ["b"]], [np.str_("a")], [{"a": 1}, "b"]],
    ids=repr,
)
def test_npy_of_objects(tmp_path, rows):
    array = np.empty(len(rows), dtype=object)
    array[:] = rows
    np.save(tmp_path / "ids.npy", array, allow_pickle=True)
    strings = all(type(row) is str for row in rows)
    assert columns(NpyFormat(), tmp_path / "ids.npy") == ({"ids": rows} if strings else {})
    assert "pickled Python objects" in NpyFormat().skipped(tmp_path / "ids.npy", NONE)[0].reason


def test_npy_of_objects_executes_nothing(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    array = np.empty(2, dtype=object)
    array[:] = ["a", Harmful()]
    np.save(tmp_path / "ids.npy", array, allow_pickle=True)
    assert NpyFormat().texts(tmp_path / "ids.npy", NONE) == []
    np.save(tmp_path / "ids.npy", np.array(["x" * 100_000] * 10_000, dtype=object), allow_pickle=True)
    assert (tmp_path / "ids.npy").stat().st_size < 1 << 18
    assert NpyFormat().texts(tmp_path / "ids.npy", NONE) == []
    assert not (tmp_path / "made").exists()


def test_npy_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("jasper_store.formats.npy.BLOCK_NBYTES", 64)
    rows = [f"{i}é" for i in range(100)]
    np.save(tmp_path / "ids.npy", np.array(rows))
    (texts,) = NpyFormat().texts(tmp_path / "ids.npy", NONE)
    assert len(list(texts.blocks())) > 10
    assert joined(texts.blocks()) == joined(texts.blocks()) == rows


def test_npy_of_nothing_takes_no_memory(tmp_path):
    """A small file may claim any number of strings that have no characters."""
    header = repr({"descr": "<U0", "fortran_order": False, "shape": (2**60,)}).ljust(118).encode()
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    assert NpyFormat().texts(tmp_path / "x.npy", NONE) == []
    assert "shape [1152921504606846976]" in NpyFormat().skipped(tmp_path / "x.npy", NONE)[0].reason


def test_npy_that_was_cut(tmp_path):
    np.save(tmp_path / "x.npy", np.array(IDS))
    data = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(data[:-4])
    for ask in (NpyFormat().skipped, NpyFormat().texts):
        with pytest.raises(CorruptFileError, match="truncated"):
            ask(tmp_path / "x.npy", NONE)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pt(tmp_path, protocol):
    path = tmp_path / "x.pt"
    saved = {"t": torch.ones(2), "ids": IDS, "title": "one", "pair": ("a", "b"), "mixed": ["a", 1], "n": 3}
    torch.save(saved, path, pickle_protocol=protocol)
    assert {spec.name for spec in PtFormat().locate(path, NONE)} == {"t", "n"}
    reasons = {skip.name: skip.reason for skip in PtFormat().skipped(path, NONE)}
    assert reasons.keys() == {"ids", "title", "pair", "mixed"}
    assert "'one'" in reasons["title"]
    assert columns(PtFormat(), path) == {"ids": IDS, "pair": ["a", "b"]}
    torch.save(IDS, path)
    assert columns(PtFormat(), path) == {"x": IDS}


def test_pt_that_repeats_one_long_text(tmp_path):
    torch.save(["x" * 100_000] * 10_000, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 1 << 18
    with pytest.raises(CorruptFileError, match="repeats rows"):
        PtFormat().texts(tmp_path / "x.pt", NONE)


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("options", [{}, {"chunks": (2,)}, {"chunks": (3,), "compression": "gzip", "shuffle": True}])
def test_hdf5(tmp_path, libver, options):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", libver=libver) as file:
        file["t"] = [1.0]
        file.create_dataset("ids", data=IDS[:5], dtype=h5py.string_dtype(), **options)
        file.create_dataset("group/fixed", data=np.array([text.encode() for text in IDS]), **options)
        file["one"] = "text"
    assert [spec.name for spec in Hdf5Format().locate(path, NONE)] == ["t"]
    assert {skip.name for skip in Hdf5Format().skipped(path, NONE)} == {"ids", "group/fixed", "one"}
    assert columns(Hdf5Format(), path) == {"ids": IDS[:5], "group/fixed": IDS}


def test_hdf5_names_follow_the_schema(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["data/ids"] = ["a"]
    named = Schema(hdf5_paths={"ids": "data/ids"})
    for schema, name in ((NONE, "data/ids"), (named, "ids"), (NONE, "data/ids")):
        assert [skip.name for skip in Hdf5Format().skipped(tmp_path / "x.h5", schema)] == [name]


def test_what_was_skipped_is_asked_for_without_parsing_again(tmp_path, monkeypatch):
    torch.save({"t": torch.ones(2), "title": "one"}, tmp_path / "x.pt")
    PtFormat().locate(tmp_path / "x.pt", NONE)
    with monkeypatch.context() as patch:
        patch.setattr("jasper_store.formats.pt.format._read", lambda *_: pytest.fail("parsed again"))
        assert [skip.name for skip in PtFormat().skipped(tmp_path / "x.pt", NONE)] == ["title"]
    torch.save({"t": torch.ones(2), "another": "one"}, tmp_path / "x.pt")
    assert [skip.name for skip in PtFormat().skipped(tmp_path / "x.pt", NONE)] == ["another"]


def test_the_memo_is_bounded(tmp_path):
    memo = SkippedMemo()
    for i in range(2 * module._REMEMBERED):
        memo.put(i + 1, [])
    assert len(memo._known) == module._REMEMBERED
    assert memo.key(tmp_path / "none") is None


def test_what_marks_a_text(tmp_path):
    def spec(name, dtype, *shape):
        np.save(tmp_path / f"{name}.npy", np.zeros(shape, dtype))
        return NpyFormat().locate(tmp_path / f"{name}.npy", NONE)[0]

    specs: list[TensorSpec] = [
        spec("ids.values", "u1", 5),
        spec("ids.offsets", "i8", 3),
        spec("words.values", "i8", 5),
        spec("words.offsets", "i8", 3),
        spec("alone.values", "u1", 5),
        spec("flat.values", "u1", 5, 1),
        spec("flat.offsets", "i8", 3),
        spec("none.values", "u1", 0),
        spec("none.offsets", "i8", 0),
    ]
    assert text_names(specs) == {"ids"}
    assert text_parts(specs) == {"ids.values", "ids.offsets", "ids.hashes", "ids.order"}
    assert len(locate(tmp_path, "npy", NONE).specs) == len(specs)
