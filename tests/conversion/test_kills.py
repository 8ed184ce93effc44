"""kill -9 at random moments of append, shard writers, commit, compact and convert: the generation before, or after."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from jasper_store.conversion.commit import commit
from jasper_store.conversion.writer import DirectoryWriter
from jasper_store.errors import CorruptFileError, DatasetNotFoundError
from jasper_store.formats.base import Schema
from jasper_store.formats.registry import locate
from jasper_store.store.opening import open_store
from tests.conversion.samples import write_pt
from tests.conversion.test_faults import Zygote
from tests.conversion.zygote import fill

BASE, MORE = 3_000, 2_000
State = list[tuple[int, int]] | None
"""Runs of rows of one value: (value, rows); ``None`` where nothing opens."""


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    found = Zygote()
    yield found
    assert found.process.stdin is not None
    assert found.process.stdout is not None
    found.process.stdin.close()
    found.process.wait()
    found.process.stdout.close()


def state(root: Path) -> State:
    """What a dataset holds, read through a store; every tensor must tell the same."""
    try:
        with open_store(root, use_mmap=True) as store:
            count = len(store["b"])
            rows = torch.arange(count)
            b = store["b"].take(rows)
            assert torch.equal(store["a"].take(rows), b[:, None].expand(-1, 20).float())
            if "words.values" in {spec.name for spec in store.specs}:
                words = store.ragged("words")
                assert len(words) == count
                assert all(words[i].tolist() == [int(b[i])] for i in range(0, count, 97))
    except DatasetNotFoundError:
        return None
    except CorruptFileError as exc:
        if "a conversion that was not finished" not in str(exc):
            raise
        return None
    values, counts = torch.unique_consecutive(b, return_counts=True)
    return list(zip(values.tolist(), counts.tolist(), strict=True))


@dataclass
class Scene:
    """A job to be killed.

    Attributes:
        reset: makes the dataset as it is before.
        options: of the job.
        before: state that is allowed after a kill.
        after: the other one, and the one that a job run again must lead to.
    """

    reset: Callable[[], None]
    options: dict[str, Any]
    before: State
    after: State
    extra: list[dict[str, Any]] = field(default_factory=list)  # jobs that follow a job that was run again


def write_base(root: Path, fmt: str) -> None:
    shutil.rmtree(root, ignore_errors=True)
    with DirectoryWriter(root, fmt) as writer:
        fill(writer, 1.0, BASE)


def append(root: Path, fmt: str) -> Scene:
    options = {"job": "append", "dst": root / "set", "format": fmt, "value": 2.0, "rows": MORE}
    return Scene(lambda: write_base(root / "set", fmt), options, [(1, BASE)], [(1, BASE), (2, MORE)])


def shards_of(root: Path, fmt: str, mode: str, numbers: list[int]) -> None:
    for shard in numbers:
        with DirectoryWriter(root, fmt, shard=shard, shards=3, mode=mode) as writer:
            fill(writer, 5.0 + shard, 500)


def shard(root: Path, fmt: str) -> Scene:
    """A shard writer is killed: nothing shows, and the commit that follows has its shard once."""
    where = root / "set"

    def reset() -> None:
        write_base(where, fmt)
        shards_of(where, fmt, "append", [0, 2])

    options = {"job": "shard", "dst": where, "format": fmt, "shard": 1, "shards": 3, "value": 6.0, "rows": 500}
    before: State = [(1, BASE)]
    after: State = [(1, BASE), (5, 500), (6, 500), (7, 500)]
    return Scene(reset, {**options, "mode": "append"}, before, after, [{"job": "commit", "dst": where}])


def commit_new(root: Path, fmt: str) -> Scene:
    def reset() -> None:
        shutil.rmtree(root / "set", ignore_errors=True)
        shards_of(root / "set", fmt, "create", [0, 1, 2])

    return Scene(reset, {"job": "commit", "dst": root / "set"}, None, [(5, 500), (6, 500), (7, 500)])


def commit_more(root: Path, fmt: str) -> Scene:
    def reset() -> None:
        write_base(root / "set", fmt)
        shards_of(root / "set", fmt, "append", [0, 1, 2])

    after: State = [(1, BASE), (5, 500), (6, 500), (7, 500)]
    return Scene(reset, {"job": "commit", "dst": root / "set"}, [(1, BASE)], after)


def compact(root: Path, fmt: str, *, remove_old: bool) -> Scene:
    def reset() -> None:
        write_base(root / "set", fmt)
        for _ in range(3):
            with DirectoryWriter(root / "set", mode="append") as writer:
                fill(writer, 2.0, 100)

    whole: State = [(1, BASE), (2, 300)]
    return Scene(reset, {"job": "compact", "dst": root / "set", "remove_old": remove_old}, whole, whole)


def convert_new(root: Path, fmt: str) -> Scene:
    """Into a directory that is not there: it opens when all of it is there, and not before."""
    source = pt_of(root / "pt", 1)
    options = {"job": "convert", "src": source, "dst": root / "set", "format": fmt, "overwrite": False}
    return Scene(lambda: shutil.rmtree(root / "set", ignore_errors=True), options, None, [(1, BASE)])


def convert_over(root: Path, fmt: str) -> Scene:
    """Over an older dataset: that one or the new one opens, at every moment."""
    source = pt_of(root / "pt", 2)

    def reset() -> None:
        shutil.rmtree(root / "set", ignore_errors=True)
        with DirectoryWriter(root / "set", fmt) as writer:
            writer.append("a", torch.full((BASE, 20), 1.0))
            writer.append("b", torch.full((BASE,), 1))

    options = {"job": "convert", "src": source, "dst": root / "set", "format": fmt, "overwrite": True}
    return Scene(reset, options, [(1, BASE)], [(2, BASE)])


def pt_of(root: Path, value: int) -> Path:
    return write_pt(root, {"a": torch.full((BASE, 20), float(value)), "b": torch.full((BASE,), value)})


SCENES: dict[str, Callable[[Path], Scene]] = {
    "append": lambda root: append(root, "safetensors"),
    "append, hdf5": lambda root: append(root, "hdf5"),
    "shard": lambda root: shard(root, "npy"),
    "commit": lambda root: commit_new(root, "safetensors"),
    "commit, appending": lambda root: commit_more(root, "hdf5"),
    "compact": lambda root: compact(root, "safetensors", remove_old=False),
    "compact, removing": lambda root: compact(root, "npy", remove_old=True),
    "convert": lambda root: convert_new(root, "safetensors"),
    "convert over": lambda root: convert_over(root, "npy"),
}


def run_again(zygote: Zygote, scene: Scene) -> bool:
    """What a user does after a kill: the same again, unless it was done. Whether it was run.

    What can be run twice is run in any case: it removes what was replaced when the kill came after the publication.
    """
    where = Path(scene.options["dst"])
    again = state(where) != scene.after or scene.options["job"] in {"compact", "convert"}
    if again:
        assert zygote.run(**scene.options) == 0
        for job in scene.extra:
            assert zygote.run(**job) == 0
    assert state(where) == scene.after
    return again


def kill_at_random(zygote: Zygote, scene: Scene, times: int, seed: int) -> dict[str, int]:
    """Kill a job at random moments; how often the state before and the state after were found."""
    rng = random.Random(seed)
    where = Path(scene.options["dst"])
    scene.reset()
    started = time.monotonic()
    run_again(zygote, scene)
    lasts = time.monotonic() - started
    found = {"before": 0, "after": 0}
    for _ in range(20 * times):
        if sum(found.values()) == times:
            break
        scene.reset()
        if not zygote.killed(rng.uniform(0, lasts), **scene.options):
            continue
        seen = state(where)
        assert seen in (scene.before, scene.after)
        found["after" if seen == scene.after else "before"] += 1
        if run_again(zygote, scene):
            # Nothing is left of what was killed: files of parts are named by the manifest, or gone.
            left = [path.name for path in where.iterdir() if path.name[0] == "."]
            assert left in ([], [".shards"]), left
            assert not [path.name for path in where.parent.iterdir() if path.name[0] == "."]
    assert sum(found.values()) == times
    return found


@pytest.mark.parametrize("name", SCENES)
def test_killed_at_some_moments(zygote, tmp_path, name):
    kill_at_random(zygote, SCENES[name](tmp_path), times=2, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENES)
def test_killed_at_many_moments(zygote, tmp_path, name):
    """23 kills of each of the nine: 207."""
    found = kill_at_random(zygote, SCENES[name](tmp_path), times=23, seed=4)
    print(f"\nkills: {name}: {found}")  # noqa: T201 - the figures of docs/reliability.md


def test_a_commit_that_moved_shards_is_run_again_after_one_of_them_was_rewritten(tmp_path, monkeypatch):
    """Killed between moving the shards and publishing: a shard written again since then replaces the one moved."""
    from jasper_store.conversion import commit as committing

    shards_of(tmp_path / "set", "safetensors", "create", [0, 1, 2])

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(committing, "publish", kill)
        patch.setattr(committing, "clean_parts", lambda _: None)  # a process that was killed cleans nothing
        with pytest.raises(Killed):
            commit(tmp_path / "set")
    with pytest.raises(DatasetNotFoundError):
        locate(tmp_path / "set", "auto", Schema())
    with DirectoryWriter(tmp_path / "set", shard=1, shards=3) as writer:
        fill(writer, 9.0, 400)
    commit(tmp_path / "set")
    assert state(tmp_path / "set") == [(5, 500), (9, 400), (7, 500)]
