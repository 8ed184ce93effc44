import json
import os
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from jasper_store.errors import CorruptFileError, StaleDataWarning
from jasper_store.formats.base import Schema
from jasper_store.formats.registry import locate
from jasper_store.store import manifest as manifests
from jasper_store.store.manifest import MANIFEST_NAME, FileEntry, FileFingerprint, Manifest, Source, TensorEntry
from jasper_store.store.store import open_store


def write(path, value=1.0, rows=300_000):
    save_file({path.stem: torch.full((rows,), value)}, path)


@pytest.fixture
def dataset(tmp_path):
    """Two tensors of 1.2 MB with a manifest that knows them."""
    directory = tmp_path / "data"
    directory.mkdir()
    for name in ("a", "b"):
        write(directory / f"{name}.safetensors")
    enter(directory)
    return directory


def enter(directory, **facts):
    entries = {
        path.name: FileEntry(
            FileFingerprint.of(path), {path.stem: TensorEntry("float32", (300_000,), "0" * 32)}, **facts
        )
        for path in directory.glob("*.safetensors")
    }
    return manifests.update(directory, lambda old: replace(old, files=entries))


def specs(directory):
    return locate(directory, "auto", Schema()).specs


def read(directory):
    """The manifest that must be there."""
    found = manifests.read(directory)
    assert found is not None
    return found


def touch(path, seconds=5):
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + seconds * 10**9))


def test_a_directory_without_one_opens(tmp_path):
    write(tmp_path / "a.safetensors")
    assert manifests.read(tmp_path) is None
    with open_store(tmp_path) as store:
        assert store.manifest is None
        assert not store.is_verified("anything")


def test_round_trip(dataset):
    source = Source("../raw/a.pt", FileFingerprint(10, 20, "f" * 32))
    written = enter(dataset, made_from=(source,))
    manifests.remember(dataset, specs(dataset), "check")
    again = read(dataset)
    assert again.files == written.files
    assert set(again.verified["check"]) == {"a.safetensors", "b.safetensors"}
    assert again.checksum(specs(dataset)[0]) == "0" * 32
    assert json.loads((dataset / MANIFEST_NAME).read_text())["format_version"] == 1


def test_truncated(dataset):
    path = dataset / "a.safetensors"
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CorruptFileError):
        open_store(dataset)
    with pytest.raises(CorruptFileError, match="truncated: expected"):
        read(dataset).check([replace_path(specs_of_b(dataset), path)])


def specs_of_b(dataset):
    return next(s for s in locate(dataset / "b.safetensors", "auto", Schema()).specs)


def replace_path(spec, path):
    return replace(spec, location=replace(spec.location, path=path))


def test_replaced_by_one_of_another_size(dataset):
    write(dataset / "a.safetensors", rows=300_001)
    with pytest.raises(CorruptFileError, match="replaced"):
        open_store(dataset)


def test_replaced_by_one_of_the_same_size(dataset):
    write(dataset / "a.safetensors", value=2.0)
    touch(dataset / "a.safetensors")
    with pytest.raises(CorruptFileError, match="its size is as expected") as caught:
        open_store(dataset)
    assert MANIFEST_NAME in str(caught.value)
    assert caught.value.path == dataset / "a.safetensors"


def test_a_copy_with_new_times_is_the_same_dataset(dataset, tmp_path):
    manifests.remember(dataset, specs(dataset), "check")
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy, copy_function=shutil.copyfile)
    for path in copy.iterdir():
        touch(path)
    with open_store(copy) as store:
        assert store.is_verified("check")
        assert not store.is_verified("another check")


def test_a_header_that_says_something_else_is_refused(dataset):
    manifest = read(dataset)
    entry = manifest.files["a.safetensors"]
    other = replace(entry, tensors={"a": TensorEntry("float16", (600_000,), None)})
    manifests.update(dataset, lambda old: replace(old, files={**old.files, "a.safetensors": other}))
    with pytest.raises(CorruptFileError, match=r"was written as float16 \[600000\]"):
        open_store(dataset)


def test_marks_fall_when_a_file_changes_and_cover_all_files_together(dataset):
    (dataset / MANIFEST_NAME).unlink()
    both = specs(dataset)
    assert manifests.remember(dataset, both[:1], "check")
    manifest = read(dataset)
    assert manifest.is_verified(both[:1], "check")
    assert not manifest.is_verified(both, "check")
    write(both[0].path, value=3.0)
    touch(both[0].path)
    assert not manifest.is_verified(both[:1], "check")
    both[0].path.unlink()
    assert not manifest.is_verified(both[:1], "check")
    # Files that only a mark knows may change: nobody wrote them here, so nobody vouches for their bytes.
    write(both[0].path, value=4.0)
    open_store(dataset).close()


