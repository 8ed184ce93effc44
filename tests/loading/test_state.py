"""States: interrupting anywhere, and going on with other ranks and batch sizes, serves each sample exactly once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from jasper_store.errors import IncompatibleOptionsError
from jasper_store.loading.batches import BatchSampler
from jasper_store.loading.loader import Loader
from jasper_store.loading.order import order
from jasper_store.loading.samplers import EpochSampler
from jasper_store.loading.state import LoaderState
from tests.builders import build_pt_dataset
from tests.integrations.launch import ROOT, program
from tests.jasper.fakes import Numbers, as_is


def loader_of(n: int, batch: int, ranks: int = 1, rank: int = 0, workers: int = 0, **options: Any) -> Loader:
    dataset: Any = options.pop("dataset", None) or Numbers(n)
    adopt = options.pop("adopt_order", False)
    sampler = EpochSampler(dataset, ranks, rank, **options)
    return Loader(
        dataset, batch, sampler=sampler, num_workers=workers, collate_fn=as_is, adopt_order=adopt, why_order="so"
    )


def serve(n: int, batch: int, ranks: int, steps: int | None, state: dict[str, Any] | None, **options: Any) -> Any:
    """Run all ranks in step; what they were given, by step and rank, and the state that each would save."""
    loaders = [loader_of(n, batch, ranks, rank, **options) for rank in range(ranks)]
    given_out: list[list[int]] = []
    iterators = []
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
        iterators.append(iter(loader))
    while steps is None or len(given_out) < steps:
        batches = [next(iterator, None) for iterator in iterators]
        if all(one is None for one in batches):
            break
        given_out.append([index for one in batches if one is not None for index in one.tolist()])
    states = [loader.state_dict() for loader in loaders]
    assert all(one == states[0] for one in states)
    return [index for step in given_out for index in step], json.loads(json.dumps(states[0]))


leg = st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(0, 12))  # batch size, ranks, steps


@given(
    n=st.integers(0, 200),
    legs=st.lists(leg, max_size=4),
    last=leg,
    kind=st.sampled_from(["global", "block"]),
    epoch=st.integers(0, 3),
)
def test_interrupting_often_serves_every_sample_once(
    n: int, legs: list[tuple[int, int, int]], last: tuple[int, int, int], kind: str, epoch: int
) -> None:
    state = EpochSampler(Numbers(n), 1, 0, order_kind=kind).state(0)
    current = {**state.to_dict(), "epoch": epoch}
    served: list[int] = []
    for batch, ranks, steps in legs:
        part, current = serve(n, batch, ranks, steps, current, order_kind=kind, padding="none")
        served += part
        # What was consumed is a prefix of the epoch, whoever consumed it.
        assert current["consumed"] == len(served)
    rest, current = serve(n, last[0], last[1], None, current, order_kind=kind, padding="none")
    served += rest
    assert sorted(served) == list(range(n))
    assert current["consumed"] == n
    sampler = EpochSampler(Numbers(n), 1, 0, order_kind=kind)
    sampler.set_epoch(epoch)
    if all(batch_ranks[1] == 1 for batch_ranks in [*legs, last]):
        assert served == sampler.order[:].tolist()


@settings(max_examples=20)
@given(point=st.integers(0, 24), again=st.integers(0, 24), ranks=st.integers(1, 3), drop_last=st.booleans())
def test_interrupting_twice_equals_never(point: int, again: int, ranks: int, drop_last: bool) -> None:
    options = {"drop_last": drop_last, "seed": 3}
    whole, end = serve(150, 4, ranks, None, None, **options)
    first, state = serve(150, 4, ranks, point, None, **options)
    second, state = serve(150, 4, ranks, again, state, **options)
    third, state = serve(150, 4, ranks, None, state, **options)
    assert first + second + third == whole
    assert state == end


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetched_batches_are_not_counted(workers: int) -> None:
    loader = loader_of(100, 8, workers=workers)
    iterator = iter(loader)
    assert loader.state_dict()["consumed"] == 0
    first = [next(iterator) for _ in range(3)]
    state = loader.state_dict()
    assert state["consumed"] == 24
    resumed = loader_of(100, 5, workers=2 - workers)
    resumed.load_state_dict(state)
    assert torch.equal(torch.cat([*first, *resumed]), order(100, 0, 0)[:])


def test_the_pass_after_a_resumed_one_begins_at_the_beginning() -> None:
    loader = loader_of(100, 10)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    resumed = loader_of(100, 10)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert len(list(resumed)) == 9
    assert len(resumed) == 10
    resumed.set_epoch(1)
    assert len(list(resumed)) == 10


def test_a_finished_epoch_leaves_nothing_and_the_next_is_whole() -> None:
    loader = loader_of(103, 10, drop_last=True)
    list(loader)
    state = loader.state_dict()
    assert state["consumed"] == 103
    resumed = loader_of(103, 7, drop_last=True)
    resumed.load_state_dict(state)
    assert list(resumed) == []
    resumed.set_epoch(1)
    assert len(list(resumed)) == 14


def test_another_epoch_drops_the_resume_point_and_the_same_one_keeps_it() -> None:
    for epoch, left in ((0, 9), (1, 10)):
        loader = loader_of(100, 10)
        next(iter(loader))
        resumed = loader_of(100, 10)
        resumed.load_state_dict(loader.state_dict())
        resumed.set_epoch(epoch)
        assert len(list(resumed)) == left


def test_state_follows_an_epoch_that_the_trainer_sets_on_the_sampler() -> None:
    loader = loader_of(100, 10)
    list(loader)
    loader.sampler_obj.set_epoch(4)
    assert loader.state_dict()["epoch"] == 4
    assert loader.state_dict()["consumed"] == 0


def test_a_state_is_small_and_cheap() -> None:
    dataset = Numbers(10**12)
    loader = loader_of(0, 256, dataset=dataset)
    next(iter(loader))
    for _ in range(5):
        assert len(json.dumps(loader.state_dict())) < 300
    assert dataset.fingerprints == 1


def test_what_differs_from_a_state_is_said_in_words() -> None:
    class Named(Numbers):
        dataset_dir = Path("data/b")
        split = "train"

        def fingerprint(self) -> str:
            return f"{id(self):016x}"

    one, other = Named(100), Named(100)
    state = loader_of(0, 10, dataset=one).state_dict()
    with pytest.raises(
        IncompatibleOptionsError, match="as many samples as 'data/b', split 'train', 100, but"
    ) as caught:
        loader_of(0, 10, dataset=other).load_state_dict(state)
    assert not re.search(r"[0-9a-f]{16}", str(caught.value))
    with pytest.raises(
        IncompatibleOptionsError, match=r"has 100 samples, that of 'data/b', split 'train' has 90\."
    ) as caught:
        loader_of(0, 10, dataset=Named(90)).load_state_dict(state)
    assert not re.search(r"[0-9a-f]{16}", str(caught.value))


def test_a_state_of_something_else_is_refused() -> None:
    state = loader_of(100, 10, seed=1).state_dict()
    with pytest.raises(IncompatibleOptionsError, match="another dataset"):
        loader_of(101, 10, seed=1).load_state_dict(state)
    with pytest.raises(IncompatibleOptionsError, match="another dataset"):
        loader_of(0, 10, dataset=Numbers(100, "other"), seed=1).load_state_dict(state)
    with pytest.raises(IncompatibleOptionsError, match="Make the loader with seed=1"):
        loader_of(100, 10, seed=2).load_state_dict(state)
    with pytest.raises(IncompatibleOptionsError, match="order='global'"):
        loader_of(100, 10, seed=1, order_kind="block").load_state_dict(state)
    with pytest.raises(IncompatibleOptionsError, match="order='global'"):
        loader_of(100, 10, seed=1, shuffle=False).load_state_dict(state)


def test_an_automatic_order_follows_the_state() -> None:
    before = loader_of(1000, 10, order_kind="block")
    iterator = iter(before)
    next(iterator)
    resumed = loader_of(1000, 10, adopt_order=True)
    assert resumed.order == "global"
    resumed.load_state_dict(before.state_dict())
    assert resumed.order == "block"
    assert "state" in resumed.explain()
    assert torch.equal(torch.cat(list(resumed)), torch.cat(list(iterator)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"version": None}, "version None"),
        ({"seed": "1"}, "seed='1'"),
        ({"consumed": True}, "consumed=True"),
        ({"fingerprint": 3}, "fingerprint=3"),
        ({"consumed": 101}, "consumed=101 of 100"),
        ({"consumed": -1}, "consumed=-1 of 100"),
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, Any], message: str) -> None:
    loader = loader_of(100, 10)
    with pytest.raises(IncompatibleOptionsError, match=message):
        loader.load_state_dict({**loader.state_dict(), **change})
    with pytest.raises(IncompatibleOptionsError, match="expected the dictionary"):
        LoaderState.from_dict([])  # type: ignore[arg-type]
    with pytest.raises(IncompatibleOptionsError, match="version None"):
        loader.load_state_dict({})


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["sampler", "batch_sampler"])
def test_torchdata_resumes_it(how: str, workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def make() -> Any:
        dataset = Numbers(100)
        sampler = EpochSampler(dataset, 2, 1, seed=5)
        options: dict[str, Any] = (
            {"sampler": sampler, "batch_size": 8}
            if how == "sampler"
            else {"batch_sampler": BatchSampler(sampler, 8, False, arrays=workers > 0)}
        )
        return stateful.StatefulDataLoader(dataset, num_workers=workers, collate_fn=as_is, **options)

    whole = [batch.tolist() for batch in make()]
    assert sorted(chain(*whole)) == sorted(order(100, 5, 0)[1::2].tolist())
    for point in (0, 1, 4, 6):
        loader = make()
        iterator = iter(loader)
        first = [next(iterator).tolist() for _ in range(point)]
        state = loader.state_dict()
        del iterator
        resumed = make()
        resumed.load_state_dict(state)
        assert first + [batch.tolist() for batch in resumed] == whole


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_torchdata_resumes_it_on_other_ranks_with_another_batch_size() -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def make(batch: int, ranks: int, rank: int) -> Any:
        dataset = Numbers(100)
        batches = BatchSampler(EpochSampler(dataset, ranks, rank, seed=5, padding="none"), batch, False)
        return stateful.StatefulDataLoader(dataset, batch_sampler=batches, collate_fn=as_is)

    pair = [make(8, 2, rank) for rank in range(2)]
    iterators = [iter(loader) for loader in pair]
    first = [next(iterator) for _ in range(3) for iterator in iterators]
    state = pair[0].state_dict()
    rest = []
    for rank in range(3):
        resumed = make(5, 3, rank)
        resumed.load_state_dict(state)
        rest += list(resumed)
    assert len(torch.cat(first)) == 48
    assert sorted(torch.cat([*first, *(torch.as_tensor(batch) for batch in rest)]).tolist()) == list(range(100))


def test_the_program_of_the_documentation_resumes(tmp_path: Path) -> None:
    pytest.importorskip("torchdata")
    data, script = build_pt_dataset(tmp_path / "data", n_pairs=600, dim=8), program("stateful.py", tmp_path)
    printed = [
        subprocess.run(
            [sys.executable, script, data, tmp_path / "state.pt"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert printed == ["saved after 5 of 13 batches\n", "the rest: 8 batches\n"]


def test_a_second_pass_with_the_same_epoch_warns_once() -> None:
    loader = loader_of(100, 10)
    list(loader)
    with pytest.warns(UserWarning, match="begins with epoch 0 again"):
        list(loader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(loader)
        quiet = loader_of(100, 10)
        next(iter(quiet))  # a look at the first batch is no epoch
        list(quiet)
        quiet.set_epoch(1)
        list(quiet)
        evaluation = loader_of(100, 10, shuffle=False)
        list(evaluation)
        list(evaluation)
