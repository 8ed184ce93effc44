"""One epoch of a declared dataset, however it is served: format, placement, workers, start method, loader, ranks."""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import jasper_store as js
from jasper_store.errors import PerformanceWarning
from jasper_store.loading import samplers
from jasper_store.loading.loader import Loader
from jasper_store.loading.order import BlockOrder, order
from tests.integrations.launch import Torchrun
from tests.jasper.expected import assert_same
from tests.samples.triplets import N_TRAIN, canonical, expected, whole_of, write

EPOCH, SEED = 3, 5
FORMATS: dict[str, tuple[str, str | None]] = {
    "safetensors": ("safetensors", None),
    "npy": ("npy", None),
    "pt": ("pt", None),
    "hdf5-contiguous": ("hdf5", None),
    "hdf5-gzip": ("hdf5", "gzip"),
}
WORKERS: dict[str, dict[str, Any]] = {
    "0": {},
    "2-fork": {"num_workers": 2, "multiprocessing_context": "fork"},
    "2-spawn": {"num_workers": 2, "multiprocessing_context": "spawn"},
}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "mapped": {"use_mmap": True},
    "preloaded": {"use_mmap": False},
    "hybrid": {"memory_limit": 9_000},  # room for some of the tensors only
}
#: Interpreters that start are what costs, so every format is spawned for once; all placements and loaders are among them.
SPAWNED = {
    ("safetensors", "mapped", "loader"),
    ("npy", "hybrid", "plain"),
    ("pt", "preloaded", "loader"),
    ("hdf5-contiguous", "mapped", "plain"),
    ("hdf5-gzip", "mapped", "loader"),
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    source = write(tmp_path_factory.mktemp("triplets") / "safetensors")
    found = {"safetensors": source}
    for name, (target, compression) in FORMATS.items():
        if name != "safetensors":
            found[name] = source.parent / name
            js.convert(source, found[name], format=target, compression=compression)
    return found


@pytest.fixture(scope="module")
def in_order() -> dict[str, torch.Tensor]:
    return expected(torch.arange(N_TRAIN))


@pytest.fixture(scope="module")
def shuffled() -> dict[str, torch.Tensor]:
    return expected(order(N_TRAIN, SEED, EPOCH)[:])


@pytest.mark.parametrize(
    ("name", "placement", "loader", "workers"),
    [
        case
        for case in itertools.product(FORMATS, PLACEMENTS, ["plain", "loader"], WORKERS)
        if case[3] != "2-spawn" or case[:3] in SPAWNED
    ],
)
def test_epoch_is_the_same(
    datasets: dict[str, Path],
    in_order: dict[str, torch.Tensor],
    shuffled: dict[str, torch.Tensor],
    name: str,
    placement: str,
    loader: str,
    workers: str,
) -> None:
    options: dict[str, Any] = {"batch_size": 32, **WORKERS[workers]}
    with warnings.catch_warnings():
        # A compressed file cannot be mapped; it says so.
        warnings.simplefilter("ignore" if name == "hdf5-gzip" else "error", PerformanceWarning)
        if loader == "plain":
            dataset = js.Dataset(datasets[name], split="train", seed=SEED, **PLACEMENTS[placement])
            batches = list(DataLoader(dataset, **options))
        else:
            created = js.create_loader(
                datasets[name],
                "train",
                drop_last=False,
                order="global",
                epoch=EPOCH,
                seed=SEED,
                **PLACEMENTS[placement],
                **options,
            )
            dataset = created.dataset_obj
            batches = list(created)
    assert type(dataset) is js.Dataset
    assert dataset.storage_format == FORMATS[name][0]
    places = {entry.placement for entry in dataset.store.plan.entries if entry.reads_per_sample > 0}
    elsewhere = "chunked" if name == "hdf5-gzip" else "mmap"
    if placement == "mapped":
        places.discard("ram")  # lists of lists, and values that came with a header, are read whole
    assert places == {"mapped": {elsewhere}, "preloaded": {"ram"}, "hybrid": {"ram", elsewhere}}[placement]
    assert [len(batch["id"]) for batch in batches] == [32, 32, 32, 32, 2]
    assert_same(whole_of(batches), in_order if loader == "plain" else shuffled)
    dataset.close()


# --- ranks --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(samplers._ORDERS, "block", partial(BlockOrder, block=8, window=3))


def start(path: Path, ranks: int, batch: int = 9, state: dict[str, Any] | None = None, **options: Any) -> list[Loader]:
    how: dict[str, Any] = {"padding": "none", "drop_last": False, "epoch": EPOCH, "seed": SEED, "order": "global"}
    loaders = [
        js.create_loader(path, "train", batch, rank=rank, world_size=ranks, **(how | options)) for rank in range(ranks)
    ]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    return loaders


def step(loaders: list[Loader], steps: int | None = None) -> tuple[list[dict[str, torch.Tensor]], dict[str, Any]]:
    """Let all ranks step together; what they were given, and their one state by way of JSON."""
    given: list[dict[str, torch.Tensor]] = []
    iterators = [iter(loader) for loader in loaders]
    for _ in itertools.count() if steps is None else range(steps):
        batches = [batch for iterator in iterators if (batch := next(iterator, None)) is not None]
        if not batches:
            break
        given += batches
    states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
    assert all(state == states[0] for state in states)
    for loader in loaders:
        loader.dataset_obj.close()
    return given, states[0]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["global", "block"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_an_epoch(
    datasets: dict[str, Path], in_order: dict[str, torch.Tensor], ranks: int, placement: str, kind: str
) -> None:
    loaders = start(datasets["safetensors"], ranks, order=kind, **PLACEMENTS[placement])
    positions = loaders[0].sampler_obj.order[:]
    served = [whole_of(list(loader)) for loader in loaders]
    for rank, found in enumerate(served):
        assert_same(found, expected(positions[rank::ranks]))
    # Each sample exactly once.
    assert_same(canonical(whole_of(served)), canonical(in_order))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["global", "block"])
@pytest.mark.parametrize("then", [1, 3])
@pytest.mark.parametrize("steps", [0, 1, 4, 7])
def test_two_ranks_go_on_as_others(
    datasets: dict[str, Path], in_order: dict[str, torch.Tensor], steps: int, then: int, kind: str
) -> None:
    given, state = step(start(datasets["safetensors"], 2, order=kind, use_mmap=True), steps)
    assert state["consumed"] == sum(len(batch["id"]) for batch in given) == 2 * 9 * steps
    rest, state = step(start(datasets["pt"], then, 5, state, order=kind, use_mmap=False, num_workers=0))
    assert state["consumed"] == N_TRAIN
    assert_same(canonical(whole_of(given + rest)), canonical(in_order))


def test_resuming_with_workers(datasets: dict[str, Path], in_order: dict[str, torch.Tensor]) -> None:
    fork: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "fork"}
    given, state = step(start(datasets["npy"], 2, **fork), 3)
    rest, _ = step(start(datasets["hdf5-gzip"], 3, 4, state, **fork))
    assert_same(canonical(whole_of(given + rest)), canonical(in_order))


# --- real ranks ---------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
import torch
import torch.distributed as dist
import jasper_store as js

data, out = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
loader = js.create_loader(
    data, "train", 9, distributed=True, drop_last=False, padding="none", epoch=3, seed=5, order="global"
)
torch.save([dict(batch) for batch in loader], f"{out}/{rank}-of-{dist.get_world_size()}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun with signals and process groups")
def test_two_processes_of_torchrun(
    datasets: dict[str, Path], in_order: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    program = tmp_path / "serve.py"
    program.write_text(PROGRAM)
    arguments = ("--standalone", "--nproc-per-node=2", program, datasets["safetensors"], tmp_path)
    Torchrun(tmp_path / "watch", *arguments, watched=False).wait()
    served = [torch.load(tmp_path / f"{rank}-of-2.pt") for rank in range(2)]
    positions = order(N_TRAIN, SEED, EPOCH)[:]
    for rank, batches in enumerate(served):
        assert_same(whole_of(batches), expected(positions[rank::2]))
    assert_same(canonical(whole_of(served[0] + served[1])), canonical(in_order))