def test_a_store_remembers_and_is_vouched_for_next_time(dataset):
    with open_store(dataset) as store:
        assert not store.is_verified("check")
        assert store.remember("check")
        assert store.is_verified("check")
    with open_store(dataset) as store:
        assert store.is_verified("check")


def test_a_file_that_changed_since_opening_is_not_remembered(dataset):
    with open_store(dataset, use_mmap=False) as store:
        touch(dataset / "a.safetensors")
        assert not store.remember("check")


def test_a_single_file_uses_the_manifest_beside_it(dataset):
    with open_store(dataset / "b.safetensors") as store:
        assert store.remember("check")
    write(dataset / "a.safetensors", rows=10)
    with open_store(dataset / "b.safetensors") as store:
        assert store.is_verified("check")


def test_directories_that_cannot_be_written_are_no_error(dataset, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "read-only")

    with open_store(dataset) as store:
        monkeypatch.setattr(Manifest, "write", refuse)
        assert not store.remember("check")
    assert not manifests.remember(dataset / "missing", specs(dataset), "check")


def test_files_outside_the_directory_are_not_remembered(dataset, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    assert not manifests.remember(other, specs(dataset), "check")
    assert not manifests.Manifest(other).is_verified(specs(dataset), "check")


def test_a_stale_conversion_is_warned_of_by_content_not_by_time(dataset, tmp_path):
    source = tmp_path / "raw.pt"
    source.write_bytes(b"before")
    enter(dataset, made_from=(Source("../raw.pt", FileFingerprint.of(source)),))
    touch(source)
    open_store(dataset).close()
    source.write_bytes(b"behind")
    touch(source, 9)
    with pytest.warns(StaleDataWarning, match=r"was made from .*raw\.pt, which has changed"):
        open_store(dataset).close()
    source.unlink()
    open_store(dataset).close()


VALID = {"format_version": 1, "files": {}, "verified": {}}
STAMP = {"size": 1, "mtime_ns": 2, "sample": None}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "[" * 100_000,
        '"text"',
        json.dumps({}),
        json.dumps(VALID | {"format_version": 2}),
        json.dumps(VALID | {"files": []}),
        json.dumps(VALID | {"files": {"../a": {**STAMP, "tensors": {}}}}),
        json.dumps(VALID | {"files": {"/a": {**STAMP, "tensors": {}}}}),
        json.dumps(VALID | {"files": {"a": {"size": 1}}}),
        json.dumps(VALID | {"files": {"a": {**STAMP, "size": "1", "tensors": {}}}}),
        json.dumps(VALID | {"files": {"a": {**STAMP, "size": -1, "tensors": {}}}}),
        json.dumps(VALID | {"files": {"a": {**STAMP, "tensors": {"a": {"dtype": 1, "shape": []}}}}}),
        json.dumps(VALID | {"files": {"a": {**STAMP, "tensors": {"a": {"dtype": "int8", "shape": [True]}}}}}),
        json.dumps(VALID | {"files": {"a": {**STAMP, "sample": "zz", "tensors": {}}}}),
        json.dumps(VALID | {"verified": {"check": {"a": 1}}}),
        json.dumps(VALID | {"verified": 3}),
        b"\xff\xfe\x00".decode("latin-1"),
    ],
)
def test_malformed_is_refused_with_a_remedy(dataset, text):
    (dataset / MANIFEST_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(CorruptFileError, match="delete it and run jasper-store verify"):
        open_store(dataset)
    with pytest.raises(CorruptFileError):
        manifests.remember(dataset, specs(dataset), "check")


def test_writing_is_atomic(dataset, monkeypatch):
    before = (dataset / MANIFEST_NAME).read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        manifests.update(dataset, lambda old: replace(old, verified={}))
    assert (dataset / MANIFEST_NAME).read_bytes() == before
    assert sorted(p.name for p in dataset.iterdir()) == ["a.safetensors", "b.safetensors", MANIFEST_NAME]


def test_two_writers_lose_nothing(dataset):
    found = specs(dataset)
    threads = [threading.Thread(target=manifests.remember, args=(dataset, found, f"check {i}")) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read(dataset).verified) == {f"check {i}" for i in range(8)}


def test_a_stamp_samples_all_over_a_large_file(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(60 << 30)
    stamp = FileFingerprint.of(path)
    for position in (0, (60 << 30) - 1):
        with path.open("r+b") as file:
            file.seek(position)
            file.write(b"x")
        changed = FileFingerprint.of(path)
        assert changed.sample != stamp.sample
        stamp = changed
    assert FileFingerprint(stamp.size, 0, stamp.sample).matches(path)
    assert not FileFingerprint(stamp.size, 0, None).matches(path)
    assert not FileFingerprint(stamp.size - 1, stamp.mtime_ns, stamp.sample).matches(path)


def test_only_regular_files_are_stamped(tmp_path):
    with pytest.raises(OSError, match=r"directory|regular|denied"):
        FileFingerprint.of(tmp_path)
