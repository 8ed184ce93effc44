from __future__ import annotations

import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch

from jasper_store.errors import CorruptFileError, DatasetNotFoundError, UnknownNameError
from jasper_store.formats.base import FormatName, Schema
from jasper_store.formats.registry import AUTO_ORDER, FORMATS, base_name, format_for, locate

NONE = Schema()
AB = Schema(required=frozenset({"a", "b"}), hdf5_paths={"a": "group/a", "b": "group/b"})


def save(folder, name, fmt: FormatName, tensor=None):
    """One tensor in one file of a format, by the peer library."""
    tensor = torch.ones(3) if tensor is None else tensor
    path = folder / f"{name}{FORMATS[fmt].suffixes[0]}"
    if fmt == "safetensors":
        safetensors.torch.save_file({name: tensor}, path)
    elif fmt == "npy":
        np.save(path, tensor.numpy())
    elif fmt == "pt":
        torch.save(tensor, path)
    else:
        with h5py.File(folder / "dataset.h5", "a") as file:
            file[AB.hdf5_path(name)] = tensor.numpy()
        path = folder / "dataset.h5"
    os.utime(path, (1_000_000_000, 1_000_000_000))
    return path


def age(path, seconds):
    os.utime(path, (1_000_000_000 - seconds, 1_000_000_000 - seconds))


def names(located):
    return {spec.name for spec in located.specs}


def formats(located):
    return {spec.name: next(n for n, f in FORMATS.items() if f is format_for(spec.path)) for spec in located.specs}


def test_formats_are_named_as_users_name_them():
    assert tuple(FORMATS) == AUTO_ORDER
    assert all(fmt.name == name for name, fmt in FORMATS.items())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.pt", "pt"), ("A.PTH", "pt"), ("x.h5", "hdf5"), ("x.HDF5", "hdf5"), ("a.b.npy", "npy"), ("a.bin", None)],
)
def test_format_for(tmp_path, name, expected):
    found = format_for(tmp_path / name)
    assert (found.name if found else None) == expected


def test_base_name():
    assert [base_name(n) for n in ("x", "x.values", "x.offsets", "x.other", ".values")] == [
        "x",
        "x",
        "x",
        "x.other",
        "",
    ]


@pytest.mark.parametrize("schema", [NONE, AB])
@pytest.mark.parametrize("first", range(4))
def test_auto_takes_the_first_that_is_complete(tmp_path, first, schema):
    for fmt in AUTO_ORDER[first:]:
        for name in "ab":
            save(tmp_path, name, fmt)
    if schema is NONE and "hdf5" in AUTO_ORDER[first:]:
        # Without a schema the HDF5 paths are names of their own, which no other format has.
        (tmp_path / "dataset.h5").unlink()
        with h5py.File(tmp_path / "dataset.h5", "w") as file:
            file["a"] = file["b"] = [1.0]
    located = locate(tmp_path, "auto", schema)
    assert (located.format, located.root, names(located)) == (AUTO_ORDER[first], tmp_path, {"a", "b"})
    assert set(formats(located).values()) == {AUTO_ORDER[first]}


@pytest.mark.parametrize("fmt", AUTO_ORDER)
def test_a_format_that_is_asked_for(tmp_path, fmt):
    for name in AUTO_ORDER:
        save(tmp_path, "a", name)
    located = locate(tmp_path, fmt, AB)
    assert located.format == fmt
    assert formats(located) == {"a": fmt}
    assert located.warnings == ()


@pytest.mark.parametrize("fmt", AUTO_ORDER)
def test_one_file(tmp_path, fmt):
    path = save(tmp_path, "a", fmt)
    save(tmp_path, "b", "npy")
    located = locate(path, "auto", AB)
    assert (located.format, located.root, names(located)) == (fmt, path, {"a"})
    odd = path.rename(tmp_path / "odd")
    assert locate(odd, fmt, AB).format == fmt
    with pytest.raises(UnknownNameError, match=r"does not say its format.*\.safetensors"):
        locate(odd, "auto", AB)


