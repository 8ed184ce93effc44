"""Ranks: who this process is, and two real processes sharing an epoch through torch.distributed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from jasper_store.errors import IncompatibleOptionsError
from jasper_store.jasper.loader import create_loader
from jasper_store.loading.epochs import set_epoch
from jasper_store.loading.ranks import Ranks, find_ranks
from tests.builders import build_pt_dataset

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4"}


def test_arguments_come_first() -> None:
    found = find_ranks(rank=1, world_size=2, environ=TORCHRUN)
    assert (found.rank, found.world_size) == (1, 2)
    assert find_ranks(distributed=False, rank=1, world_size=2, environ={}) == found


def test_torchrun_comes_next() -> None:
    assert find_ranks(environ=TORCHRUN) == Ranks(3, 4, "from RANK and WORLD_SIZE", found=True)


def test_without_distributed_the_environment_means_nothing() -> None:
    assert find_ranks(distributed=False, environ=TORCHRUN) == Ranks()


def test_half_an_answer_is_refused() -> None:
    with pytest.raises(IncompatibleOptionsError, match="give both"):
        find_ranks(rank=1, environ={})
    with pytest.raises(IncompatibleOptionsError, match="give both"):
        find_ranks(world_size=2, environ=TORCHRUN)
    with pytest.raises(IncompatibleOptionsError, match="does not know its rank"):
        find_ranks(environ={"RANK": "1"})


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0), (0, -1)])
def test_an_impossible_rank_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(IncompatibleOptionsError, match="expected 0 <= rank < world_size"):
        find_ranks(rank=rank, world_size=world_size)


def test_what_is_not_a_number_is_refused() -> None:
    with pytest.raises(IncompatibleOptionsError, match="RANK='one'"):
        find_ranks(environ={"RANK": "one", "WORLD_SIZE": "2"})
    with pytest.raises(IncompatibleOptionsError, match=r"rank=0\.5"):
        find_ranks(rank=0.5, world_size=2)  # type: ignore[arg-type]
    with pytest.raises(IncompatibleOptionsError, match="world_size=True"):
        find_ranks(rank=0, world_size=True)


# --- two processes ------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {"n_pairs": 90, "dim": 4}


def one_rank(rank: int, world_size: int, directory: str) -> None:
    """What each process does: serve two epochs, exchange what it saw, save a state in the middle of the second."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=world_size)
    try:
        seen: dict[str, Any] = {}
        loader = create_loader(f"{directory}/data", "train", 5, distributed=True, drop_last=False, padding="none")
        assert isinstance(loader.sampler_obj, torch.utils.data.DistributedSampler)
        seen["explain"] = loader.explain()
        seen["first"] = [float(value) for batch in loader for value in batch["relevance"]]
        set_epoch(loader, 1)
        iterator = iter(loader)
        seen["second"] = [float(value) for _ in range(3) for value in next(iterator)["relevance"]]
        seen["state"] = loader.state_dict()
        seen["lengths"] = [len(create_loader(f"{directory}/data", "train", 5, distributed=True))]
        everything: list[Any] = [None] * world_size
        dist.all_gather_object(everything, seen)
        if rank == 0:
            Path(directory, "seen.json").write_text(json.dumps(everything))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("ranks")
    build_pt_dataset(directory / "data", **SIZES)
    spawn(one_rank, args=(2, str(directory)), nprocs=2)
    return directory / "data", json.loads((directory / "seen.json").read_text())


def test_two_ranks_see_every_sample_once(served: tuple[Path, list[dict[str, Any]]]) -> None:
    data, seen = served
    alone = create_loader(data, "train", 7, drop_last=False)
    whole = [float(value) for batch in alone for value in batch["relevance"]]
    assert seen[0]["first"] == whole[0::2]
    assert seen[1]["first"] == whole[1::2]
    assert "0 of 2 (from the process group)" in seen[0]["explain"]


def test_two_ranks_save_one_state_and_one_rank_goes_on(served: tuple[Path, list[dict[str, Any]]]) -> None:
    data, seen = served
    assert seen[0]["state"] == seen[1]["state"]
    assert seen[0]["state"]["consumed"] == 30
    assert seen[0]["lengths"] == seen[1]["lengths"]
    alone = create_loader(data, "train", 7, drop_last=False)
    alone.load_state_dict(seen[0]["state"])
    rest = [float(value) for batch in alone for value in batch["relevance"]]
    never_interrupted = create_loader(data, "train", 9, drop_last=False, epoch=1)
    whole = [float(value) for batch in never_interrupted for value in batch["relevance"]]
    assert sorted(rest + seen[0]["second"] + seen[1]["second"]) == sorted(whole)
    assert rest == whole[30:]
