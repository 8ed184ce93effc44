"""kill -9 during a build: the next one continues, ends with the same bits, and a dataset that was there stays whole."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import jasper_store as js
from jasper_store.errors import ConversionError, CorruptFileError
from tests.building.raw import raw, values

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

Tensors = dict[str, torch.Tensor]


class Zygote:
    """Starts builds in children of a process that has imported everything."""

    def __init__(self) -> None:
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.building.zygote"],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def build(
        self,
        dst: Path,
        *,
        seed: int = 42,
        stage: str | None = None,
        calls: int = 1,
        seconds: float | None = None,
        overwrite: bool = False,
    ) -> int:
        """Build, and kill it; the exit status."""
        assert self.process.stdin is not None
        job = {
            "dst": str(dst),
            "seed": seed,
            "stage": stage,
            "calls": calls,
            "seconds": seconds,
            "overwrite": overwrite,
        }
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self._answer())


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
def wanted(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Tensors]:
    """The values of builds that nothing interrupted, by seed."""
    out = tmp_path_factory.mktemp("wanted")
    for seed in (42, 7):
        assert zygote.build(out / str(seed), seed=seed) == 0
    return {seed: values(out / str(seed)) for seed in (42, 7)}


def same(found: Tensors, other: Tensors) -> bool:
    return found.keys() == other.keys() and all(torch.equal(found[name], other[name]) for name in found)


def finish(zygote: Zygote, dst: Path, wanted: Tensors) -> None:
    """Build again, as a user does after a kill."""
    assert zygote.build(dst) == 0
    assert same(values(dst), wanted)
    assert js.verify(dst).ok
    # Nothing is left beside the dataset.
    assert [path.name for path in dst.parent.iterdir()] == [dst.name]


@pytest.mark.parametrize(
    ("stage", "calls"),
    [("read", 2), ("clusters", 1), ("clusters", 3), ("splits", 1), ("mine", 1), ("mine", 3), ("write", 2)],
)
def test_killed_in_each_stage(
    zygote: Zygote, wanted: dict[int, Tensors], tmp_path: Path, stage: str, calls: int
) -> None:
    dst = tmp_path / "set"
    assert zygote.build(dst, stage=stage, calls=calls) == -signal.SIGKILL
    assert not dst.exists()
    finish(zygote, dst, wanted[42])


def test_finished_stages_are_not_done_again(zygote: Zygote, tmp_path: Path) -> None:
    dst = tmp_path / "set"
    assert zygote.build(dst, stage="write", calls=2) == -signal.SIGKILL
    from tests.building.zygote import SIZES

    report = js.build(dst, **raw(**SIZES))
    assert {stage.name: stage.kept for stage in report.stages} == {
        "read": False,
        "clusters": True,
        "splits": False,
        "mine": True,
        "write": False,
    }
    assert "kept from an earlier build" in str(report)


def test_a_build_of_other_settings_takes_nothing_of_one_that_was_killed(
    zygote: Zygote, wanted: dict[int, Tensors], tmp_path: Path
) -> None:
    dst = tmp_path / "set"
    assert zygote.build(dst, seed=7, stage="write", calls=2) == -signal.SIGKILL
    finish(zygote, dst, wanted[42])


def test_a_kill_after_the_publication_is_found_done(
    zygote: Zygote, wanted: dict[int, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jasper_store.building.stages import WorkDirectory
    from tests.building.zygote import SIZES

    dst = tmp_path / "set"

    def killed(_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkDirectory, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            js.build(dst, **raw(**SIZES))
    (tmp_path / ".set.jasper_store.lock").write_text("1 on a host\n")  # a kill a moment earlier leaves it
    report = js.build(dst, **raw(**SIZES))
    assert report.existed
    assert [stage.name for stage in report.stages] == ["read"]
    finish(zygote, dst, wanted[42])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_many_moments(zygote: Zygote, wanted: dict[int, Tensors], tmp_path: Path, overwrite: bool) -> None:
    """25 kills of a new build, and 25 of one that replaces a dataset, which opens whole at every moment."""
    rng = random.Random(5)
    dst = tmp_path / "set"
    began = time.monotonic()
    assert zygote.build(dst) == 0
    lasts = time.monotonic() - began
    kills = 0
    while kills < 25:
        import shutil

        shutil.rmtree(dst, ignore_errors=True)
        if overwrite:
            assert zygote.build(dst, seed=7) == 0
        if zygote.build(dst, seconds=rng.uniform(0, lasts), overwrite=overwrite) != -signal.SIGKILL:
            continue
        kills += 1
        if overwrite:
            found = values(dst)
            assert same(found, wanted[7]) or same(found, wanted[42])
            assert zygote.build(dst, overwrite=True) == 0
        finish(zygote, dst, wanted[42])


# ---- a dataset in use


def test_a_dataset_in_training_keeps_its_generation_while_it_is_rebuilt(tmp_path: Path) -> None:
    dst = tmp_path / "set"
    js.build(dst, **raw())
    with js.JASPERSteeringDataset(dst, "train", use_mmap=True) as dataset:
        before = [batch["negative_embs"].clone() for batch in js.create_loader(dataset, batch_size=8, shuffle=False)]
        js.build(dst, **raw(), seed=7, overwrite=True)
        after = [batch["negative_embs"] for batch in js.create_loader(dataset, batch_size=8, shuffle=False)]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        import pickle

        # Another process cannot have the generation that is gone, and is told so.
        with pytest.raises(CorruptFileError):
            pickle.loads(pickle.dumps(dataset))
    with js.JASPERSteeringDataset(dst, "train") as dataset:
        assert torch.equal(dataset.split_indices, values(dst)["train_idx"])


def test_two_builds_of_one_target(tmp_path: Path) -> None:
    def other(stage: str, done: int, total: int) -> None:
        if stage == "mine" and done == 0:
            with pytest.raises(ConversionError, match="only writer"):
                js.build(tmp_path / "set", **raw())

    js.build(tmp_path / "set", **raw(), progress=other)
    assert js.verify(tmp_path / "set").ok
