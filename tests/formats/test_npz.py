from __future__ import annotations

import io
import struct
import zipfile

import numpy as np
import pytest
import torch

import jasper_store as js
from jasper_store.errors import CorruptFileError, DatasetNotFoundError
from jasper_store.formats.base import Extent, Schema, Streamed
from jasper_store.formats.npz import NpzFormat
from jasper_store.formats.registry import locate
from jasper_store.formats.streams import ByteStream
from tests.formats import damage
from tests.formats.confined import open_confined
from tests.formats.conformance import read, same

RNG = np.random.default_rng(0)
ARRAYS = {
    "emb": RNG.standard_normal((300, 48), dtype=np.float32),
    "labels": np.arange(300),
    "half": RNG.standard_normal((5, 2, 3)).astype(np.float16),
    "flags": np.arange(300) % 3 == 0,
    "scalar": np.float64(2.5),
    "none": np.empty((0, 3), np.int8),
}


def specs_of(path):
    return {spec.name: spec for spec in NpzFormat().locate(path, Schema())}


def streamed(spec, block=7):
    out = torch.empty(spec.shape, dtype=spec.dtype)
    stream = ByteStream(spec)
    for part in out.split(block) if out.ndim else [out]:
        stream.fill(part)
    stream.close()
    return out


def test_what_is_stored_lies_in_place(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **ARRAYS, fortran=np.asfortranarray(ARRAYS["emb"]))
    specs = specs_of(path)
    assert list(specs) == [*ARRAYS, "fortran"]
    for name, values in {**ARRAYS, "fortran": ARRAYS["emb"]}.items():
        assert isinstance(specs[name].location, Extent)
        assert same(read_anywhere(specs[name]), torch.from_numpy(np.ascontiguousarray(values)).reshape(values.shape))


def read_anywhere(spec):
    """As ``read``, of values that need not be aligned."""
    place = spec.location
    raw = place.path.read_bytes()[place.offset :]
    aligned = np.frombuffer(raw[: spec.nbytes], np.uint8).copy()
    flat = torch.from_numpy(aligned).view(spec.dtype) if len(aligned) else torch.empty(0, dtype=spec.dtype)
    return flat.as_strided(spec.shape, place.strides or torch.empty(spec.shape, device="meta").stride())


def test_what_is_deflated_is_a_stream(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, **ARRAYS)
    for name, spec in specs_of(path).items():
        assert isinstance(spec.location, Streamed)
        assert same(streamed(spec), torch.from_numpy(np.asarray(ARRAYS[name])))


