"""The power fails at the syncs of everything that writes: the generation before or after is there, whole, every time."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

import jasper_store as js
from jasper_store.building.negatives import MINED
from jasper_store.conversion.checksum import checksum_of
from jasper_store.conversion.verify import verify_files
from jasper_store.errors import JasperStoreError
from jasper_store.samples.opened import packed_at
from jasper_store.samples.packed import PACKED_KEY
from jasper_store.store.opening import open_store
from tests.power.operations import Disk, Loss, sync_points
from tests.power.scenes import SCENES, Scene

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs /dev/fuse"),  # noqa: PTH110
    pytest.mark.filterwarnings("ignore::jasper_store.errors.JasperStoreWarning"),  # the recorder counts as a network
]

Contents = dict[str, Any] | None
"""Checksum of every tensor, and ``config.json``; ``None`` where nothing opens."""

LOSSES: tuple[Loss, ...] = get_args(Loss)
_SOMES = 3  # choices of what is lost, at each sync


@contextlib.contextmanager
def recorded(mountpoint: Path, log: Path) -> Iterator[Path]:
    """A directory whose operations are recorded; the list is written when the block ends."""
    mountpoint.mkdir()
    script = Path(__file__).with_name("recorder.py")
    process = subprocess.Popen([sys.executable, script, mountpoint, log], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield mountpoint
    finally:
        gc.collect()  # maps that a failing test still holds
        ctypes.CDLL(None).umount2(os.fsencode(mountpoint), 2)
        process.wait(20)
        process.stdout.close()


def contents(root: Path) -> Contents:
    """What opens, every value of it read; what does not open is ``None`` whatever the reason."""
    config = root / "config.json"
    known = json.loads(config.read_bytes()) if config.exists() else {}
    # Any HDF5 file counts as a JASPER dataset, which those of other scenes are not.
    opener = js.open if "embedding_dim" in known else open_store
    try:
        with opener(root, use_mmap=True) as store:
            found: dict[str, Any] = {spec.name: checksum_of(store[spec.name][:]) for spec in store.specs}
    except JasperStoreError:
        return None
    # The key of negatives that are not (or no longer) there counts for nothing.
    if any(found.get(name) != digest for name, digest in known.get(MINED, {}).get("tensors", {}).items()):
        del known[MINED]
    # Of packed samples it says what they were packed from for two generations, of which one is there.
    packed = packed_at(root)
    known = {key: value for key, value in known.items() if key != "created_at"}
    return found | {"config": known if packed is None else known | {PACKED_KEY: packed}}


@dataclass
class Recording:
    """A job that was done once, with all operations.

    Attributes:
        disk: what was done.
        start: position at which the job began; everything before is on the disk.
        end: position at which it had returned.
        before, after: what opens.
    """

    disk: Disk
    start: int
    end: int
    before: Contents
    after: Contents

    @property
    def syncs(self) -> list[int]:
        """Positions of the job's syncs."""
        return [i for i in sync_points(self.disk.operations, self.start) if i < self.end]


def record(tmp_path: Path, scene: Scene) -> Recording:
    log = tmp_path / "operations"
    with recorded(tmp_path / "disk", log) as root:
        scene.prepare(root)
        before = contents(root / "set")
        (root / "start").mkdir()
        scene.job(root)
        (root / "end").mkdir()
        after = contents(root / "set")
    disk = Disk(pickle.loads(log.read_bytes()))
    return Recording(disk, disk.position("start"), disk.position("end"), before, after)


def fail_at(recording: Recording, scene: Scene, root: Path, end: int, loss: Loss, seed: int, *, again: bool) -> str:
    """What opens after a power failure: "before" or "after", which is asserted; or "refused", where a scene allows that."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    recording.disk.write(root, end, loss, random.Random(seed), synced_before=recording.start)
    found = contents(root / "set")
    where = f"after {end - recording.start} operations, {loss} lost, seed {seed}"
    if end == recording.end:
        assert found == recording.after, f"{where}: the job had returned, and what it wrote is not there"
    allowed = (recording.before, recording.after, *([None] if scene.renames else []))
    assert found in allowed, where
    if found is not None:
        report = js.verify(root / "set") if "embedding_dim" in found["config"] else verify_files(root / "set")
        assert report.ok, f"{where}: {report}"
    if again:
        scene.job(root)
        assert contents(root / "set") == recording.after, f"{where}: the job was run again"
        if scene.cleans and found != recording.after:
            hidden = [path.name for path in [*root.iterdir(), *(root / "set").iterdir()] if path.name[0] == "."]
            assert hidden in ([], [".shards"]), where
    return "after" if found == recording.after else "before" if found == recording.before else "refused"


def fail_everywhere(recording: Recording, scene: Scene, root: Path, points: list[int], somes: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for number, end in enumerate(points):
        for loss in LOSSES:
            for seed in range(somes if loss == "some" else 1):
                again = loss != "some" or number % 4 == 0
                found[fail_at(recording, scene, root, end, loss, 1000 * number + seed, again=again)] += 1
    return found


@pytest.mark.parametrize("name", SCENES)
def test_some_syncs(tmp_path, name):
    scene = SCENES[name]
    recording = record(tmp_path, scene)
    point = random.Random(name).choice(recording.syncs)
    fail_everywhere(recording, scene, tmp_path / "left", [point, recording.end], somes=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENES)
def test_every_sync(tmp_path, name):
    """Just before each sync, in the middle between two, and when the job has returned."""
    scene = SCENES[name]
    recording = record(tmp_path, scene)
    edges = [recording.start, *recording.syncs]
    between = [(one + other) // 2 for one, other in itertools.pairwise(edges)]
    points = sorted({*recording.syncs, *between, recording.end})
    found = fail_everywhere(recording, scene, tmp_path / "left", points, _SOMES)
    kinds = "both alike" if recording.before == recording.after else dict(found)
    print(f"\npower: {name}: {len(recording.syncs)} syncs, {len(points)} moments, {found.total()} failures, {kinds}")  # noqa: T201
