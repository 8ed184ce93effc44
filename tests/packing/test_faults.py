"""Packing that is killed, that has no room, and that has little memory."""

from __future__ import annotations

import errno
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import jasper_store as js
from jasper_store.conversion import generations
from jasper_store.errors import ConversionError, StaleDataWarning
from jasper_store.formats.generation import read_generation
from jasper_store.packing import pack as packing, parts, repack as repacking, writer
from tests.builders import build_pt_dataset
from tests.conversion.test_faults import Zygote, file_size_limit
from tests.packing.packs import require_same

PART = Path("part-000001") / "packed.safetensors"


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    found = Zygote()
    yield found
    assert found.process.stdin is not None
    assert found.process.stdout is not None
    found.process.stdin.close()
    found.process.wait()
    found.process.stdout.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pt_dataset(
        tmp_path_factory.mktemp("source") / "data", n_pairs=8_000, dim=64, n_questions=900, n_sources=900
    )


@pytest.fixture(scope="module")
def whole(source: Path) -> bytes:
    js.pack(source, source.parent / "whole")
    return (source.parent / "whole" / PART).read_bytes()


def kill_at_random(zygote: Zygote, source: Path, whole: bytes, root: Path, times: int, seed: int) -> None:
    target, rng = root / "packed", random.Random(seed)
    started = time.monotonic()
    assert zygote.run("pack", src=source, dst=target) == 0
    lasts = time.monotonic() - started
    killed = continued = 0
    for _ in range(10 * times):
        if killed == times:
            break
        shutil.rmtree(target, ignore_errors=True)
        killed += zygote.killed(rng.uniform(0, lasts), "pack", src=source, dst=target)
        if target.exists():
            assert js.verify(target).ok
            # Killed between publishing and the end: the file is left, the lock is not held.
            (root / ".packed.jasper_store.lock").unlink(missing_ok=True)
        else:
            hidden = root / ".packed.packing"
            continued += hidden.exists() and any(hidden.rglob("progress.jsonl"))
            assert zygote.run("pack", src=source, dst=target) == 0
        assert (target / PART).read_bytes() == whole
        assert [path.name for path in root.iterdir()] == ["packed"]
    assert killed == times
    assert continued


def test_killed_at_some_moments(zygote: Zygote, source: Path, whole: bytes, tmp_path: Path) -> None:
    kill_at_random(zygote, source, whole, tmp_path, times=6, seed=1)


@pytest.mark.slow
def test_killed_at_many_moments(zygote: Zygote, source: Path, whole: bytes, tmp_path: Path) -> None:
    kill_at_random(zygote, source, whole, tmp_path, times=60, seed=2)


def test_columns_killed_while_they_are_written_anew(zygote: Zygote, source: Path, tmp_path: Path) -> None:
    base, target, rng = tmp_path / "base", tmp_path / "packed", random.Random(3)
    js.pack(source, base)
    killed = 0
    for _ in range(60):
        if killed == 4:
            break
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(base, target)
        killed += zygote.killed(rng.uniform(0, 0.3), "pack", src=source, dst=target, columns=["negative_embs"])
        found = read_generation(target)
        assert found is not None
        assert found.number in {1, 2}
        require_same(source, target, "val", epochs=(40,))
        assert zygote.run("pack", src=source, dst=target, columns=["negative_embs"]) == 0
        require_same(source, target, "val", epochs=(40,))
        assert [path.name for path in target.iterdir() if path.name[0] == "."] == []
    assert killed == 4