def test_a_complete_format_is_preferred_to_an_earlier_one(tmp_path):
    save(tmp_path, "a", "safetensors")
    save(tmp_path, "a", "pt")
    save(tmp_path, "b", "pt")
    for schema in (AB, NONE):
        located = locate(tmp_path, "auto", schema)
        assert formats(located) == {"a": "pt", "b": "pt"}
        assert located.warnings == ()


def test_what_is_incomplete_is_filled_from_the_others(tmp_path):
    schema = Schema(required=frozenset("abcd"))
    for name in "ab":
        save(tmp_path, name, "safetensors")
    save(tmp_path, "c", "npy")
    save(tmp_path, "a", "pt")
    located = locate(tmp_path, "auto", schema)
    assert located.format == "safetensors"
    assert formats(located) == {"a": "safetensors", "b": "safetensors", "c": "npy"}
    (note,) = located.warnings
    assert "safetensors lacks c; read from npy" in note
    assert "Convert" in note


def test_a_half_converted_dataset_is_read_from_its_source(tmp_path):
    for name in "ab":
        save(tmp_path, name, "pt")
    save(tmp_path, "a", "safetensors")
    (tmp_path / ".b.safetensors.123.tmp").write_bytes(b"half")
    (tmp_path / "_b.safetensors").write_bytes(b"half")
    located = locate(tmp_path, "auto", AB)
    assert formats(located) == {"a": "pt", "b": "pt"}


