"""Kills, full disks, read-only places, changing sources, two at once: the old data or the new, never a mixture."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jasper_store.conversion import rows, run as convert_run, writer as convert_writer
from jasper_store.conversion.checksum import checksum, checksum_of
from jasper_store.conversion.converter import convert, finish_interrupted
from jasper_store.conversion.manifest_batch import ManifestBatch
from jasper_store.conversion.writer import DirectoryWriter
from jasper_store.errors import ConversionError, CorruptFileError, DatasetNotFoundError
from jasper_store.formats.base import Schema
from jasper_store.formats.registry import locate
from jasper_store.store import manifest_file
from jasper_store.store.manifest import MANIFEST_NAME
from jasper_store.store.opening import open_store
from tests.conversion.samples import FORMAT_NAMES, write_pt

SHAPE = (10_000, 20)
NAMES = ("a", "b", "c")


# ---- kill -9


class Zygote:
    """Starts jobs in children of a process that has imported everything."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.answer() == "ready"

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def send(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def start(self, job: str, **options: Any) -> int:
        return int(
            self.send(json.dumps({"job": job, **{k: str(v) if isinstance(v, Path) else v for k, v in options.items()}}))
        )

    def wait(self) -> int:
        return int(self.send("wait"))

    def run(self, job: str, **options: Any) -> int:
        self.start(job, **options)
        return self.wait()

    def killed(self, after: float, job: str, **options: Any) -> bool:
        """Kill a job after some seconds; whether it was still running."""
        pid = self.start(job, **options)
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)  # a zombie that nobody has waited for takes the signal too
        return self.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    found = Zygote()
    yield found
    assert found.process.stdin is not None
    found.process.stdin.close()
    found.process.wait()
    assert found.process.stdout is not None
    found.process.stdout.close()


def make_source(directory: Path, value: float) -> Path:
    return write_pt(directory, {name: torch.full(SHAPE, value) for name in NAMES})


def state(directory: Path) -> set[float] | None:
    """The values of a dataset as it opens; ``None`` if it does not open. A tensor of mixed values has two."""
    try:
        found = locate(directory, "auto", Schema())
        recorded = manifest_file.read(directory)
        if recorded is not None:
            recorded.check(found.specs)
    except (DatasetNotFoundError, CorruptFileError):
        return None
    whole = {checksum_of(torch.full(SHAPE, value)): value for value in (0.0, 1.0)}
    assert {spec.name for spec in found.specs} == set(NAMES)
    return {whole[checksum(spec)] for spec in found.specs}


