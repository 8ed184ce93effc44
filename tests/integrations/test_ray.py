"""Ray Train's TorchTrainer with two workers on a local Ray, one of which is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from jasper_store.loading.order import order
from tests.builders import build_pt_dataset, jasper_tensors
from tests.integrations.launch import ROOT, program

pytestmark = pytest.mark.integrations("ray")

SIZES: dict[str, Any] = {"n_pairs": 550, "dim": 8, "n_neg": 2}
N_TRAIN, BATCH = 385, 16
STEPS = N_TRAIN // 2 // BATCH


def test_a_killed_worker_is_replaced_and_the_run_goes_on(tmp_path: Path) -> None:
    data = build_pt_dataset(tmp_path / "data", **SIZES)
    tensors = jasper_tensors(**SIZES)
    relevance = tensors["pair_relevance"][tensors["train_idx"]]
    watch = tmp_path / "watch"
    watch.mkdir()
    small = Path(__file__).with_name("ray_small.py")
    # Ray's sockets need a short path, and its token must not go to the user's own home.
    temporary = tempfile.mkdtemp(prefix="ray-")
    try:
        done = subprocess.run(
            [
                sys.executable,
                small,
                program("train_ray.py", tmp_path),
                data,
                tmp_path / "out",
                watch,
                "1",
                f"{STEPS + 8}",
            ],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "HOME": temporary,
                "RAY_SMALL_TMP": temporary,
                "RAY_USAGE_STATS_ENABLED": "0",
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (watch / "killed").exists()
    assert re.search(r"^epoch 1: loss", done.stdout, re.MULTILINE), done.stdout

    whole = [relevance[order(N_TRAIN, 42, epoch)[:]].tolist() for epoch in range(2)]
    lives: dict[bool, dict[int, Any]] = {True: {}, False: {}}
    for path in watch.glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        beginning = (lines[0]["epoch"], lines[0]["start"])
        served = [[value for line in lines if line["epoch"] == epoch for value in line["seen"]] for epoch in range(2)]
        lives[beginning == (0, 0)][int(path.name[0])] = beginning, served
    assert [sorted(life) for life in lives.values()] == [[0, 1], [0, 1]]
    for rank, (_, served) in lives[True].items():
        assert served[0] == whole[0][rank : 2 * STEPS * BATCH : 2]
        # The one that lives on has asked for one more batch, and waits for the other's gradients.
        assert served[1] == whole[1][rank : 2 * (9 - rank) * BATCH : 2]
    # Both go on at the last report that Ray had kept, with exactly what is left.
    [(epoch, start)] = {beginning for beginning, _ in lives[False].values()}
    assert start % (2 * 5 * BATCH) == 0
    for rank, (_, served) in lives[False].items():
        assert served[epoch] == whole[epoch][start + rank : 2 * STEPS * BATCH : 2]
        if epoch == 0:
            assert served[1] == whole[1][rank : 2 * STEPS * BATCH : 2]
