"""Interrupt a run on real files at random points and go on with other ranks, batch sizes, workers, formats."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from jasper_store.conversion.converter import convert
from jasper_store.errors import IncompatibleOptionsError
from jasper_store.jasper.loader import create_loader
from jasper_store.jasper.schema import SCHEMA
from jasper_store.loading.epochs import set_epoch
from jasper_store.loading.loader import Loader
from tests.builders import build_pt_dataset, jasper_tensors
from tests.jasper.expected import assert_same, expected_batch

SIZES: dict[str, Any] = {"n_pairs": 260, "dim": 8, "n_neg": 2, "n_questions": 90, "n_sources": 95}
SEED, EPOCH = 11, 12
FORMATS = ("pt", "hdf5", "safetensors", "npy")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    source = build_pt_dataset(tmp_path_factory.mktemp("elastic") / "pt", **SIZES)
    found = {"pt": source}
    for name in FORMATS[1:]:
        found[name] = source.parent / name
        convert(source, found[name], format=name, schema=SCHEMA)
    return found


class Leg(NamedTuple):
    """A run between two interruptions."""

    ranks: int
    batch: int
    workers: int
    format: str
    use_mmap: bool

    @classmethod
    def draw(cls, rng: random.Random) -> Leg:
        # Workers are dear and are a matter of tests of their own; some legs have them all the same.
        workers = rng.choices((0, 1, 2), (8, 1, 1))[0]
        return cls(
            rng.randint(1, 4), rng.choice((1, 3, 8, 20)), workers, rng.choice(FORMATS), rng.choice((True, False))
        )


def start(datasets: dict[str, Path], leg: Leg, state: dict[str, Any] | None, **options: Any) -> list[Loader]:
    loaders = [
        create_loader(
            datasets[leg.format],
            "train",
            leg.batch,
            leg.workers,
            storage_format=leg.format,
            use_mmap=leg.use_mmap,
            rank=rank,
            world_size=leg.ranks,
            **{"seed": SEED, "epoch": EPOCH, "order": "global", "drop_last": False, "padding": "none", **options},
        )
        for rank in range(leg.ranks)
    ]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    return loaders


def run(loaders: list[Loader], steps: int | None = None) -> tuple[list[dict[str, torch.Tensor]], dict[str, Any]]:
    """Let all ranks step together; what they were given, and the state that each of them would save, by way of JSON."""
    iterators = [iter(loader) for loader in loaders]
    given: list[dict[str, torch.Tensor]] = []
    done = 0
    while steps is None or done < steps:
        batches = [batch for iterator in iterators if (batch := next(iterator, None)) is not None]
        if not batches:
            break
        given += batches
        done += 1
    states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
    assert all(state == states[0] for state in states)
    for loader in loaders:
        loader.dataset_obj.close()
    return given, states[0]


def whole_of(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Everything that was given, in canonical order: by relevance, which is another for every pair."""
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    place = whole["relevance"].argsort()
    return {key: value[place] for key, value in whole.items()}


@pytest.fixture(scope="module")
def never_interrupted() -> dict[str, torch.Tensor]:
    tensors = jasper_tensors(**SIZES)
    batch = expected_batch(tensors, "train", range(len(tensors["train_idx"])), seed=SEED, epoch=EPOCH)
    assert len(batch["relevance"].unique()) == len(batch["relevance"])
    return whole_of([batch])


