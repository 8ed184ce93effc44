"""Append, shards, commit, compact: what is published, what it costs, what is refused."""

from __future__ import annotations

import copy
import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jasper_store as js
from jasper_store.conversion.compact import compact
from jasper_store.conversion.generations import publish
from jasper_store.conversion.verify import verify_files
from jasper_store.conversion.writer import DirectoryWriter
from jasper_store.errors import (
    ConversionError,
    CorruptFileError,
    DatasetNotFoundError,
    DeclarationError,
    IncompatibleOptionsError,
    IntegrityError,
    UnknownNameError,
)
from jasper_store.files import atomic
from jasper_store.formats.base import Schema
from jasper_store.formats.generation import Generation, read_generation
from jasper_store.formats.part_columns import PartedTensor, PartFiles
from jasper_store.formats.registry import locate
from jasper_store.store import manifest_file
from jasper_store.store.manifest import MANIFEST_NAME, Manifest
from jasper_store.store.opening import open_store
from tests.conversion.samples import FORMAT_NAMES

WORDS = [[i] * (i % 3) for i in range(30)]
ROWS = torch.arange(120, dtype=torch.float32).view(30, 4)


def fill(writer: DirectoryWriter, start: int, stop: int, *, ragged: bool = True) -> None:
    writer.append("emb", ROWS[start:stop])
    writer.append("label", torch.arange(start, stop))
    if ragged:
        writer.append_ragged("words", WORDS[start:stop])


def base(root: Path, fmt: str = "safetensors", stop: int = 10, *, ragged: bool = True) -> Path:
    with DirectoryWriter(root / "set", fmt) as writer:
        fill(writer, 0, stop, ragged=ragged and fmt != "pt")
        writer.append("scale", 0.5)
    return root / "set"


def appended(where: Path, start: int, stop: int, *, ragged: bool = True) -> None:
    with DirectoryWriter(where, mode="append") as writer:
        fill(writer, start, stop, ragged=ragged)


def require_rows(where: Path, stop: int, *, ragged: bool = True) -> None:
    for use_mmap in (True, False):
        with open_store(where, use_mmap=use_mmap) as store:
            assert store["emb"].shape == (stop, 4)
            assert torch.equal(store["emb"].take(torch.arange(stop)), ROWS[:stop])
            assert torch.equal(store["label"].take(torch.arange(stop)), torch.arange(stop))
            if ragged:
                words = store.ragged("words")
                assert [words[i].tolist() for i in range(stop)] == WORDS[:stop]


# ---- append


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_appends_follow_what_is_there(tmp_path, fmt):
    ragged = fmt != "pt"  # a .pt list of lists has no rows to follow
    where = base(tmp_path, fmt)
    before = {path: path.read_bytes() for path in where.rglob("*") if path.is_file() and path.name != MANIFEST_NAME}
    for start, stop in ((10, 11), (11, 20), (20, 30)):
        appended(where, start, stop, ragged=ragged)
        require_rows(where, stop, ragged=ragged)
    assert {path: path.read_bytes() for path in before} == before
    found = read_generation(where)
    assert found is not None
    assert found.number == 3
    report = verify_files(where)
    assert report.ok
    assert not report.warnings


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_a_reader_keeps_the_generation_that_it_opened(tmp_path, fmt):
    where = base(tmp_path, fmt, ragged=False)
    readers = {10: open_store(where, use_mmap=True)}
    for start, stop in ((10, 15), (15, 20)):
        appended(where, start, stop, ragged=False)
        readers[stop] = open_store(where, use_mmap=True)
    compact(where)
    for stop, store in readers.items():
        # A worker that starts now opens the generation that its parent had, not the newest.
        twin = copy.deepcopy(store)
        for each in (store, twin, pickle.loads(pickle.dumps(store)), pickle.loads(pickle.dumps(twin))):
            assert each["emb"].shape == (stop, 4)
            assert torch.equal(each["emb"].take(torch.arange(stop)), ROWS[:stop])
            each.close()


