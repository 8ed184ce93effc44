"""torchrun on gloo: equal weights on both ranks, a rank that is killed, a node that is lost. Needs torch alone."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jasper_store.loading.order import order
from tests.builders import build_pt_dataset, jasper_tensors
from tests.integrations.launch import Seen, Torchrun, free_port, program, seen

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun with signals and process groups")

SIZES: dict[str, Any] = {"n_pairs": 550, "dim": 16, "n_neg": 2}
N_TRAIN, EPOCHS, BATCH = 385, 2, 16
STEPS = N_TRAIN // 2 // BATCH


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pt_dataset(tmp_path_factory.mktemp("torchrun") / "data", **SIZES)


@pytest.fixture(scope="module")
def epochs() -> list[list[float]]:
    """Relevance of every sample, by the epoch and its order; another one for every sample."""
    tensors = jasper_tensors(**SIZES)
    relevance = tensors["pair_relevance"][tensors["train_idx"]]
    assert len(relevance.unique()) == len(relevance) == N_TRAIN
    return [relevance[order(N_TRAIN, 42, epoch)[:]].tolist() for epoch in range(EPOCHS)]


def weights(output: str) -> list[str]:
    return re.findall(r"weights ([0-9a-f]{16})", output)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Seen]]:
    place = tmp_path_factory.mktemp("undisturbed")
    run = Torchrun(
        place / "watch", "--standalone", "--nproc-per-node=2", program("train.py", place), data, place, EPOCHS, BATCH
    )
    return run.wait(), seen(place / "watch")


def test_two_ranks_train_to_equal_weights(undisturbed: tuple[str, list[Seen]], epochs: list[list[float]]) -> None:
    output, batches = undisturbed
    digests = weights(output)
    assert len(digests) == 2
    assert digests[0] == digests[1]
    for epoch, whole in enumerate(epochs):
        for rank in range(2):
            own = [
                sample for batch in batches if (batch.epoch, batch.rank) == (epoch, rank) for sample in batch.samples
            ]
            assert own == whole[rank : 2 * STEPS * BATCH : 2]


def test_gloo_ends_before_the_interpreter_does(undisturbed: tuple[str, list[Seen]]) -> None:
    # A thread of it that wants the GIL then aborts the process, after everything went well (pytorch#190489).
    assert "gloo outlives the program" not in undisturbed[0]


def test_a_killed_rank_is_restarted_and_the_run_goes_on(
    data: Path, undisturbed: tuple[str, list[Seen]], epochs: list[list[float]], tmp_path: Path
) -> None:
    # Rank 1 waits before batch 8 of the second epoch until it is killed; the last state was saved after batch 5.
    watch = tmp_path / "watch"
    arguments = ("--standalone", "--nproc-per-node=2", "--max-restarts=1", program("train.py", tmp_path))
    run = Torchrun(watch, *arguments, data, tmp_path, EPOCHS, BATCH, WATCH_STALL=f"1:{STEPS + 8}")
    with ended(run):
        os.kill(int(appeared(watch / "stalled", run)), signal.SIGKILL)
        output = run.wait()
    saved = 2 * BATCH * 5
    assert output.count(f"'epoch': 1, 'consumed': {saved}") == 2
    # As if nothing had happened: the same weights as the run that nobody disturbed.
    assert set(weights(output)) == set(weights(undisturbed[0]))
    again = [batch for batch in seen(watch) if batch.life == 1]
    assert {batch.epoch for batch in again} == {1}
    for rank in range(2):
        own = [sample for batch in again if batch.rank == rank for sample in batch.samples]
        assert own == epochs[1][saved + rank : 2 * STEPS * BATCH : 2]


@pytest.mark.slow
def test_a_lost_node_leaves_the_other_to_finish(data: Path, epochs: list[list[float]], tmp_path: Path) -> None:
    watch, port = tmp_path / "watch", free_port()
    arguments = (
        "--nnodes=1:2",
        "--nproc-per-node=1",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{port}",
        "--rdzv-conf=last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3",
        "--local-addr=localhost",
        program("train.py", tmp_path),
        data,
        tmp_path,
        EPOCHS,
        BATCH,
    )
    stays = Torchrun(watch, *arguments)
    with ended(stays):
        time.sleep(2)  # the first to come holds the rendezvous, and must be the one that stays
        leaves = Torchrun(watch, *arguments, WATCH_STALL=f"1:{STEPS + 8}")
        with ended(leaves):
            appeared(watch / "stalled", leaves)
            leaves.kill()
            output = stays.wait()
    assert "rank 0 of 1 goes on at" in output
    saved = 2 * BATCH * 5
    assert f"'epoch': 1, 'consumed': {saved}" in output
    alone = [sample for batch in seen(watch) if batch.world == 1 for sample in batch.samples]
    # Each sample after the last state once, by the one that is left.
    assert alone == epochs[1][saved : saved + (N_TRAIN - saved) // BATCH * BATCH]
    assert len(weights(output)) == 1


@contextmanager
def ended(run: Torchrun) -> Iterator[None]:
    try:
        yield
    finally:
        run.kill()


def appeared(path: Path, run: Torchrun, patience: float = 120) -> str:
    """The text of a file, as soon as it is there."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and run.process.poll() is None:
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.05)
    run.process.terminate()
    pytest.fail(f"{path} did not appear: {run.process.communicate()[0]}")