def test_a_damaged_file_is_never_passed_over(tmp_path):
    for name in "ab":
        save(tmp_path, name, "pt")
        save(tmp_path, name, "safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"damaged")
    with pytest.raises(CorruptFileError, match=r"a\.safetensors"):
        locate(tmp_path, "auto", AB)
    assert formats(locate(tmp_path, "pt", AB)) == {"a": "pt", "b": "pt"}
    (tmp_path / "dataset.h5").write_bytes(b"damaged")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(CorruptFileError, match=r"dataset\.h5"):
        locate(tmp_path, "auto", AB)


def test_stray_files(tmp_path):
    for name in "ab":
        save(tmp_path, name, "pt")
    save(tmp_path, "extra", "pt")
    torch.save({"epoch": 3, "optimizer": {"state": {}}}, tmp_path / "checkpoint.pt")
    (tmp_path / "gone.pt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("hello")
    located = locate(tmp_path, "auto", AB)
    assert names(located) == {"a", "b", "extra"}
    assert len(located.warnings) == 2
    assert "'checkpoint' is not part of the dataset" in located.warnings[0]
    assert "'gone' is not part of the dataset" in located.warnings[1]
    # Nobody said what belongs to the dataset, so nothing is a stray.
    with pytest.raises(CorruptFileError, match="checkpoint"):
        locate(tmp_path, "auto", NONE)


def test_a_conversion_that_is_older_than_its_source(tmp_path):
    for name in "ab":
        save(tmp_path, name, "pt")
        save(tmp_path, name, "safetensors")
    assert locate(tmp_path, "auto", AB).warnings == ()
    age(tmp_path / "a.safetensors", 10)
    (note,) = locate(tmp_path, "auto", AB).warnings
    assert f"{tmp_path / 'a.safetensors'}: is older than a.pt" in note
    age(tmp_path / "b.pt", 20)
    age(tmp_path / "a.pt", 20)
    assert locate(tmp_path, "auto", AB).warnings == ()


def test_one_file_that_is_older_than_any_of_its_sources(tmp_path):
    for name in "ab":
        save(tmp_path, name, "pt")
        save(tmp_path, name, "hdf5")
    age(tmp_path / "dataset.h5", 10)
    age(tmp_path / "b.pt", 20)
    (note,) = locate(tmp_path, "auto", AB).warnings
    assert "dataset.h5: is older than a.pt;" in note


def test_ragged_tensors_are_known_by_their_base_name(tmp_path):
    schema = Schema(required=frozenset({"a", "ids"}))
    save(tmp_path, "a", "safetensors")
    save(tmp_path, "ids.values", "safetensors", torch.arange(3))
    save(tmp_path, "ids.offsets", "safetensors", torch.tensor([0, 1, 3]))
    save(tmp_path, "a", "pt")
    torch.save([[0], [1, 2]], tmp_path / "ids.pt")
    for fmt in ("auto", "pt"):
        located = locate(tmp_path, fmt, schema)
        assert names(located) == {"a", "ids.values", "ids.offsets"}
    located = locate(tmp_path, "auto", schema)
    assert located.format == "safetensors"
    assert ["ids.pt" in note for note in located.warnings] == [True, True]


def test_files_of_several_tensors(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "all.pt")
    for fmt in ("safetensors", "pt", "auto"):
        assert names(locate(tmp_path, fmt, AB)) == {"a", "b"}


def test_the_same_name_twice(tmp_path):
    save(tmp_path, "a", "safetensors")
    safetensors.torch.save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CorruptFileError, match=r"holds the tensor 'a', and so does .*; remove one"):
        locate(tmp_path, "auto", NONE)


def test_a_ragged_and_a_plain_tensor_of_one_name(tmp_path):
    for name in ("x", "x.values", "x.offsets"):
        save(tmp_path, name, "npy")
    with pytest.raises(CorruptFileError, match=r"ragged tensor 'x\.offsets', and .* a plain one"):
        locate(tmp_path, "auto", NONE)


def test_names_that_look_like_paths_are_only_names(tmp_path):
    (tmp_path / "in").mkdir()
    torch.save(torch.zeros(2), tmp_path / "secret.pt")
    tensors = {"../secret": torch.ones(2), "/etc/passwd": torch.ones(3), "a/b": torch.ones(4)}
    safetensors.torch.save_file(tensors, tmp_path / "in" / "x.safetensors")
    located = locate(tmp_path / "in", "auto", NONE)
    assert names(located) == set(tensors)
    assert {spec.path for spec in located.specs} == {tmp_path / "in" / "x.safetensors"}


def test_links_to_files_are_followed(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "in").mkdir()
    target = save(tmp_path / "cache", "blob", "safetensors")
    (tmp_path / "in" / "a.safetensors").symlink_to(target)
    (spec,) = locate(tmp_path / "in", "auto", NONE).specs
    assert (spec.name, spec.path) == ("a", tmp_path / "in" / "a.safetensors")


def test_one_hdf5_file_is_the_dataset(tmp_path):
    save(tmp_path, "a", "hdf5")
    (tmp_path / "results.h5").write_bytes(b"something else")
    assert names(locate(tmp_path, "hdf5", AB)) == {"a"}
    (tmp_path / "results.h5").unlink()
    (tmp_path / "dataset.h5").rename(tmp_path / "any.h5")
    assert names(locate(tmp_path, "hdf5", AB)) == {"a"}


def test_an_unknown_format(tmp_path):
    with pytest.raises(
        UnknownNameError, match="'csv'; use 'auto' or one of 'safetensors', 'npy', 'hdf5', 'pt', 'arrow'"
    ):
        locate(tmp_path, "csv", NONE)


def test_nothing_there(tmp_path):
    with pytest.raises(DatasetNotFoundError, match="no such file or directory"):
        locate(tmp_path / "no" / "where", "auto", NONE)
    with pytest.raises(DatasetNotFoundError, match="found no files"):
        locate(tmp_path, "auto", NONE)
    (tmp_path / "config.json").write_text("{}")
    save(tmp_path, "a", "pt")
    with pytest.raises(DatasetNotFoundError, match=r"expected npy tensors \(\.npy\), found 1 \.json, 1 \.pt"):
        locate(tmp_path, "npy", NONE)


def test_h5py_is_not_imported_unless_needed(tmp_path):
    for name in "ab":
        save(tmp_path, name, "pt")
        save(tmp_path, name, "safetensors")
    code = (
        "import sys, pathlib\n"
        "from jasper_store.formats.registry import locate, FORMATS\n"
        "from jasper_store.formats.base import Schema\n"
        "schema = Schema(required=frozenset('ab'))\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "assert locate(folder, 'auto', schema).format == 'safetensors'\n"
        "assert locate(folder, 'pt', schema).format == 'pt'\n"
        "assert 'h5py' not in sys.modules and 'hdf5plugin' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
