"""Headers made up by hypothesis: whatever is accepted lies within the file, and the peer library accepts it too."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, strategies as st

from jasper_store.errors import CorruptFileError
from jasper_store.formats.base import Schema
from jasper_store.formats.npy import NpyFormat
from jasper_store.formats.registry import FORMATS
from jasper_store.formats.safetensors import MAX_HEADER, SafetensorsFormat
from tests.formats import damage
from tests.formats.confined import open_confined
from tests.formats.conformance import read, relaxed, same, write

numbers = st.sampled_from(
    [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, -1, -4, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 2**70]
)
anything: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})
)
small = st.integers(0, 4)


def mostly(good, bad):
    """Sound parts most of the time, so that a header is wrong in one place and not in all."""
    return st.integers(0, 30).flatmap(lambda i: bad if i == 13 else good)


entries = st.fixed_dictionaries(
    {
        "dtype": mostly(st.sampled_from(["F32", "BF16", "I64", "BOOL", "U8", "F8_E5M2"]), anything | st.just("F4")),
        "shape": mostly(st.lists(small, max_size=3), st.lists(numbers | anything, max_size=3) | anything),
        "data_offsets": mostly(st.tuples(small, small), st.lists(numbers | anything, max_size=3) | anything),
    }
)
headers = st.dictionaries(
    st.sampled_from(["a", "b", "c", "", "../x", "__metadata__"]), mostly(entries, anything), max_size=4
)


def laid_out(header):
    """Give sound entries the offsets that they need, one after another, so that many headers are accepted."""
    sizes = {"F32": 4, "BF16": 2, "I64": 8, "BOOL": 1, "U8": 1, "F8_E5M2": 1}
    at = 0
    for name, entry in header.items():
        if name != "__metadata__" and isinstance(entry, dict) and isinstance(entry.get("data_offsets"), tuple):
            shape, dtype = entry.get("shape"), entry.get("dtype")
            if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 100 for n in shape):
                continue
            if isinstance(dtype, str) and dtype in sizes:
                n = math.prod(shape) * sizes[dtype]
                entry["data_offsets"] = [at, at + n]
                at += n
    return at


def write_safetensors(path, header: bytes, data: bytes, length=None):
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def refused_or_sound(path):
    """Ours accepts no more than the library itself does."""
    if damage.opened("safetensors", path) == "refused":
        return
    theirs = dict(safetensors.deserialize(path.read_bytes()))
    found = SafetensorsFormat().locate(path, Schema())
    assert len(theirs) == len(found)
    for spec in found:
        entry = theirs[spec.name] if spec.name in theirs else next(iter(theirs.values()))
        assert list(spec.shape) == entry["shape"]
        assert bytes(read(spec).reshape(-1).view(torch.uint8).tolist()) == bytes(entry["data"])


@relaxed
@given(headers, st.booleans(), st.integers(-2, 2))
def test_safetensors_headers(tmp_path, header, lay_out, more):
    nbytes = laid_out(header) if lay_out else 8
    write_safetensors(
        tmp_path / "x.safetensors", json.dumps(header).encode(), bytes(max(0, nbytes + more * (more > 1)))
    )
    refused_or_sound(tmp_path / "x.safetensors")


@relaxed
@given(st.binary(max_size=80), numbers)
def test_safetensors_of_any_bytes(tmp_path, header, length):
    path = tmp_path / "x.safetensors"
    for text in (header, b"{" + header, b"{}" + header):
        write_safetensors(path, text, b"")
        refused_or_sound(path)
        write_safetensors(path, text, b"", length % 2**64)
        refused_or_sound(path)


F32 = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (f'{{"a":{F32},"a":{F32}}}', "occurs twice"),
        ('{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "occurs twice"),
        (f'{{"a":{F32},"b":{F32}}}', "overlaps"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "hole"),
        ('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', "needs 12 bytes"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "take 4 bytes, the file holds 8"),
        ('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "truncated"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}', "needs 8 bytes"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}', "needs 8 bytes"),
        ('{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', "whole number"),
        ('{"a":{"dtype":"F32","shape":[true,2],"data_offsets":[0,8]}}', "whole number"),
        ('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', "whole number"),
        ('{"a":{"dtype":"F32","shape":[0,4611686018427387904,4],"data_offsets":[0,0]}}', "64 bits"),
        ('{"a":{"dtype":"F32","shape":2,"data_offsets":[0,8]}}', "must be a list"),
        ('{"a":{"dtype":"F16x","shape":[2],"data_offsets":[0,8]}}', "unknown dtype"),
        ('{"a":{"dtype":["F32"],"shape":[2],"data_offsets":[0,8]}}', "unknown dtype"),
        ('{"a":{"shape":[2],"data_offsets":[0,8]}}', "must have dtype"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":1}}', "must have dtype"),
        ('{"a":[]}', "must have dtype"),
        (f'{{"__metadata__":{{"a":1}},"a":{F32}}}', "__metadata__"),
        (f'{{"__metadata__":[],"a":{F32}}}', "__metadata__"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"a":' + "9" * 5000 + "}", "JSON"),
        ('{"a":NaN}', "NaN is not JSON"),
        ("[]", "must begin with"),
        (" " + f'{{"a":{F32}}}', "must begin with"),
        (f'{{"a":{F32}', "JSON"),
        ('{"\udcff":1}', "JSON"),
    ],
)
def test_safetensors_headers_that_are_wrong_in_one_way(tmp_path, header, why):
    write_safetensors(tmp_path / "x.safetensors", header.encode("utf-8", "surrogateescape"), bytes(8))
    with pytest.raises(CorruptFileError, match=why):
        SafetensorsFormat().locate(tmp_path / "x.safetensors", Schema())


def test_a_header_longer_than_the_specification_allows(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little") + b"{")
        file.truncate(200_000_000)
    with pytest.raises(CorruptFileError, match="header"):
        SafetensorsFormat().locate(path, Schema())


def test_a_safetensors_header_longer_than_any_that_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, b"{}".ljust(MAX_HEADER + 1), b"")
    with pytest.raises(CorruptFileError, match=f"at most {MAX_HEADER} are read"):
        SafetensorsFormat().locate(path, Schema())
    # The longest, of what takes most memory when it is parsed.
    empty = b'{"a":[' + b"{}," * ((MAX_HEADER - 20) // 3) + b"{}]}"
    write_safetensors(path, empty.ljust(MAX_HEADER), b"")
    (outcome,) = open_confined("safetensors", [path], seconds=20, nbytes=2 << 30).values()
    assert outcome.what == "refused"
    assert outcome.grown < 40 * MAX_HEADER


@pytest.mark.parametrize("name", FORMATS)
def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch, name):
    path = tmp_path / f"x{FORMATS[name].suffixes[0]}"
    writer = FORMATS[name].writer(path, Schema())
    write(writer, "x", torch.ones(3))
    writer.close()

    def fail(file, offset, nbytes):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for module in ("files", "npy", "safetensors", "pt.format", "hdf5.raw"):
        monkeypatch.setattr(f"jasper_store.formats.{module}.read_at", fail)
    with pytest.raises(CorruptFileError, match="Input/output error") as caught:
        FORMATS[name].locate(path, Schema())
    assert str(path) in str(caught.value)
    assert caught.value.path == path


descriptions = mostly(
    st.sampled_from(["<f4", "|b1", "<i8", "<V2", "|u1"]),
    st.sampled_from(["|O", ">f4", "<U3", "f4", "<f16", "<V3", "<M8[s]", "(2,)f4", "i4,i4", "|S0"])
    | st.just([("bfloat16", "<u2")])
    | st.just([("a", "<f4"), ("b", "O")])
    | anything,
)
shapes = mostly(st.lists(small, max_size=3).map(tuple), st.lists(numbers | anything, max_size=3).map(tuple) | anything)


def write_npy(path, text: str, data: bytes, version: int = 1):
    raw = text.encode("utf-8", "replace")
    length = struct.pack("<H" if version == 1 else "<I", len(raw))
    path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + length + raw + data)


@relaxed
@given(descriptions, mostly(st.booleans(), anything), shapes, st.integers(0, 70), st.integers(1, 3))
def test_npy_headers(tmp_path, description, fortran, shape, nbytes, version):
    path = tmp_path / "x.npy"
    header = {"descr": description, "fortran_order": fortran, "shape": shape}
    # Half of the time the data fits what is claimed.
    try:
        nbytes = int(np.prod(shape)) * np.dtype(description).itemsize if nbytes % 2 else nbytes
    except (TypeError, ValueError, OverflowError, SyntaxError):
        nbytes = 8
    write_npy(path, repr(header), bytes(nbytes if 0 <= nbytes <= 1000 else 8), version)
    if damage.opened("npy", path) == "opened":
        specs = NpyFormat().locate(path, Schema())
        if not specs:
            assert len(NpyFormat().skipped(path, Schema())) == 1
            return
        (spec,) = specs
        theirs = np.load(path, allow_pickle=False)
        if spec.dtype == torch.bfloat16:
            theirs = theirs.view("<u2")
        bits = torch.from_numpy(np.array(theirs, order="C").reshape(spec.shape))
        assert same(read(spec).contiguous(), bits.view(torch.bfloat16) if spec.dtype == torch.bfloat16 else bits)


@relaxed
@given(st.text(alphabet="{}[](),:'\" \nadescrfotnhp_0123456789<TrueFalse-~*", max_size=60))
def test_npy_of_any_text(tmp_path, text):
    write_npy(tmp_path / "x.npy", text, bytes(8))
    damage.opened("npy", tmp_path / "x.npy")


@pytest.mark.parametrize(
    "text",
    [
        "(" * 9000,
        "{" * 9000,
        "-" * 9000 + "1",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'shape': (3,), 'more': 1}",
        "{'descr': __import__('os').system('x'), 'fortran_order': False, 'shape': (2,)}",
        "{'descr': '<f4', 'fortran_order': 0, 'shape': (2,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': [2]}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -1)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4611686018427387904, 4)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0x" + "9" * 5000 + ",)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 0x" + "9" * 5000 + "}",
        "{'descr': 0x" + "9" * 5000 + ", 'fortran_order': False, 'shape': (2,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 0x" + "9" * 5000 + ": 1}",
        "{'descr': 'a5', 'fortran_order': False, 'shape': (2,)}",
        "{'descr': '(1,)f4', 'fortran_order': False, 'shape': (2,)}",
        "{'descr': '" + "f4," * 3000 + "', 'fortran_order': False, 'shape': (2,)}",
        "{'descr': '<f99999999999999999999', 'fortran_order': False, 'shape': (2,)}",
        " " * 20_000,
        "\0",
        "",
    ],
    ids=lambda text: f"{text[:20]}{len(text)}",
)
def test_npy_headers_that_are_wrong_in_one_way(tmp_path, text):
    write_npy(tmp_path / "x.npy", text, bytes(8))
    with pytest.raises(CorruptFileError):
        NpyFormat().locate(tmp_path / "x.npy", Schema())