def test_a_run_continues_where_the_one_before_stopped(
    source: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    real, limit = writer.ColumnWriter._write, 4
    runs: list[list[str]] = [[]]

    def write(self: writer.ColumnWriter, each: writer._Pass, rows: Any) -> None:
        if len(runs[-1]) == limit:
            raise Killed
        runs[-1].append(each.key(self._layout))
        real(self, each, rows)

    monkeypatch.setattr(writer.ColumnWriter, "_write", write)
    with pytest.raises(Killed):
        js.pack(source, tmp_path / "packed")
    runs.append([])
    limit = 1000
    report = js.pack(source, tmp_path / "packed")
    assert report.resumed
    assert len(runs[0]) == 4
    assert not {*runs[0]} & {*runs[1]}
    assert (tmp_path / "packed" / PART).read_bytes() == whole


def test_other_options_begin_anew(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parts, "_write_index", stop)
        with pytest.raises(KeyboardInterrupt):
            js.pack(source, tmp_path / "packed")
    assert (tmp_path / ".packed.packing").exists()
    assert not js.pack(source, tmp_path / "packed", seed=9).resumed
    require_same(source, tmp_path / "packed", "test")


def test_no_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(parts, "require_space", lambda *_, **__: None)  # as if another program had filled the disk
        with file_size_limit(1_000_000), pytest.raises(ConversionError, match="no room to finish"):
            js.pack(source, tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 5, 5))
    with pytest.raises(ConversionError, match=r"packing needs .* found 5 bytes free"):
        js.pack(source, tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("refused", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_allocation(
    source: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    """As NFS before 4.2 or many a FUSE: posix_fallocate ended packing there ("Bad file descriptor")."""
    monkeypatch.setattr("jasper_store.packing.block_file.fallocate", lambda *_: refused)
    js.pack(source, tmp_path / "packed")
    assert (tmp_path / "packed" / PART).read_bytes() == whole


MEASURED = """
import json, sys, threading, torch
import jasper_store as js
from pathlib import Path
from tests.conversion.measured import anonymous
source, target, small = map(Path, sys.argv[1:4])
js.pack(small, target / "first", memory_limit=64 << 20)
before = peak = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
report = js.pack(source, target / "packed", memory_limit=64 << 20)
done.set()
thread.join()
print(json.dumps({"taken": peak - before, "nbytes": report.nbytes}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status")
def test_memory_is_bounded(tmp_path: Path) -> None:
    small = build_pt_dataset(tmp_path / "small", n_pairs=300, dim=384)
    source = build_pt_dataset(tmp_path / "data", n_pairs=60_000, dim=384, n_questions=60_000, n_sources=60_000, n_neg=3)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, source, tmp_path, small], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["nbytes"] > 600 << 20
    # The limit, and free blocks that the pool of batches keeps (128 MiB), buffers and lists of rows.
    assert found["taken"] < (64 + 160) << 20
    assert torch.load(source / "steering_centroid.pt", mmap=True).nbytes > 64 << 20
    require_same(source, tmp_path / "packed", "val", epochs=(40,))


class Cut(BaseException):
    """The process is at its end here."""


def test_nothing_of_a_run_that_was_cut_is_published(
    source: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(hidden: Path, target: Path, *, overwrite: bool) -> None:
        # As a power failure may leave it: the new name is there, and the old one as well.
        (hidden / ".config.json.1-0.tmp").write_bytes((hidden / "config.json").read_bytes())
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(packing, "publish", cut)
        with pytest.raises(Cut):
            js.pack(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    js.pack(source, tmp_path / "packed")
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == [
        "config.json",
        "jasper_store.json",
        "part-000001",
    ]
    assert (tmp_path / "packed" / PART).read_bytes() == whole


def test_the_step_that_publishes_columns_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut just before it, or just after: the configuration says of each what that was packed from."""
    source, packed = build_pt_dataset(tmp_path / "source", n_pairs=203, dim=16), tmp_path / "packed"
    js.pack(source, packed)
    js.mine_negatives(source, 3, seed=5)

    def cut(*_: object) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(repacking, "publish", cut)
        with pytest.raises(Cut):
            js.pack(source, packed, columns=["negative_embs", "negative_tiers"])
    with pytest.warns(StaleDataWarning, match="was packed from files that have changed"):
        js.JASPERSteeringDataset(packed, "train").close()
    real = generations.publish

    def publish_and_cut(*given: Any) -> None:
        real(*given)
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(repacking, "publish", publish_and_cut)
        with pytest.raises(Cut):
            js.pack(source, packed, columns=["negative_embs", "negative_tiers"])
    require_same(source, packed)  # any warning is an error here