@pytest.mark.parametrize("point", range(20))
def test_interrupted_anywhere_equals_never_interrupted(
    datasets: dict[str, Path], never_interrupted: dict[str, torch.Tensor], point: int
) -> None:
    rng = random.Random(point)
    n = len(never_interrupted["relevance"])
    order = rng.choice(("global", "block"))
    given: list[dict[str, torch.Tensor]] = []
    state: dict[str, Any] | None = None
    for _ in range(rng.randint(1, 3)):
        leg = Leg.draw(rng)
        left = n - (state["consumed"] if state else 0)
        steps = rng.randint(0, -(-left // (leg.ranks * leg.batch)))
        part, state = run(start(datasets, leg, state, order=order), steps)
        given += part
        assert state["consumed"] == sum(len(batch["relevance"]) for batch in given)
    rest, state = run(start(datasets, Leg.draw(rng), state, order=order))
    assert_same(whole_of(given + rest), never_interrupted)
    assert state["consumed"] == n


def test_four_ranks_go_on_as_two_and_train_the_next_epoch_whole(datasets: dict[str, Path]) -> None:
    options = {"drop_last": True, "padding": "wrap"}
    four, two = Leg(4, 8, 0, "npy", True), Leg(2, 16, 0, "pt", False)
    first, state = run(start(datasets, four, None, **options), 3)
    assert state["consumed"] == 3 * 4 * 8
    loaders = start(datasets, two, state, **options)
    rest = [batch for loader in loaders for batch in loader]
    seen = torch.cat([batch["relevance"] for batch in first + rest])
    # Only full batches on both ranks: what is left over is less than one of them, and nothing comes twice.
    assert len(seen) == len(seen.unique()) == 3 * 4 * 8 + (182 - 96) // 32 * 32
    for loader in loaders:
        set_epoch(loader, EPOCH + 1)
        assert len(list(loader)) == 182 // 32


def test_a_state_of_another_dataset_is_refused_before_a_batch(datasets: dict[str, Path], tmp_path: Path) -> None:
    leg = Leg(1, 8, 0, "pt", False)
    _, state = run(start(datasets, leg, None), 2)
    other = build_pt_dataset(tmp_path / "other", **SIZES | {"seed": 1})
    with pytest.raises(IncompatibleOptionsError, match="another dataset"):
        start({"pt": other}, leg, state)
    # The same samples in another format are the same dataset.
    start(datasets, leg._replace(format="hdf5"), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_begins_with_its_first_batch(datasets: dict[str, Path], workers: int) -> None:
    """Trainers restore a state and make an iterator before they say which epoch it is for."""
    leg = Leg(1, 16, workers, "npy", True)
    [loader] = start(datasets, leg, None, epoch=EPOCH + 1)
    whole = list(loader)
    for steps in (4, None):
        _, state = run(start(datasets, leg, None), steps)
        [loader] = start(datasets, leg, None)
        iterator = iter(loader)
        loader.load_state_dict(state)
        set_epoch(loader, EPOCH + 1)
        served = [next(iterator), next(iterator)]
        assert loader.state_dict()["epoch"] == EPOCH + 1
        assert loader.state_dict()["consumed"] == 32
        served += iterator
        assert_same(whole_of(served), whole_of(whole))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_over_with_its_last_batch(datasets: dict[str, Path], workers: int) -> None:
    """Trainers that count batches never ask for one more than there are."""
    [loader] = start(datasets, Leg(1, 16, workers, "npy", True), None, drop_last=True)
    iterator = iter(loader)
    for left in reversed(range(len(loader))):
        next(iterator)
        assert (loader.state_dict()["consumed"] == 182) == (left == 0)


# --- 10**9 samples -----------------------------------------------------------------------------------------------

BILLION = """
import re, sys, time
import torch
from jasper_store.loading.batches import BatchSampler
from jasper_store.loading.samplers import EpochSampler

def memory(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

class Many:
    def __len__(self):
        return 10**9

torch.set_num_threads(1)
list(BatchSampler(EpochSampler(range(10**5), 1, 0), 256, False))  # imports and allocators are nobody's epoch
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before, began = memory("VmRSS"), time.perf_counter()
batches = iter(BatchSampler(EpochSampler(Many(), 8, 5, seed=1, order_kind=sys.argv[1]), 256, False))
next(batches)
took = time.perf_counter() - began
resumed = iter(BatchSampler(EpochSampler(Many(), 3, 1, seed=1, order_kind=sys.argv[1]), 1024, False))
resumed.load_state_dict({**batches.state_dict(), "consumed": 987_654_321})
for _, batch in zip(range(50), resumed):
    assert len(batch.unique()) == 1024
print(f"first batch after {took * 1000:.1f} ms; {memory('VmHWM') - before:.1f} MiB of memory")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("order", ["global", "block"])
def test_a_billion_samples_need_next_to_no_memory(order: str) -> None:
    done = subprocess.run([sys.executable, "-c", BILLION, order], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The time is printed for whoever wants it; a clock is no property of the code.
    print(done.stdout)  # noqa: T201
    found = re.search(r"([\d.]+) MiB", done.stdout)
    assert found is not None
    assert float(found[1]) * 2**20 < 50e6
