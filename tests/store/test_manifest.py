import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from jasper_store.errors import ConversionError, CorruptFileError, StaleDataWarning
from jasper_store.files.fingerprint import FileFingerprint
from jasper_store.files.lock import exclusive
from jasper_store.formats.base import Schema
from jasper_store.formats.registry import locate
from jasper_store.store import manifest_file as manifests
from jasper_store.store.manifest import MANIFEST_NAME, FileEntry, Manifest, SourceFile, TensorEntry
from jasper_store.store.opening import open_store


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
    source = SourceFile("../raw/a.pt", FileFingerprint(10, 20, "f" * 32))
    written = enter(dataset, made_from=(source,))
    manifests.record_checks(dataset, specs(dataset), ["check"])
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
    manifests.record_checks(dataset, specs(dataset), ["check"])
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
    assert manifests.record_checks(dataset, both[:1], ["check"])
    manifest = read(dataset)
    assert manifest.is_verified(both[:1], "check")
    assert not manifest.is_verified(both, "check")
    write(both[0].path, value=3.0)
    touch(both[0].path)
    assert not manifest.is_verified(both[:1], "check")
    both[0].path.unlink()
    assert not manifest.is_verified(both[:1], "check")
    # Files that only a mark knows may change: no entry records their bytes.
    write(both[0].path, value=4.0)
    open_store(dataset).close()


def test_a_store_records_a_check_for_the_next_time(dataset):
    with open_store(dataset) as store:
        assert not store.is_verified("check")
        assert store.record_checks(["check"])
        assert store.is_verified("check")
    with open_store(dataset) as store:
        assert store.is_verified("check")


def test_a_file_that_changed_since_opening_is_not_recorded(dataset):
    with open_store(dataset, use_mmap=False) as store:
        touch(dataset / "a.safetensors")
        assert not store.record_checks(["check"])


def test_a_single_file_uses_the_manifest_beside_it(dataset):
    with open_store(dataset / "b.safetensors") as store:
        assert store.record_checks(["check"])
    write(dataset / "a.safetensors", rows=10)
    with open_store(dataset / "b.safetensors") as store:
        assert store.is_verified("check")


def test_directories_that_cannot_be_written_are_no_error(dataset, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "read-only")

    with open_store(dataset) as store:
        monkeypatch.setattr(manifests, "write", refuse)
        assert not store.record_checks(["check"])
    assert not manifests.record_checks(dataset / "missing", specs(dataset), ["check"])


def test_files_outside_the_directory_are_not_recorded(dataset, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    assert not manifests.record_checks(other, specs(dataset), ["check"])
    assert not Manifest(other).is_verified(specs(dataset), "check")


def test_a_stale_conversion_is_warned_of_by_content_not_by_time(dataset, tmp_path):
    source = tmp_path / "raw.pt"
    source.write_bytes(b"before")
    enter(dataset, made_from=(SourceFile("../raw.pt", FileFingerprint.of(source)),))
    touch(source)
    open_store(dataset).close()
    source.write_bytes(b"behind")
    touch(source, 9)
    with pytest.warns(StaleDataWarning, match=r"was made from .*raw\.pt, which has changed"):
        open_store(dataset).close()
    source.unlink()
    open_store(dataset).close()


fifos = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")


@fifos
@pytest.mark.timeout(60)
def test_a_named_pipe_is_not_waited_for(dataset, tmp_path):
    os.mkfifo(tmp_path / "pipe.npy")
    empty = FileFingerprint(0, 1, "0" * 32)
    enter(dataset, made_from=(SourceFile("../pipe.npy", empty),))
    open_store(dataset).close()
    with pytest.raises(OSError, match="not a regular file"):
        FileFingerprint.of(tmp_path / "pipe.npy")
    (dataset / MANIFEST_NAME).unlink()
    os.mkfifo(dataset / MANIFEST_NAME)
    with pytest.raises(CorruptFileError, match="expected a regular file, found a named pipe"):
        open_store(dataset)


def test_a_source_that_is_no_data_file_is_not_read(dataset, tmp_path, monkeypatch):
    for name in ("secret", "raw.pt"):
        (tmp_path / name).write_bytes(b"before")
    opened = []
    real = FileFingerprint.of

    def of(path):
        opened.append(os.path.realpath(path))
        return real(path)

    monkeypatch.setattr(FileFingerprint, "of", of)
    for name in ("secret", "raw.pt"):
        enter(dataset, made_from=(SourceFile(str(tmp_path / name), FileFingerprint(6, 1, "0" * 32)),))
        opened.clear()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            open_store(dataset).close()
        assert {warning.category for warning in warned} == (set() if name == "secret" else {StaleDataWarning})
        assert (str(tmp_path / name) in opened) is (name == "raw.pt")


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_names_that_no_file_has_are_refused(dataset, name):
    known = read(dataset).to_json()
    part = {"size": 1, "mtime_ns": 2, "sample": None}
    sources = {**known, "files": {**known["files"]}}
    sources["files"]["a.safetensors"] = {**known["files"]["a.safetensors"], "made_from": [{"path": name, **part}]}
    columns = {"names": [name], "sizes": [1], "mtimes_ns": [1], "samples": [None]}
    generation = {"number": 1, "format": "npy", "files": columns, "parts": {}, "whole": {}}
    for raw in (
        sources,
        known | {"files": {name: {**part, "tensors": {}}}},
        known | {"verified": {"check": {name: part}}},
        VALID | {"format_version": 2, "generation": generation, "verified_parts": {}},
    ):
        (dataset / MANIFEST_NAME).write_text(json.dumps(raw))
        with pytest.raises(CorruptFileError, match=r"jasper_store\.json"):
            open_store(dataset)


VALID = {"format_version": 1, "files": {}, "verified": {}}
FINGERPRINT = {"size": 1, "mtime_ns": 2, "sample": None}


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
        json.dumps(VALID | {"files": {"../a": {**FINGERPRINT, "tensors": {}}}}),
        json.dumps(VALID | {"files": {"/a": {**FINGERPRINT, "tensors": {}}}}),
        json.dumps(VALID | {"files": {"a": {"size": 1}}}),
        json.dumps(VALID | {"files": {"a": {**FINGERPRINT, "size": "1", "tensors": {}}}}),
        json.dumps(VALID | {"files": {"a": {**FINGERPRINT, "size": -1, "tensors": {}}}}),
        json.dumps(VALID | {"files": {"a": {**FINGERPRINT, "tensors": {"a": {"dtype": 1, "shape": []}}}}}),
        json.dumps(VALID | {"files": {"a": {**FINGERPRINT, "tensors": {"a": {"dtype": "int8", "shape": [True]}}}}}),
        json.dumps(VALID | {"files": {"a": {**FINGERPRINT, "sample": "zz", "tensors": {}}}}),
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
        manifests.record_checks(dataset, specs(dataset), ["check"])


def test_writing_is_atomic(dataset, monkeypatch):
    before = (dataset / MANIFEST_NAME).read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConversionError, match="no room"):
        manifests.update(dataset, lambda old: replace(old, verified={}))
    assert (dataset / MANIFEST_NAME).read_bytes() == before
    assert sorted(p.name for p in dataset.iterdir()) == ["a.safetensors", "b.safetensors", MANIFEST_NAME]