def hidden(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


Scene = tuple[dict[str, Any], Callable[[], None]]


def convert_new(root: Path) -> Scene:
    """In place, nothing there yet: the source must stay what opens until all is there."""
    source = make_source(root / "set", 1.0)
    return {"job": "convert", "src": source, "dst": None, "format": "npy", "overwrite": False}, lambda: None


def convert_over(root: Path, fmt: str) -> Scene:
    """Over an older dataset in another directory."""
    old, new = make_source(root / "old", 0.0), make_source(root / "new", 1.0)

    def restore() -> None:
        convert(old, root / "set", fmt, overwrite=True)

    return {"job": "convert", "src": new, "dst": root / "set", "format": fmt, "overwrite": True}, restore


def write_over(root: Path, fmt: str) -> Scene:
    def restore() -> None:
        with DirectoryWriter(root / "set", overwrite=True) as writer:
            for name in NAMES:
                writer.append(name, torch.zeros(SHAPE))

    return {"job": "write", "dst": root / "set", "format": fmt, "value": 1.0}, restore


SCENES: dict[str, Callable[[Path], Scene]] = {
    "convert, new": convert_new,
    "convert over files": lambda root: convert_over(root, "safetensors"),
    "convert over one file": lambda root: convert_over(root, "hdf5"),
    "write over files": lambda root: write_over(root, "safetensors"),
    "write over files, spooled": lambda root: write_over(root, "hdf5"),
}


def kill_at_random(zygote: Zygote, root: Path, scene: str, times: int, seed: int) -> None:
    options, restore = SCENES[scene](root)
    restore()
    started = time.monotonic()
    assert zygote.run(**options) == 0
    lasts = time.monotonic() - started
    rng = random.Random(seed)
    killed = 0
    for _ in range(10 * times):
        if killed == times:
            break
        if scene == "convert, new":
            for path in [*(root / "set").glob("*.npy"), root / "set" / MANIFEST_NAME]:
                path.unlink(missing_ok=True)
        restore()
        killed += zygote.killed(rng.uniform(0, lasts), **options)
        found = state(root / "set")
        # Between the commit and the last of its renames nothing opens, rather than a mixture; the next run, or
        # finish_interrupted, completes it. Where one rename publishes everything there is no such moment.
        if found is None:
            assert scene == "convert over files"
            assert finish_interrupted(root / "set")
            assert state(root / "set") == {1.0}
        else:
            assert found in ({0.0}, {1.0})
        assert zygote.run(**options) == 0
        assert state(root / "set") == {1.0}
        assert hidden(root / "set") == []
        assert hidden(root) == []
    assert killed == times


@pytest.mark.parametrize("scene", SCENES)
def test_killed_at_some_moments(zygote, tmp_path, scene):
    kill_at_random(zygote, tmp_path, scene, times=5, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
def test_killed_at_many_moments(zygote, tmp_path, scene):
    kill_at_random(zygote, tmp_path, scene, times=50, seed=2)


def test_two_converters_at_once(zygote, tmp_path):
    source = make_source(tmp_path / "pt", 1.0)
    for _ in range(3):
        zygote.start("convert", src=source, dst=tmp_path / "set", format="npy", overwrite=True)
        zygote.start("convert", src=source, dst=tmp_path / "set", format="npy", overwrite=True)
        # Both may succeed one after the other; never does the second spoil the first.
        assert 0 in (zygote.wait(), zygote.wait())
        assert state(tmp_path / "set") == {1.0}
        assert hidden(tmp_path / "set") == []


# ---- no room


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """No file may grow beyond this: a real refusal by the system in the middle of a write, for any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def mounted(path: Path, options: str) -> Iterator[Path]:
    """A small file system of its own."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.fixture
def unasked(monkeypatch):
    """As if another program had filled the disk after it was asked."""
    monkeypatch.setattr(convert_run, "require_space", lambda *args, **kwargs: None)


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize("fmt", [*FORMAT_NAMES, "gzip"])
def test_a_write_that_is_refused_leaves_the_old_data(tmp_path, fmt):
    fmt, compression = ("hdf5", "gzip") if fmt == "gzip" else (fmt, None)
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(SHAPE))
    source = write_pt(tmp_path / "pt", {"a": torch.zeros(3), "b": torch.zeros(4)})
    convert(source, tmp_path / "set", fmt, compression)
    before = snapshot(tmp_path / "set")
    torch.save(noise, source / "b.pt")
    with file_size_limit(300_000), pytest.raises(ConversionError, match="no room to finish"):
        convert(source, tmp_path / "set", fmt, compression, overwrite=True)
    assert snapshot(tmp_path / "set") == before
    convert(source, tmp_path / "set", fmt, compression, overwrite=True)
    assert {checksum(spec) for spec in locate(tmp_path / "set", fmt, Schema()).specs} >= {checksum_of(noise)}


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_a_writer_that_is_refused_leaves_nothing(tmp_path, fmt):
    writer = DirectoryWriter(tmp_path / "set", fmt)
    writer.append("a", torch.zeros(3))

    def fill() -> None:
        for _ in range(100):
            writer.append("b", torch.randn(1000, 20))

    with file_size_limit(300_000), pytest.raises(ConversionError, match="no room to finish"):
        fill()
    assert writer.closed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.root
@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_a_full_disk(tmp_path, fmt, unasked):
    source = make_source(tmp_path / "pt", 1.0)
    with mounted(tmp_path / "disk", "size=2m") as disk:
        with pytest.raises(ConversionError, match=r"no room to finish it \(No space left on device\)"):
            convert(source, disk / "set", fmt)
        # What was proven before the disk was full is kept for the next run, and nothing half.
        assert not (disk / "set").exists() or hidden(disk / "set") == []
        assert state(tmp_path / "pt") == {1.0}
        writer = DirectoryWriter(disk / "other", fmt)

        def fill() -> None:
            for _ in range(100):
                writer.append("b", torch.randn(1000, 20))

        with pytest.raises(ConversionError, match="No space left"):
            fill()
        assert [path.name for path in disk.iterdir()] in (["set"], [])


@pytest.mark.root
def test_a_disk_that_is_too_small_is_seen_before_the_first_byte(tmp_path):
    source = make_source(tmp_path / "pt", 1.0)
    with mounted(tmp_path / "disk", "size=2m") as disk:
        with pytest.raises(ConversionError, match=r"needs 2,4.. ... bytes|needs 2,[0-9,]+ bytes.*Nothing was written"):
            convert(source, disk / "set")
        assert list(disk.iterdir()) == []


# ---- read-only


@pytest.mark.root
def test_a_read_only_disk(tmp_path):
    source = make_source(tmp_path / "pt", 1.0)
    with mounted(tmp_path / "disk", "size=8m") as disk:
        convert(source, disk / "set", tensors=["a"])
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(ConversionError, match="expected to be able to write"):
            convert(source, disk / "set")
        with pytest.raises(ConversionError, match="expected to be able to write"):
            convert(source, disk / "new")
        with pytest.raises(ConversionError, match="expected to be able to write"):
            DirectoryWriter(disk / "new")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; the read-only mount is root's test of this")
def test_a_read_only_directory(tmp_path):
    source = make_source(tmp_path / "pt", 1.0)
    (tmp_path / "set").mkdir(mode=0o555)
    with pytest.raises(ConversionError, match="expected to be able to write"):
        convert(source, tmp_path / "set")
    with pytest.raises(ConversionError, match="expected to be able to write"):
        DirectoryWriter(tmp_path / "set" / "new")


# ---- a source that changes


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(200_000)
        file.write(b"changed")


def replace(path: Path) -> None:
    torch.save(torch.zeros(SHAPE), path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [truncate, rewrite, replace, Path.unlink])
@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_a_source_that_changes_is_not_published(tmp_path, monkeypatch, fmt, change):
    monkeypatch.setattr(rows, "BLOCK_NBYTES", 1 << 14)
    source = write_pt(tmp_path / "pt", {"a": torch.ones(SHAPE), "b": torch.ones(3)})
    changed: list[str] = []

    def progress(name: str, done: int, total: int) -> None:
        if name == "a" and not changed:
            changed.append(name)
            change(source / "a.pt")

    with pytest.raises(ConversionError, match=r"a\.pt: expected the file to stay as it is"):
        convert(source, tmp_path / "set", fmt, progress=progress)
    assert not list((tmp_path / "set").glob("a.*"))
    assert not list((tmp_path / "set").glob("*.h5"))
    assert not (tmp_path / "set").exists() or hidden(tmp_path / "set") == []


def test_a_conversion_that_was_killed_is_finished_by_one_that_overwrites(tmp_path, monkeypatch):
    """Files are there that no entry names, and the manifest says that more are to come."""
    source = write_pt(tmp_path / "pt", {name: torch.ones(SHAPE) for name in NAMES})

    def kill(name: str, done: int, total: int) -> None:
        if name == NAMES[-1]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ManifestBatch, "write", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "set", progress=kill)
    with pytest.raises(CorruptFileError, match="not finished"):
        open_store(tmp_path / "set")
    convert(source, tmp_path / "set", overwrite=True)
    with open_store(tmp_path / "set") as store:
        assert sorted(store) == sorted(NAMES)


def test_half_of_a_ragged_tensor_beside_its_source_is_passed_over(tmp_path):
    """A conversion beside the source that was cut between the two files of a ragged tensor."""
    source = write_pt(tmp_path / "pt", {"a": torch.ones(3), "words": [[1], [2, 3], []]})
    convert(source, source)
    (source / "words.offsets.safetensors").unlink()
    (source / MANIFEST_NAME).unlink()
    with open_store(source) as store:
        assert store.ragged("words")[1].tolist() == [2, 3]
        assert {spec.path.suffix for spec in store.specs} == {".pt"}


# ---- what ends a writer


def test_a_failing_close_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError(5, "Input/output error")

    writer = DirectoryWriter(tmp_path / "set")
    writer.append("a", torch.zeros(3))
    monkeypatch.setattr(convert_writer, "sync_file", fail)
    with pytest.raises(ConversionError, match="Input/output error"):
        writer.close()
    assert list(tmp_path.iterdir()) == []
