"""Accelerate's prepare: loaders that share themselves out are left alone, whole ones are shared out by Accelerate."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jasper_store.loading.order import order
from tests.builders import build_pt_dataset, jasper_tensors
from tests.integrations.launch import Torchrun, program, seen

pytestmark = pytest.mark.integrations("accelerate")

SIZES: dict[str, Any] = {"n_pairs": 300, "dim": 8, "n_neg": 2}
N_TRAIN, N_VAL, BATCH = 210, 45, 16
STEPS = N_TRAIN // 2 // BATCH


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pt_dataset(tmp_path_factory.mktemp("accelerate") / "data", **SIZES)


def whole(split: str, epoch: int = 0) -> list[float]:
    """What an epoch serves, in order."""
    tensors = jasper_tensors(**SIZES)
    relevance = tensors["pair_relevance"][tensors[f"{split}_idx"]]
    if split == "train":
        relevance = relevance[order(N_TRAIN, 42, epoch)[:]]
    found: list[float] = relevance.tolist()
    assert len(set(found)) == len(found)
    return found


def test_the_program_of_the_documentation(data: Path, tmp_path: Path) -> None:
    script = program("train_accelerate.py", tmp_path)
    run = Torchrun(
        tmp_path / "watch",
        "--standalone",
        "--nproc-per-node=2",
        script,
        data,
        tmp_path / "out",
        2,
        ACCELERATE_USE_CPU="1",
    )
    output = run.wait()
    batches = seen(tmp_path / "watch")
    for epoch in range(2):
        for rank in range(2):
            own = [
                sample for batch in batches if (batch.epoch, batch.rank) == (epoch, rank) for sample in batch.samples
            ]
            assert own == whole("train", epoch)[rank : 2 * STEPS * BATCH : 2]
    # Accelerate repeats samples to fill up its last batches, and gathers without them.
    assert re.findall(r"of (\d+) samples", output) == [str(N_VAL)] * 2


def test_every_way_to_prepare_a_loader(data: Path, tmp_path: Path) -> None:
    ranks = Path(__file__).with_name("accelerate_ranks.py")
    run = Torchrun(
        tmp_path,
        *("--standalone", "--nproc-per-node=2", ranks, data, tmp_path, BATCH),
        watched=False,
        ACCELERATE_USE_CPU="1",
    )
    run.wait()
    zero, one = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    train = whole("train")

    # Shared out by itself, prepared or not: every second place.
    assert zero["shared"] == train[0 : 2 * STEPS * BATCH : 2]
    assert one["shared"] == train[1 : 2 * STEPS * BATCH : 2]
    # And after save_state, load_state: the rest.
    for rank, served in enumerate((zero, one)):
        assert len(served["interrupted"]) == 2 * BATCH
        assert served["interrupted"] + served["resumed"] == whole("train", 1)[rank : 2 * STEPS * BATCH : 2]

    # Whole, and shared out by Accelerate: every second batch.
    pairs = [train[start : start + 2 * BATCH] for start in range(0, N_TRAIN // (2 * BATCH) * 2 * BATCH, 2 * BATCH)]
    assert zero["whole"] == [sample for pair in pairs for sample in pair[:BATCH]]
    assert one["whole"] == [sample for pair in pairs for sample in pair[BATCH:]]
    assert zero["epoch 3"] != zero["whole"]
    assert not set(zero["epoch 3"]) & set(one["epoch 3"])

    # Evaluation: exactly once with even_batches=False; otherwise filled up from the beginning.
    held_out = whole("val")
    assert sorted(zero["exact"] + one["exact"]) == sorted(held_out)
    assert set(zero["even"]) | set(one["even"]) == set(held_out)
    assert len(zero["even"]) == len(one["even"]) == 2 * BATCH