def test_files_that_no_manifest_names_are_invisible(tmp_path):
    where = base(tmp_path)
    appended(where, 10, 12)
    (where / "part-000002").mkdir()
    np.save(where / "part-000002" / "emb.npy", np.zeros((3, 4), np.float32))
    np.save(where / "emb_00.npy", np.zeros((3, 4), np.float32))
    require_rows(where, 12)
    appended(where, 12, 20)  # which takes the name of the stray directory
    require_rows(where, 20)
    assert sorted(path.name for path in where.glob("part-*")) == ["part-000001", "part-000002"]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("emb", torch.zeros(2, 5), r"float32 rows of shape \[4\].*found float32 rows of shape \[5\]"),
        ("emb", torch.zeros(2, 4, dtype=torch.float64), "found float64"),
        ("other", torch.zeros(2), r"one of the dataset's tensors \(emb, label, scale"),
        ("scale", torch.tensor(1.0), "a scalar, which has no rows"),
        ("words.offsets", torch.zeros(2, dtype=torch.int64), "append_ragged"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, name, rows, message):
    where = base(tmp_path)
    writer = DirectoryWriter(where, mode="append")
    with pytest.raises(IntegrityError, match=message):
        writer.append(name, rows)
    fill(writer, 10, 12)  # what was refused spoils nothing
    writer.close()
    require_rows(where, 12)


def test_tensors_grow_alike(tmp_path):
    where = base(tmp_path)
    before = (where / MANIFEST_NAME).read_bytes()
    for missing in ("emb", "words"):
        writer = DirectoryWriter(where, mode="append")
        if missing != "emb":
            writer.append("emb", ROWS[10:12])
        writer.append("label", torch.arange(10, 12))
        if missing != "words":
            writer.append_ragged("words", WORDS[10:12])
        with pytest.raises(IntegrityError, match="to grow alike"):
            writer.close()
    assert (where / MANIFEST_NAME).read_bytes() == before
    assert not list(where.glob("*part*"))
    require_rows(where, 10)


def test_a_declaration_says_what_grows_alike(tmp_path):
    """Here three tensors have four rows, and only the two that a sample is numbered by have to agree."""
    fields = {"query": "emb[i]", "positive": "pool[answer[i]]"}
    with js.DatasetWriter(tmp_path / "set", samples=fields) as writer:
        writer.append("emb", ROWS[:4])
        writer.append("pool", ROWS[:4])
        writer.append("answer", torch.arange(4))
    with js.DatasetWriter(tmp_path / "set", mode="append") as writer:
        writer.append("pool", ROWS[4:9])
    with js.Dataset(tmp_path / "set") as data:
        assert len(data) == 4
    writer = js.DatasetWriter(tmp_path / "set", mode="append")
    writer.append("emb", ROWS[4:5])
    with pytest.raises(DeclarationError):
        writer.close()
    with js.DatasetWriter(tmp_path / "set", mode="append") as writer:
        writer.append("emb", ROWS[4:5])
        writer.append("answer", torch.tensor([8]))
    with js.Dataset(tmp_path / "set") as data:
        assert torch.equal(data[4]["positive"], ROWS[8])
    with js.Dataset(tmp_path / "set") as data:  # checked once: the manifest remembers this generation's check
        known = manifest_file.read(tmp_path / "set")
        assert known is not None
        assert known.verified_parts
        assert len(data) == 5


def test_compressed_tensors_do_not_grow(tmp_path):
    with DirectoryWriter(tmp_path / "set", "hdf5", compression="gzip") as writer:
        writer.append("emb", ROWS)
    writer = DirectoryWriter(tmp_path / "set", mode="append")
    with pytest.raises(IntegrityError, match="compressed"):
        writer.append("emb", ROWS)
    writer.abandon()
    with pytest.raises(ConversionError, match="expected at least one tensor"):
        DirectoryWriter(tmp_path / "set", mode="append").close()


def test_a_second_appender_is_refused(tmp_path):
    where = base(tmp_path)
    first = DirectoryWriter(where, mode="append")
    for refused in (lambda: DirectoryWriter(where, mode="append"), lambda: js.commit(where), lambda: compact(where)):
        with pytest.raises(ConversionError, match=f"held by process {os.getpid()}"):
            refused()
    fill(first, 10, 12)
    first.close()
    require_rows(where, 12)