def test_two_writers_lose_nothing(dataset):
    found = specs(dataset)
    threads = [
        threading.Thread(target=manifests.record_checks, args=(dataset, found, [f"check {i}"])) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read(dataset).verified) == {f"check {i}" for i in range(8)}


UPDATES = """
import sys
from pathlib import Path
from jasper_store.formats.base import Schema
from jasper_store.formats.registry import locate
from jasper_store.store.manifest_file import record_checks
specs = locate(Path(sys.argv[1]), "auto", Schema()).specs
for i in range(20):
    assert record_checks(sys.argv[1], specs, [f"{sys.argv[2]} {i}"])
"""


def test_two_processes_lose_nothing(dataset):
    children = [subprocess.Popen([sys.executable, "-c", UPDATES, str(dataset), name]) for name in ("a", "b")]
    assert [child.wait(120) for child in children] == [0, 0]
    assert set(read(dataset).verified) == {f"{name} {i}" for name in ("a", "b") for i in range(20)}
    assert sorted(p.name for p in dataset.iterdir()) == ["a.safetensors", "b.safetensors", MANIFEST_NAME]


@pytest.mark.filterwarnings("ignore:.*lock")
def test_writers_of_one_process_number_and_without_locks_corrupt_nothing(dataset, monkeypatch):
    """As in two containers on a file system of a network; threads have one number too."""

    def refuse(fd, operation):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    found, done = specs(dataset), []

    def update(name):
        for i in range(30):
            assert manifests.record_checks(dataset, found, [f"{name} {i}"])  # reads what the others wrote
        done.append(name)

    threads = [threading.Thread(target=update, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2, 3]
    assert read(dataset).verified  # of two updates at the same time one may be lost
    assert sorted(p.name for p in dataset.iterdir()) == ["a.safetensors", "b.safetensors", MANIFEST_NAME]


def test_a_planted_link_is_not_written_through(dataset, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    # The name that a temporary of the manifest had before names were drawn at random.
    planted = dataset / f".{MANIFEST_NAME}.{os.getpid()}.tmp"
    planted.symlink_to(victim)
    assert manifests.record_checks(dataset, specs(dataset), ["check"])
    assert victim.read_text() == "mine"
    assert read(dataset).is_verified(specs(dataset), "check")


def test_a_manifest_that_stays_locked_is_an_error_that_names_the_holder(dataset, monkeypatch):
    monkeypatch.setattr(manifests, "_LOCK_SECONDS", 0.05)
    with exclusive(dataset / manifests.MANIFEST_LOCK, "first"):
        with pytest.raises(ConversionError, match=rf"held by process {os.getpid()} on "):
            manifests.update(dataset, lambda old: old)
        assert not manifests.record_checks(dataset, specs(dataset), ["check"])


def test_a_fingerprint_samples_all_over_a_large_file(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(60 << 30)
    fingerprint = FileFingerprint.of(path)
    for position in (0, (60 << 30) - 1):
        with path.open("r+b") as file:
            file.seek(position)
            file.write(b"x")
        changed = FileFingerprint.of(path)
        assert changed.sample != fingerprint.sample
        fingerprint = changed
    assert FileFingerprint(fingerprint.size, 0, fingerprint.sample).matches(path)
    assert not FileFingerprint(fingerprint.size, 0, None).matches(path)
    assert not FileFingerprint(fingerprint.size - 1, fingerprint.mtime_ns, fingerprint.sample).matches(path)


def test_only_regular_files_have_fingerprints(tmp_path):
    with pytest.raises(OSError, match=r"directory|regular|denied"):
        FileFingerprint.of(tmp_path)
