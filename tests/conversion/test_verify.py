"""Damage is found wherever it is; what cannot be checked is said; a report is for people and for machines."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch

from jasper_store.conversion.checksum import checksum_of
from jasper_store.conversion.converter import convert
from jasper_store.conversion.verify import Finding, VerifyReport, verify_files
from jasper_store.errors import DatasetNotFoundError
from jasper_store.formats.registry import FORMATS
from jasper_store.store.manifest import MANIFEST_NAME
from tests.conversion.samples import FORMAT_NAMES, SCHEMA, checksums, expected, write_pt


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify")
    source = write_pt(root / "source")
    made = {fmt: root / fmt for fmt in FORMAT_NAMES} | {"gzip": root / "gzip"}
    for name, path in made.items():
        convert(source, path, "hdf5" if name == "gzip" else name, "gzip" if name == "gzip" else None, schema=SCHEMA)
    return made


@pytest.fixture(params=[*FORMAT_NAMES, "gzip"])
def dataset(request, datasets, tmp_path):
    return shutil.copytree(datasets[request.param], tmp_path / "data")


def test_a_sound_dataset(dataset):
    calls = []
    report = verify_files(dataset, schema=SCHEMA, progress=lambda *call: calls.append(call))
    assert report.ok
    assert not report.warnings
    assert f"{len(expected())} of {len(expected())} tensors" in str(report)
    assert calls[-1][1] == calls[-1][2] == sum(value.nbytes for value in expected().values())


@pytest.mark.parametrize("seed", range(5))
def test_a_flipped_byte_anywhere_in_the_values_is_found(dataset, seed):
    """Whatever a flipped byte hits: verify finds it, or every value is what it was (padding, unused header bytes)."""
    rng = np.random.default_rng(seed)
    for _ in range(10):
        files = sorted(path for path in dataset.iterdir() if path.suffix != ".json")
        path = files[rng.integers(len(files))]
        before = path.read_bytes()
        data = bytearray(before)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(data))
        report = verify_files(dataset, schema=SCHEMA)
        if report.ok:
            assert checksums(dataset) == {name: checksum_of(value) for name, value in expected().items()}
        path.write_bytes(before)


@pytest.mark.parametrize("seed", range(2))
def test_a_file_cut_anywhere_is_found(dataset, seed):
    rng = np.random.default_rng(seed)
    for _ in range(10):
        files = sorted(path for path in dataset.iterdir() if path.suffix != ".json")
        path = files[rng.integers(len(files))]
        before = path.read_bytes()
        path.write_bytes(before[: rng.integers(len(before))])
        assert not verify_files(dataset, schema=SCHEMA).ok
        path.write_bytes(before)


def test_a_flipped_value_names_its_tensor(datasets, tmp_path):
    data = shutil.copytree(datasets["safetensors"], tmp_path / "data")
    path = data / "double.safetensors"
    raw = bytearray(path.read_bytes())
    raw[4096 + 8] ^= 1
    path.write_bytes(bytes(raw))
    report = verify_files(data)
    (found,) = report.errors
    assert (found.tensor, found.check) == ("double", "checksum")
    assert "have changed since they were written" in found.message


def test_a_truncated_file_and_one_that_is_gone(datasets, tmp_path):
    data = shutil.copytree(datasets["npy"], tmp_path / "data")
    path = data / "embs.npy"
    path.write_bytes(path.read_bytes()[:-1])
    (data / "half.npy").unlink()
    report = verify_files(data)
    assert {(found.tensor, found.check) for found in report.errors} == {("embs.npy", "header"), ("half.npy", "missing")}


def test_a_file_that_is_gone_and_held_by_another_format_is_a_warning(datasets, tmp_path):
    data = shutil.copytree(datasets["npy"], tmp_path / "data")
    convert(data, format="safetensors")
    (data / "half.npy").unlink()
    report = verify_files(data)
    assert report.ok
    assert [found.check for found in report.warnings] == ["missing"]


@pytest.mark.parametrize("name", ["a" * 300 + ".npy", "d/" * 3000 + "x.npy", "folder/x.npy"])
def test_a_file_that_is_gone_by_a_name_of_any_kind(datasets, tmp_path, name):
    data = shutil.copytree(datasets["npy"], tmp_path / "data")
    manifest = json.loads((data / MANIFEST_NAME).read_text())
    manifest["files"][name] = manifest["files"]["half.npy"]
    (data / "half.npy").unlink()
    (data / MANIFEST_NAME).write_text(json.dumps(manifest))
    found = verify_files(data).errors
    assert {(each.tensor, each.check) for each in found} == {(name, "missing"), ("half.npy", "missing")}


def test_a_file_replaced_by_another_of_its_kind(datasets, tmp_path):
    data = shutil.copytree(datasets["npy"], tmp_path / "data")
    np.save(data / "embs.npy", np.zeros((3, 3), np.float32))
    report = verify_files(data)
    assert {found.check for found in report.errors} == {"size", "header"}


def test_a_copy_with_other_times_is_sound(datasets, tmp_path):
    data = shutil.copytree(datasets["npy"], tmp_path / "data")
    for path in data.iterdir():
        os.utime(path, (1, 1))
    assert verify_files(data).ok


def test_without_a_manifest_only_structure_is_checked_and_said(dataset):
    (dataset / MANIFEST_NAME).unlink()
    report = verify_files(dataset, schema=SCHEMA)
    assert report.ok
    assert [found.check for found in report.warnings] == ["manifest"]
    assert "only the structure" in str(report)


def test_without_a_manifest_a_pt_still_has_its_crcs(tmp_path):
    torch.save(torch.zeros(10_000), tmp_path / "a.pt")
    assert verify_files(tmp_path).ok
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[20_000] ^= 1
    (tmp_path / "a.pt").write_bytes(bytes(data))
    (found,) = verify_files(tmp_path).errors
    assert (found.tensor, found.check) == ("a.pt", "records")


def test_a_pt_saved_without_crcs_is_no_error(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.zeros(100), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert verify_files(tmp_path).ok


def test_without_a_manifest_compressed_chunks_are_still_read(datasets, tmp_path):
    data = shutil.copytree(datasets["gzip"], tmp_path / "data")
    (data / MANIFEST_NAME).unlink()
    (spec,) = (s for s in FORMATS["hdf5"].locate(data / "dataset.h5", SCHEMA) if s.name == "double")
    import h5py

    with h5py.File(data / "dataset.h5", "r+") as file:
        file["double"].id.write_direct_chunk((0, 0), b"nonsense")
    (found,) = verify_files(data, schema=SCHEMA).errors
    assert (found.tensor, found.check) == ("double", "read")
    assert spec.name == "double"


def test_a_damaged_manifest_is_an_error(datasets, tmp_path):
    data = shutil.copytree(datasets["npy"], tmp_path / "data")
    (data / MANIFEST_NAME).write_text("{")
    (found,) = verify_files(data).errors
    assert found.check == "manifest"


def test_files_beside_the_manifest_are_told_apart(datasets, tmp_path):
    data = shutil.copytree(datasets["npy"], tmp_path / "data")
    np.save(data / "extra.npy", np.zeros(3))
    report = verify_files(data)
    assert report.ok
    assert [found.tensor for found in report.warnings] == ["extra.npy"]


def test_one_file(datasets, tmp_path):
    assert verify_files(datasets["npy"] / "embs.npy").ok
    assert verify_files(datasets["hdf5"] / "dataset.h5", schema=SCHEMA).ok
    with pytest.raises(DatasetNotFoundError):
        verify_files(tmp_path)
    with pytest.raises(DatasetNotFoundError):
        verify_files(tmp_path / "nothing.npy")


def test_a_report_is_data_and_text(tmp_path):
    report = VerifyReport(tmp_path)
    report.add([Finding("error", "a", "range", "expected 0 to 1, found 2", 7), Finding("warning", None, "splits", "x")])
    report.add([Finding("fact", None, "checksum", "all equal")])
    assert not report.ok
    assert VerifyReport(tmp_path).ok
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is False
    assert data["errors"][0]["position"] == 7
    assert str(report).splitlines() == [
        f"{tmp_path}: 1 error, 1 warning",
        "  ERROR    range: expected 0 to 1, found 2 (row 7)",
        "  warning  splits: x",
        "  ok       checksum: all equal",
    ]


def test_progress_may_stop_it(datasets):
    def stop(name: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_files(datasets["npy"], progress=stop)


def test_a_pt_whose_names_are_damaged_is_an_error_of_it(tmp_path):
    """zipfile raises UnicodeDecodeError, and others, from a local header that makes no sense."""
    torch.save(torch.zeros(100), tmp_path / "a.pt")
    sound = (tmp_path / "a.pt").read_bytes()
    name = b"a/version"
    at = sound.index(name)
    damaged = bytearray(sound)
    damaged[at - 24 : at - 22] = (0x800).to_bytes(2, "little")  # the name is UTF-8
    damaged[at] = 0xFF
    (tmp_path / "a.pt").write_bytes(bytes(damaged))
    report = verify_files(tmp_path)
    assert [(found.tensor, found.check) for found in report.errors] == [("a.pt", "records")]
    assert "utf-8" in report.errors[0].message