def test_options_that_make_no_sense(tmp_path):
    where = base(tmp_path)
    refused: list[dict[str, Any]] = [{"compression": "gzip"}, {"overwrite": True}, {"config": {}}]
    for options in refused:
        with pytest.raises(IncompatibleOptionsError):
            DirectoryWriter(where, mode="append", **options)
    for shard, shards in ((2, 2), (-1, 2), (None, 2), (0, None)):
        with pytest.raises(IncompatibleOptionsError, match="from 0 to shards - 1"):
            DirectoryWriter(tmp_path / "new", shard=shard, shards=shards)
    with pytest.raises(UnknownNameError, match="'create', 'append'"):
        DirectoryWriter(where, mode="add")
    with pytest.raises(ConversionError, match="without mode='append'"):
        DirectoryWriter(tmp_path / "none", mode="append")
    with pytest.raises(ConversionError, match="pass mode='append'"):
        DirectoryWriter(where, shard=0, shards=2)
    appended(where, 10, 12)
    with pytest.raises(ConversionError, match="holds no dataset in parts"):
        js.convert(where, format="npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_appending_one_percent_costs_one_percent(tmp_path):
    """Bytes through read and write calls, as the system counts them; of a dataset whose manifest knows its files."""
    rows = torch.randn(1_000, 1_000)
    with DirectoryWriter(tmp_path / "set") as writer:
        for _ in range(20):
            writer.append("emb", rows)  # 80 MB in all
    before = io_counters()
    with DirectoryWriter(tmp_path / "set", mode="append") as writer:
        writer.append("emb", rows[:200])
    read, written = (after - start for after, start in zip(io_counters(), before, strict=True))
    share = 200 * rows.shape[1] * 4  # 0.8 MB
    assert share <= written < 1.05 * share
    # The fingerprint of the new file and the manifest, and no old value.
    assert read < 1.1 * share


def io_counters() -> tuple[int, int]:
    """Bytes that this process has read and written by system calls."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"]), int(lines["wchar"])


# ---- shards


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_shards_are_published_together(tmp_path, fmt):
    where = tmp_path / "set"
    for shard in (2, 0, 1, 0):  # the last one replaces its shard
        with js.DatasetWriter(where, fmt, shard=shard, shards=3, config={"answer": 42}) as writer:
            fill(writer, 10 * shard, 10 * shard + 10)
        with pytest.raises(DatasetNotFoundError):
            locate(where, "auto", Schema())
        assert not (where / "config.json").exists()
    js.commit(where)
    require_rows(where, 30)
    assert json.loads((where / "config.json").read_text()) == {"answer": 42}
    assert js.verify(where).ok
    with pytest.raises(ConversionError, match="newest generation is 1"):
        js.commit(where)
    for shard in range(2):
        with js.DatasetWriter(where, shard=shard, shards=2, mode="append") as writer:
            fill(writer, 0, 5)
    js.commit(where)
    with open_store(where) as store:
        assert torch.equal(store["emb"].take(torch.arange(30, 40)), ROWS[:5].repeat(2, 1))
        assert [store.ragged("words")[i].tolist() for i in range(30, 40)] == WORDS[:5] * 2


def test_a_commit_names_every_shard_that_is_missing(tmp_path):
    for shard in (1, 4):
        with DirectoryWriter(tmp_path / "set", shard=shard, shards=6) as writer:
            fill(writer, 0, 5)
    with pytest.raises(ConversionError, match=r"missing: 0, 2, 3, 5\."):
        js.commit(tmp_path / "set")
    with DirectoryWriter(tmp_path / "set", shard=0, shards=2) as writer:
        fill(writer, 0, 5)
    with pytest.raises(ConversionError, match="some of 2 and some of 6"):
        js.commit(tmp_path / "set")


def test_shards_that_do_not_fit_stay_where_they_are(tmp_path):
    where = tmp_path / "set"
    other = torch.zeros(5, 3)
    for shard, rows in enumerate((ROWS[:5], other)):
        with DirectoryWriter(where, shard=shard, shards=2) as writer:
            writer.append("emb", rows)
    with pytest.raises(IntegrityError, match=r"rows of shape \[4\], as shard 0 has"):
        js.commit(where)
    with DirectoryWriter(where, shard=1, shards=2) as writer:
        writer.append("other", other)
    with pytest.raises(IntegrityError, match="a difference in emb, other"):
        js.commit(where)
    running = DirectoryWriter(where, shard=1, shards=2)
    with pytest.raises(ConversionError, match="held by process"):
        js.commit(where)
    running.append("emb", ROWS[5:10])
    running.close()
    js.commit(where)
    with open_store(where) as store:
        assert torch.equal(store["emb"].take(torch.arange(10)), ROWS[:10])


def test_a_shard_that_was_changed_is_refused(tmp_path):
    where = tmp_path / "set"
    with DirectoryWriter(where, shard=0, shards=1) as writer:
        fill(writer, 0, 5)
    file = where / ".shards" / "00000-of-00001" / "emb.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptFileError, match="replaced"):
        js.commit(where)


# ---- compact


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_compact_makes_one_part(tmp_path, fmt):
    ragged = fmt != "pt"
    where = base(tmp_path, fmt)
    for start in range(10, 30, 5):
        appended(where, start, start + 5, ragged=ragged)
    report = compact(where)
    assert report.generation == 5
    assert report.parts["emb"] == 5
    assert report.kept
    require_rows(where, 30, ragged=ragged)
    again = compact(where, remove_old=True)
    assert again.parts == {}
    assert again.removed == report.kept
    require_rows(where, 30, ragged=ragged)
    assert js.verify(where).ok
    assert [path.name for path in where.glob("part-*")] == ["part-000005"]
    with pytest.raises(DatasetNotFoundError, match="a compaction removed its files"):
        locate(where, "auto", Schema(), generation=4)
    appended(where, 0, 1, ragged=ragged)
    assert compact(where, remove_old=True).parts["emb"] == 2


def test_numbered_files_are_compacted(tmp_path):
    for number in range(3):
        np.save(tmp_path / f"emb_{number:02}.npy", ROWS[10 * number : 10 * number + 10].numpy())
    assert compact(tmp_path).parts == {"emb": 3}
    with open_store(tmp_path) as store:
        assert torch.equal(store["emb"].take(torch.arange(30)), ROWS)
    assert len(list(tmp_path.glob("emb_*.npy"))) == 3


def test_damage_is_found_part_by_part(tmp_path):
    where = base(tmp_path, ragged=False)
    appended(where, 10, 20, ragged=False)
    file = where / "part-000001" / "emb.safetensors"
    facts = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    (found,) = verify_files(where).errors
    assert found.check == "checksum"
    assert "part-000001" in found.message
    file.write_bytes(content[:-1])
    with pytest.raises(CorruptFileError, match="truncated"):
        open_store(where)
    file.unlink()
    with pytest.raises(CorruptFileError, match="part-000001"):
        open_store(where)
    assert {finding.check for finding in verify_files(where).errors} == {"missing"}


# ---- the manifest


def test_a_copy_is_recognised(tmp_path):
    where = base(tmp_path)
    appended(where, 10, 20)
    for file in where.rglob("*.safetensors"):
        os.utime(file, ns=(0, 0))
    require_rows(where, 20)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["generation"]["files"]["names"].__setitem__(0, "../x.safetensors"),
        lambda raw: raw["generation"]["files"]["sizes"].pop(),
        lambda raw: raw["generation"]["parts"]["emb"]["offsets"].__setitem__(1, 2**62),
        lambda raw: raw["generation"]["parts"]["emb"]["rows"].__setitem__(1, 2**62),
        lambda raw: raw["generation"]["parts"]["emb"]["rows"].__setitem__(1, -1),
        lambda raw: raw["generation"]["parts"]["emb"]["rows"].__setitem__(1, 1.5),
        lambda raw: raw["generation"]["parts"]["emb"]["rows"].__setitem__(1, [1]),
        lambda raw: raw["generation"]["parts"]["emb"]["files"].__setitem__(1, 99),
        lambda raw: raw["generation"]["parts"]["emb"].__setitem__("row_shape", [2**40, 2**40]),
        lambda raw: raw["generation"]["parts"]["emb"].__setitem__("row_shape", 4),
        lambda raw: raw["generation"]["parts"]["emb"].__setitem__("dtype", "nn"),
        lambda raw: raw["generation"]["parts"].__setitem__("emb", None),
        lambda raw: raw["generation"].__setitem__("number", True),
        lambda raw: raw["generation"].__setitem__("format", []),
        lambda raw: raw.__setitem__("generation", 3),
        lambda raw: raw.__setitem__("format_version", 1),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path, change):
    where = base(tmp_path)
    appended(where, 10, 20)
    raw = json.loads((where / MANIFEST_NAME).read_text())
    change(raw)
    (where / MANIFEST_NAME).write_text(json.dumps(raw))
    with pytest.raises(CorruptFileError, match=MANIFEST_NAME) as caught:
        open_store(where)
    assert "delete it" not in str(caught.value)


def test_ten_thousand_parts_are_read_in_columns(tmp_path):
    """A manifest of 10 000 parts in as many files: its size, and that nothing of a part is read on opening."""
    count = 10_000
    each = np.arange(count, dtype=np.int64)
    files = PartFiles(
        tuple(f"part-{i:06d}/emb.safetensors" for i in range(count)),
        np.full(count, 5_120, np.int64),
        np.full(count, time.time_ns(), np.int64),
        ("0" * 32,) * count,
    )
    rows = np.full(count, 2, np.int64)
    columns = (each, np.full(count, 4_096, np.int64), rows, each + 1, np.zeros(count, np.int64))
    tensor = PartedTensor(torch.float32, (128,), *columns, ("0" * 32,) * count)
    publish(tmp_path, None, Generation(count, "safetensors", files, {"emb": tensor}))
    assert (tmp_path / MANIFEST_NAME).stat().st_size < 200 * count
    found = read_generation(tmp_path)
    assert found is not None
    assert found.digest() == Generation(count, "safetensors", files, {"emb": tensor}).digest()
    assert found.tensors["emb"].n_rows(count) == 2 * count
    assert found.tensors["emb"].n_rows(7) == 14
    with pytest.raises(CorruptFileError, match="part-000000"):
        open_store(tmp_path)


# ---- publishing


def test_a_new_directory_opens_when_all_of_it_is_there(tmp_path, monkeypatch):
    """The configuration and the manifest come before the first file; until the last one the manifest says so."""
    source = base(tmp_path)
    (source / "config.json").write_text("{}")
    seen: list[tuple[str, bool]] = []
    real = atomic.publish

    def publish_and_look(temporary: Path, target: Path) -> None:
        real(temporary, target)
        if target.suffix == ".npy":
            assert (tmp_path / "new" / "config.json").is_file()
            with pytest.raises(CorruptFileError, match="not finished"):
                open_store(tmp_path / "new")
            seen.append((target.name, True))

    monkeypatch.setattr("jasper_store.conversion.run.publish", publish_and_look)
    js.convert(source, tmp_path / "new", "npy")
    assert len(seen) == 5
    require_rows(tmp_path / "new", 10)
    known = manifest_file.read(tmp_path / "new")
    assert known is not None
    assert known.pending == ()


def test_a_conversion_that_failed_is_finished_by_the_next(tmp_path):
    source = base(tmp_path)

    def stop(_name: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        js.convert(source, tmp_path / "new", "npy", progress=stop)
    with pytest.raises(CorruptFileError, match="not finished"):
        open_store(tmp_path / "new")
    js.convert(source, tmp_path / "new", "npy")
    require_rows(tmp_path / "new", 10)


def test_overwriting_exchanges_the_directory(tmp_path, monkeypatch):
    """An opening finds the old dataset or the new one; other files stay, and open files are kept."""
    one = base(tmp_path / "one", stop=10)
    two = base(tmp_path / "two", stop=20)
    js.convert(one, tmp_path / "set", "npy")
    (tmp_path / "set" / "notes.txt").write_text("mine")
    inode = (tmp_path / "set").stat().st_ino
    with open_store(tmp_path / "set", use_mmap=True) as reader:
        js.convert(two, tmp_path / "set", "npy", overwrite=True)
        assert reader["emb"].shape == (10, 4)
        assert torch.equal(reader["emb"].take(torch.arange(10)), ROWS[:10])
    assert (tmp_path / "set").stat().st_ino != inode
    assert (tmp_path / "set" / "notes.txt").read_text() == "mine"
    require_rows(tmp_path / "set", 20)
    assert js.verify(tmp_path / "set").ok
    monkeypatch.setattr(atomic, "_renameat2", lambda: None)
    js.convert(one, tmp_path / "set", "npy", overwrite=True)  # file after file
    require_rows(tmp_path / "set", 10)
    assert [path.name for path in tmp_path.iterdir() if path.name[0] == "."] == []


def test_a_writer_replaces_a_dataset_in_parts(tmp_path):
    where = base(tmp_path)
    appended(where, 10, 20)
    with DirectoryWriter(where, overwrite=True) as writer:
        fill(writer, 0, 3)
    require_rows(where, 3)
    assert read_generation(where) is None


def test_a_generation_published_meanwhile_is_not_lost(tmp_path):
    where = base(tmp_path)
    appended(where, 10, 20)
    found = read_generation(where)
    assert found is not None
    with pytest.raises(ConversionError, match="another writer published"):
        publish(where, None, found)
    assert isinstance(manifest_file.read(where), Manifest)