def test_an_only_array_is_named_by_its_file(tmp_path):
    np.savez(tmp_path / "passages.npz", ARRAYS["emb"])
    assert list(specs_of(tmp_path / "passages.npz")) == ["passages"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("target", ["safetensors", "npy", "hdf5", "pt"])
def test_conversion(tmp_path, save, target):
    save(tmp_path / "x.npz", **ARRAYS)
    js.convert(tmp_path / "x.npz", tmp_path / "out", format=target)
    specs = locate(tmp_path / "out", target, Schema()).specs
    assert {spec.name for spec in specs} == ARRAYS.keys()
    for spec in specs:
        assert same(read(spec), torch.from_numpy(np.asarray(ARRAYS[spec.name])))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_store_serves_it(tmp_path, save):
    save(tmp_path / "x.npz", **ARRAYS)
    with js.open(tmp_path / "x.npz") as store:
        assert np.array_equal(store["emb"].take([7, 0, 299]).numpy(), ARRAYS["emb"][[7, 0, 299]])
    with js.open(tmp_path) as store:
        assert np.array_equal(store["labels"].take([7, 299]).numpy(), [7, 299])


def test_strings_and_objects_are_skipped(tmp_path):
    path = tmp_path / "x.npz"
    objects = np.array([{"a": 1}, None], dtype=object)
    fields = np.zeros(3, [("a", "<f4"), ("b", "<i8")])
    np.savez(path, emb=ARRAYS["emb"], ids=np.array(["a", "b"]), raw=np.array([b"a"]), objects=objects, fields=fields)
    located = locate(path, "auto", Schema())
    assert [spec.name for spec in located.specs] == ["x"]
    reasons = {one.name: one.reason for one in located.skipped}
    assert reasons.keys() == {"ids", "raw", "objects", "fields"}
    assert reasons["ids"] == "an array of strings"
    assert "never executed" in reasons["objects"]
    np.savez(path, objects=objects)
    with pytest.raises(DatasetNotFoundError, match="pickled Python objects, which are never executed"):
        locate(path, "auto", Schema())


def test_numbers_that_cannot_be_read_are_errors(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, big=np.arange(3, dtype=">i4"))
    with pytest.raises(CorruptFileError, match="big-endian"):
        specs_of(path)
    np.savez_compressed(path, emb=np.asfortranarray(ARRAYS["emb"]))
    with pytest.raises(CorruptFileError, match=r"compressed and in Fortran order.*ascontiguousarray"):
        specs_of(path)


# ---- damage


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_damage(tmp_path, save):
    path = tmp_path / "x.npz"
    save(path, emb=ARRAYS["emb"][:10], labels=ARRAYS["labels"][:10])
    outcomes = damage.run("npz", path, tmp_path, 0, 400)
    assert outcomes["cut refused"] > 390
    assert outcomes["flip refused"] > 20


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\3\4" + bytes(100), b"x" * 1000])
def test_what_is_no_archive(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"x\.npz"):
        specs_of(tmp_path / "x.npz")


def archive(path, raw, *, method=zipfile.ZIP_DEFLATED, name="a.npy"):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr(name, raw)
    return path


def npy(shape, values, descr="<f4"):
    head = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head = head.ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + values


def test_a_checksum_that_does_not_fit(tmp_path):
    path = archive(tmp_path / "x.npz", npy((4000,), bytes(16000)))
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\1\2") + 16
    raw[at] ^= 1
    path.write_bytes(raw)
    (spec,) = specs_of(path).values()
    with pytest.raises(CorruptFileError, match="Bad CRC"):
        streamed(spec)


def test_a_shape_that_its_member_does_not_hold(tmp_path):
    for values in (bytes(39), bytes(41)):
        with pytest.raises(CorruptFileError, match=r"its header says 168"):
            specs_of(archive(tmp_path / "x.npz", npy((10,), values)))


def test_a_bomb_is_read_in_bounded_memory(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file, file.open("a.npy", "w", force_zip64=True) as member:
        member.write(npy((1 << 29, 1), b"", "|u1"))
        for _ in range(512):
            member.write(bytes(1 << 20))
    path = tmp_path / "x.npz"
    path.write_bytes(out.getvalue())
    assert len(out.getvalue()) < 1 << 20
    (outcome,) = open_confined("npz", [path], seconds=20, nbytes=1 << 29).values()
    assert outcome.what == "opened"
    assert outcome.grown < 32 << 20


def test_members_compressed_otherwise(tmp_path):
    path = archive(tmp_path / "x.npz", npy((10,), bytes(40)), method=zipfile.ZIP_LZMA)
    with pytest.raises(CorruptFileError, match="compressed as numpy never does"):
        specs_of(path)


def test_a_file_that_is_replaced_between_locating_and_reading(tmp_path):
    path = archive(tmp_path / "x.npz", npy((10,), bytes(40)))
    (spec,) = specs_of(path).values()
    archive(path, npy((9,), bytes(36)))
    with pytest.raises(CorruptFileError, match="found fewer"):
        streamed(spec)
    archive(path, npy((11,), bytes(44)))
    with pytest.raises(CorruptFileError, match="found more"):
        streamed(spec)
    archive(path, npy((10,), bytes(40)), name="b.npy")
    with pytest.raises(CorruptFileError, match="not in it any more"):
        streamed(spec)


def test_read_is_the_reader_of_the_suite(tmp_path):
    # Arrays of savez are aligned to 64 bytes inside their member only.
    np.savez(tmp_path / "x.npz", ARRAYS["emb"])
    (spec,) = specs_of(tmp_path / "x.npz").values()
    assert spec.contiguous
    assert same(read(spec), torch.from_numpy(ARRAYS["emb"]))
