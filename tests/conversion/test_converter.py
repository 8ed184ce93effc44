"""Every pair of formats, bit by bit; what is skipped, refused, narrowed, copied and reported."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import pytest
import torch

from jasper_store.conversion import run
from jasper_store.conversion.checksum import checksum, checksum_of
from jasper_store.conversion.converter import convert
from jasper_store.errors import (
    ConversionError,
    CorruptFileError,
    DatasetNotFoundError,
    IncompatibleOptionsError,
    IntegrityError,
    UnknownNameError,
)
from jasper_store.files.lock import LOCK_NAME, exclusive
from jasper_store.formats.registry import locate
from jasper_store.store import manifest_file
from jasper_store.store.manifest import MANIFEST_NAME
from tests.conversion.samples import (
    FORMAT_NAMES,
    SCHEMA,
    checksums,
    expected,
    read_by_others,
    same_bits,
    write_pt,
)

if TYPE_CHECKING:
    from jasper_store.formats.base import TensorSpec


@pytest.fixture
def source(tmp_path):
    return write_pt(tmp_path / "pt")


@pytest.fixture(scope="session")
def in_every_format(tmp_path_factory):
    """One dataset in four directories; pt as torch writes it, the others converted from it."""
    root = tmp_path_factory.mktemp("formats")
    directories = {"pt": write_pt(root / "pt")}
    for fmt in FORMAT_NAMES:
        if fmt != "pt":
            directories[fmt] = root / fmt
            convert(directories["pt"], root / fmt, fmt, schema=SCHEMA)
    return directories


@pytest.mark.parametrize(("one", "other"), list(itertools.product(FORMAT_NAMES, FORMAT_NAMES)))
def test_every_pair_of_formats_is_equal_bit_by_bit(in_every_format, tmp_path, one, other):
    report = convert(in_every_format[one], tmp_path / "out", other, schema=SCHEMA)
    wanted = {name: checksum_of(value) for name, value in expected().items()}
    assert {row.name: row.checksum for row in report.tensors} == wanted
    assert checksums(tmp_path / "out", other) == wanted
    found = read_by_others(tmp_path / "out", other)
    assert found.keys() == wanted.keys()
    for name, value in expected().items():
        assert same_bits(found[name], value), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"answer": 42}
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("compression", ["gzip", "lzf", "zstd", "blosc", "lz4"])
def test_compressed_hdf5_holds_the_same_values(source, tmp_path, compression):
    report = convert(source, tmp_path / "out", "hdf5", compression, schema=SCHEMA)
    assert report.compression == compression
    found = read_by_others(tmp_path / "out", "hdf5")
    for name, value in expected().items():
        assert same_bits(found[name], value), name
    again = convert(tmp_path / "out", tmp_path / "back", "safetensors", schema=SCHEMA)
    assert [row.checksum for row in again.tensors] == [row.checksum for row in report.tensors]


def test_blocks_of_any_size_make_the_same_file(source, tmp_path, monkeypatch):
    from jasper_store.conversion import rows

    convert(source, tmp_path / "large", "safetensors")
    monkeypatch.setattr(rows, "BLOCK_NBYTES", 64)
    convert(source, tmp_path / "small", "safetensors")
    for path in (tmp_path / "large").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "small" / path.name).read_bytes()


def test_the_default_is_safetensors_in_the_same_directory(source):
    before = sorted(source.iterdir())
    report = convert(source)
    assert report.destination == source
    assert report.copied == ()
    assert {path.suffix for path in source.iterdir()} == {".pt", ".safetensors", ".json"}
    assert all(path.exists() for path in before)


def test_one_file_and_an_hdf5_file_name(source, tmp_path):
    convert(source / "embs.pt", tmp_path / "out", "npy")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["embs.npy", MANIFEST_NAME]
    convert(source, tmp_path / "there" / "all.h5", "hdf5", schema=SCHEMA)
    with h5py.File(tmp_path / "there" / "all.h5") as file:
        assert file["embeddings/all"].shape == (33, 7)
    with pytest.raises(IncompatibleOptionsError, match="expected a directory"):
        convert(source, source / "embs.pt", "npy")


def test_a_second_run_skips_everything(source):
    first = convert(source, format="safetensors")
    stamps = {path: path.stat().st_mtime_ns for path in source.iterdir()}
    second = convert(source, format="safetensors")
    assert all(row.skipped for row in second.tensors)
    assert not any(row.skipped for row in first.tensors)
    assert [row.checksum for row in first.tensors] == [row.checksum for row in second.tensors]
    assert {path: path.stat().st_mtime_ns for path in source.iterdir()} == stamps
    assert "skipped" in str(second)


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_right_targets_without_an_entry_are_compared_and_recorded(in_every_format, tmp_path, fmt):
    convert(in_every_format["pt"], tmp_path, fmt, schema=SCHEMA)
    (tmp_path / MANIFEST_NAME).unlink()
    report = convert(in_every_format["pt"], tmp_path, fmt, schema=SCHEMA)
    assert all(row.skipped for row in report.tensors)
    found = manifest_file.read(tmp_path)
    assert found is not None
    assert {name for entry in found.files.values() for name in entry.tensors} == expected().keys()


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_another_target_is_replaced_only_on_request(source, tmp_path, fmt):
    convert(source, tmp_path / "out", fmt, schema=SCHEMA)
    torch.save(torch.full((33, 7), 5.0), source / "embs.pt")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ConversionError, match="overwrite=True"):
        convert(source, tmp_path / "out", fmt, schema=SCHEMA)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    report = convert(source, tmp_path / "out", fmt, schema=SCHEMA, overwrite=True)
    written = [row.name for row in report.tensors if not row.skipped]
    assert "embs" in written
    if fmt != "hdf5":
        assert written == ["embs"]
    assert read_by_others(tmp_path / "out", fmt)["embs"].flatten().tolist() == [5.0] * 231


def test_a_damaged_target_is_noticed_and_replaced(source, tmp_path):
    convert(source, tmp_path / "out", "npy")
    target = tmp_path / "out" / "embs.npy"
    target.write_bytes(target.read_bytes()[:-10])
    with pytest.raises(ConversionError, match=r"embs\.npy"):
        convert(source, tmp_path / "out", "npy")
    convert(source, tmp_path / "out", "npy", overwrite=True)
    assert same_bits(read_by_others(tmp_path / "out", "npy")["embs"], expected()["embs"])


def test_part_of_the_tensors(source, tmp_path):
    convert(source, tmp_path / "out", "npy", tensors=["half", "words"])
    names = {path.name for path in (tmp_path / "out").glob("*.npy")}
    assert names == {"half.npy", "words.values.npy", "words.offsets.npy"}
    with pytest.raises(UnknownNameError, match="no tensor 'nonsense'"):
        convert(source, tmp_path / "out", "npy", tensors=["nonsense"])


def test_part_of_an_hdf5_file_is_replaced_and_the_rest_stays(source, tmp_path):
    convert(source, tmp_path / "out", "hdf5", schema=SCHEMA)
    torch.save(torch.full((33, 7), 5.0), source / "embs.pt")
    report = convert(
        source, tmp_path / "out", "hdf5", schema=SCHEMA, tensors=["embs"], overwrite=True, dtype="bfloat16"
    )
    found = read_by_others(tmp_path / "out", "hdf5")
    assert found.keys() == expected().keys()
    assert found["embs"].dtype == torch.bfloat16
    assert same_bits(found["double"], expected()["double"])
    assert {row.name for row in report.tensors} == expected().keys()


def test_a_full_conversion_does_not_keep_what_the_source_lacks(source, tmp_path):
    convert(source, tmp_path / "out", "hdf5", schema=SCHEMA)
    (source / "half.pt").unlink()
    torch.save(torch.zeros(2), source / "embs.pt")
    convert(source, tmp_path / "out", "hdf5", schema=SCHEMA, overwrite=True)
    assert "half" not in read_by_others(tmp_path / "out", "hdf5")


def test_another_compression_is_another_file(source, tmp_path):
    convert(source, tmp_path / "out", "hdf5", schema=SCHEMA)
    with pytest.raises(ConversionError, match="overwrite=True"):
        convert(source, tmp_path / "out", "hdf5", "gzip", schema=SCHEMA)
    convert(source, tmp_path / "out", "hdf5", "gzip", schema=SCHEMA, overwrite=True)
    with h5py.File(tmp_path / "out" / "dataset.h5") as file:
        assert file["embeddings/all"].compression == "gzip"
    assert all(row.skipped for row in convert(source, tmp_path / "out", "hdf5", "gzip", schema=SCHEMA).tensors)


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_source_and_destination_may_not_be_the_same(in_every_format, tmp_path, fmt):
    shutil.copytree(in_every_format[fmt], tmp_path / "x")
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    with pytest.raises(IncompatibleOptionsError, match="same file"):
        convert(tmp_path / "x", format=fmt, schema=SCHEMA)
    with pytest.raises(IncompatibleOptionsError, match="same file"):
        convert(tmp_path / "x", tmp_path / "x", format=fmt, source_format=fmt, overwrite=True, schema=SCHEMA)
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before


def test_links_and_hard_links_to_the_source_are_the_same_file(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "embs.pt").symlink_to(source / "embs.pt")
    with pytest.raises(IncompatibleOptionsError, match="same file"):
        convert(source / "embs.pt", out, "pt", overwrite=True)
    (out / "embs.pt").unlink()
    os.link(source / "embs.pt", out / "embs.pt")
    with pytest.raises(IncompatibleOptionsError, match="same file"):
        convert(source / "embs.pt", out, "pt", overwrite=True)


def test_a_target_that_is_a_link_is_replaced_and_never_written_through(source, tmp_path):
    precious = tmp_path / "precious.npy"
    precious.write_bytes(b"precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / "embs.npy").symlink_to(precious)
    with pytest.raises(ConversionError, match="overwrite=True"):
        convert(source, out, "npy", tensors=["embs"])
    convert(source, out, "npy", tensors=["embs"], overwrite=True)
    assert precious.read_bytes() == b"precious"
    assert not (out / "embs.npy").is_symlink()


def test_in_its_own_directory_the_source_is_never_the_earlier_result(source):
    convert(source, format="safetensors")
    torch.save(torch.full((33, 7), 5.0), source / "embs.pt")
    convert(source, format="safetensors", overwrite=True)
    assert read_by_others(source, "safetensors")["embs"].flatten().tolist() == [5.0] * 231
    convert(source, format="hdf5", schema=SCHEMA)
    assert read_by_others(source, "hdf5")["embs"].flatten().tolist() == [5.0] * 231


def test_the_most_complete_format_is_the_source_and_others_fill_it(source):
    convert(source / "half.pt", source, "npy")
    (source / "half.pt").unlink()
    report = convert(source, format="safetensors")
    assert report.source_format == "pt"
    assert "half" in read_by_others(source, "safetensors")
    assert any("half" in note for note in report.notes)


def test_a_damaged_format_is_passed_over_and_said(source):
    (source / "dataset.h5").write_bytes(b"\x89HDF nonsense")
    report = convert(source, format="safetensors")
    assert any("passed over" in note and "dataset.h5" in note for note in report.notes)
    with pytest.raises(CorruptFileError):
        convert(source, format="npy", source_format="hdf5")


def test_nothing_to_convert(tmp_path):
    with pytest.raises(DatasetNotFoundError):
        convert(tmp_path)
    with pytest.raises(DatasetNotFoundError):
        convert(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_unknown_and_impossible_options(source, tmp_path):
    with pytest.raises(UnknownNameError, match="'safetensors', 'npy', 'hdf5', 'pt'"):
        convert(source, tmp_path / "out", "zarr")
    with pytest.raises(UnknownNameError, match="float16"):
        convert(source, tmp_path / "out", dtype="float17")
    with pytest.raises(IncompatibleOptionsError, match="only floating"):
        convert(source, tmp_path / "out", dtype=torch.int8)
    with pytest.raises(IncompatibleOptionsError, match="compression"):
        convert(source, tmp_path / "out", "npy", "gzip")
    with pytest.raises(UnknownNameError, match="compression"):
        convert(source, tmp_path / "out", "hdf5", "bzip2")
    assert not (tmp_path / "out").exists()


def test_a_name_that_leads_elsewhere_is_refused(tmp_path):
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["a/b"] = [1.0]
    with pytest.raises(IncompatibleOptionsError, match="a/b"):
        convert(tmp_path / "in.h5", tmp_path / "out", "npy")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", torch.float32])
def test_narrowing_reports_the_largest_error(source, tmp_path, dtype):
    report = convert(source, tmp_path / "out", dtype=dtype)
    found = read_by_others(tmp_path / "out", "safetensors")
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for row in report.tensors:
        value = expected()[row.name]
        cast = value.to(wanted) if value.is_floating_point() and value.dtype.itemsize > wanted.itemsize else value
        assert same_bits(found[row.name], cast), row.name
        if value.dtype == cast.dtype:
            assert row.max_error is None
        else:
            finite = torch.isfinite(value)
            errors = (cast[finite].double() - value[finite].double()).abs().reshape(-1)
            assert row.max_error == max(errors.tolist(), default=0.0)
    assert "max error" in str(report)


@pytest.mark.parametrize(("stored", "dtype"), [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_a_float_of_as_many_bits_is_kept_and_named(tmp_path, stored, dtype):
    values = torch.randn(9, 3).to(getattr(torch, stored))
    source = write_pt(tmp_path / "pt", {"half": values, "whole": torch.ones(9, 3), "ids": torch.arange(9)})
    report = convert(source, tmp_path / "out", dtype=dtype)
    found = read_by_others(tmp_path / "out", "safetensors")
    assert same_bits(found["half"], values)
    assert found["whole"].dtype == getattr(torch, dtype)
    assert report.notes[-1] == f"written as they are, since {dtype} would save nothing: half"
    assert "max error" in str(report)
    assert "whole" not in report.notes[-1]


def test_narrowing_refuses_to_make_infinities(tmp_path):
    values = torch.zeros(100, 3)
    values[70, 2] = 70000.0
    values[1, 1] = float("inf")
    source = write_pt(tmp_path / "pt", {"a": values})
    with pytest.raises(IntegrityError, match=r"a: row 70, position \[2\] holds 70000, and float16 ends at 65504"):
        convert(source, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    assert convert(source, tmp_path / "out", dtype="bfloat16").tensors[0].max_error == 144.0


def test_narrowing_names_the_row_whatever_the_block(tmp_path, monkeypatch):
    from jasper_store.conversion import rows

    monkeypatch.setattr(rows, "BLOCK_NBYTES", 64)
    values = torch.zeros(1000)
    values[777] = 1e30
    source = write_pt(tmp_path / "pt", {"a": values})
    with pytest.raises(IntegrityError, match="row 777 "):
        convert(source, tmp_path / "out", dtype="float16")


def test_progress_covers_every_byte_and_may_stop_it(source, tmp_path):
    calls = []
    report = convert(source, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert calls[-1][1] == calls[-1][2] == report.bytes_in
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert {name for name, _, _ in calls} <= expected().keys()

    def stop(name, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "other", progress=stop)
    assert not (tmp_path / "other").exists()


def test_an_interrupted_run_is_resumed(source, tmp_path):
    def stop(name, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=stop)
    kept = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert 0 < len(kept) < len(expected())
    report = convert(source, tmp_path / "out")
    assert {row.file for row in report.tensors if row.skipped} == kept
    assert checksums(tmp_path / "out") == checksums(source)


def test_other_json_files_come_along(source, tmp_path):
    (source / "labels.json").write_text("[1]")
    (source / ".hidden.json").write_text("[2]")
    report = convert(source, tmp_path / "out")
    assert report.copied == ("config.json", "labels.json")
    assert not (tmp_path / "out" / ".hidden.json").exists()
    (source / "labels.json").write_text("[3]")
    with pytest.raises(ConversionError, match=r"labels\.json"):
        convert(source, tmp_path / "out")
    assert convert(source, tmp_path / "out", overwrite=True).copied == ("labels.json",)
    assert (tmp_path / "out" / "labels.json").read_text() == "[3]"


def test_the_manifest_says_what_was_written_from_what(source, tmp_path):
    convert(source, tmp_path / "out")
    found = manifest_file.read(tmp_path / "out")
    assert found is not None
    entry = found.files["embs.safetensors"]
    assert entry.fingerprint.matches(tmp_path / "out" / "embs.safetensors")
    assert entry.tensors["embs"].shape == (33, 7)
    assert entry.tensors["embs"].xxh3_128 == checksum_of(expected()["embs"])
    assert [item.path for item in entry.made_from] == ["../pt/embs.pt"]
    assert entry.made_from[0].fingerprint.matches(source / "embs.pt")


def test_a_destination_behind_a_link_is_recognised_again(source, tmp_path):
    (tmp_path / "deep" / "down").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "down")
    convert(source, tmp_path / "link")
    assert all(row.skipped for row in convert(source, tmp_path / "link").tensors)
    assert all(row.skipped for row in convert(source, tmp_path / "deep" / "down").tensors)
    found = manifest_file.read(tmp_path / "link")
    assert found is not None
    assert found.check(locate(tmp_path / "link", "auto", SCHEMA).specs) == []


def test_the_report_is_data_and_a_table(source, tmp_path):
    report = convert(source, tmp_path / "out", "hdf5", "gzip", schema=SCHEMA)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["format"] == "hdf5"
    assert len(data["tensors"]) == len(expected())
    assert data["bytes_in"] == sum(value.nbytes for value in expected().values())
    text = str(report)
    for name in expected():
        assert name in text
    assert "proven" in text
    assert "saved" in text


def test_readers_of_a_replaced_file_keep_it(source, tmp_path):
    from jasper_store.paging.mapping import FileMap, view

    convert(source, tmp_path / "out", tensors=["embs"])
    fmap = FileMap(tmp_path / "out" / "embs.safetensors")
    mapped = view(fmap, 4096, torch.float32, (33, 7))
    torch.save(torch.zeros(33, 7), source / "embs.pt")
    convert(source, tmp_path / "out", tensors=["embs"], overwrite=True)
    assert same_bits(mapped, expected()["embs"])
    fmap.close()


def test_two_converters_do_not_meet(source, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        exclusive(tmp_path / "out" / LOCK_NAME, "the first"),
        pytest.raises(ConversionError, match=f"process {os.getpid()} on"),
    ):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / LOCK_NAME).exists()


def test_a_disk_that_lies_is_noticed(source, tmp_path, monkeypatch):
    from jasper_store.conversion import transfer

    monkeypatch.setattr(transfer, "checksum", lambda spec: checksum(spec)[::-1])
    with pytest.raises(ConversionError, match="disk or the memory is faulty"):
        convert(source, tmp_path / "out", tensors=["embs"])
    assert not (tmp_path / "out").exists()


def test_a_large_file_is_proven_while_it_is_written(tmp_path, monkeypatch):
    from jasper_store.conversion import transfer, writeback

    monkeypatch.setattr(writeback, "WINDOW_NBYTES", 1 << 16)
    monkeypatch.setattr(transfer, "WINDOW_NBYTES", 1 << 16)
    values = torch.randn(3000, 100)
    source = write_pt(tmp_path / "pt", {"a": values})
    read = []

    def counted(spec: TensorSpec) -> str:
        read.append(spec.name)
        return checksum(spec)

    monkeypatch.setattr(transfer, "checksum", counted)
    for fmt in FORMAT_NAMES:
        report = convert(source, tmp_path / f"to_{fmt}", fmt)
        assert report.tensors[0].checksum == checksum_of(values)
    assert read == ["a"]  # hdf5 alone knows its offsets only afterwards


@pytest.mark.parametrize("renamed", [0, 1])
def test_a_commit_cut_between_its_renames_is_completed(tmp_path, monkeypatch, renamed):
    """Killed after the manifest was written: nothing mixed opens unnoticed, and the next run finishes the names."""
    source = write_pt(tmp_path / "pt", {"a": torch.zeros(5), "b": torch.zeros(5)})
    out = tmp_path / "out"
    convert(source, out)
    for name in ("a", "b"):
        torch.save(torch.ones(5), source / f"{name}.pt")
    done: list[Path] = []
    real = Path.replace

    def cut(self: Path, target: Path) -> Path:
        if Path(target).suffix == ".safetensors":
            if len(done) >= renamed:
                raise KeyboardInterrupt
            done.append(target)
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(run, "exchanged", lambda *_: False)  # as where the system cannot exchange directories
        patch.setattr(Path, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, overwrite=True)
    recorded = manifest_file.read(out)
    assert recorded is not None
    with pytest.raises(CorruptFileError):
        recorded.check(locate(out, "auto", SCHEMA).specs)
    report = convert(source, out, overwrite=True)
    assert all(row.skipped for row in report.tensors)
    assert all((value == 1).all() for value in read_by_others(out, "safetensors").values())
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
