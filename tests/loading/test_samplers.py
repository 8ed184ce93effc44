"""The samplers: drop-in replacements of PyTorch's, index tensors without a number per sample, any rank's share."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch.utils.data import BatchSampler as TorchBatchSampler, DataLoader, DistributedSampler, RandomSampler

from jasper_store.errors import IncompatibleOptionsError, UnknownNameError
from jasper_store.loading.batches import BatchSampler
from jasper_store.loading.order import order
from jasper_store.loading.samplers import DRAW, SENT_DRAW, EpochSampler
from tests.jasper.fakes import Numbers, as_is


def shares(n: int, ranks: int, **options: Any) -> list[list[int]]:
    return [list(EpochSampler(Numbers(n), ranks, rank, **options)) for rank in range(ranks)]


def test_it_is_a_drop_in_distributed_sampler() -> None:
    sampler = EpochSampler(Numbers(103), num_replicas=4, rank=1, shuffle=True, seed=3, drop_last=False)
    assert isinstance(sampler, DistributedSampler)
    theirs: DistributedSampler[int] = DistributedSampler(
        Numbers(103), num_replicas=4, rank=1, shuffle=True, seed=3, drop_last=False
    )
    for name in ("num_replicas", "rank", "epoch", "drop_last", "num_samples", "total_size", "shuffle", "seed"):
        assert getattr(sampler, name) == getattr(theirs, name), name
    assert len(sampler) == len(theirs)
    assert all(type(index) is int for index in sampler)


def test_a_plain_script_is_rank_0_of_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    sampler = EpochSampler(Numbers(10))
    assert (sampler.rank, sampler.num_replicas) == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    sampler = EpochSampler(Numbers(10))
    assert (sampler.rank, sampler.num_replicas) == (1, 2)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="padding 'half'"):
        EpochSampler(Numbers(3), padding="half")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="order 'sorted'"):
        EpochSampler(Numbers(3), order_kind="sorted")
    with pytest.raises(IncompatibleOptionsError, match="rank 2 of world_size 2"):
        EpochSampler(Numbers(3), 2, 2)
    for size in (0, -1, True, 2.0):
        with pytest.raises(IncompatibleOptionsError, match="batch_size="):
            BatchSampler(range(3), size, False)  # type: ignore[arg-type]


@given(n=st.integers(0, 400), ranks=st.integers(1, 7), kind=st.sampled_from(["global", "block"]))
def test_ranks_share_an_epoch(n: int, ranks: int, kind: str) -> None:
    whole = EpochSampler(Numbers(n), 1, 0, order_kind=kind).order[:].tolist()
    exact = shares(n, ranks, padding="none", order_kind=kind)
    for rank, share in enumerate(exact):
        assert share == whole[rank::ranks]
        assert len(share) == len(EpochSampler(Numbers(n), ranks, rank, padding="none"))
    wrapped = shares(n, ranks, order_kind=kind)
    assert len({len(share) for share in wrapped}) == 1
    assert {index for share in wrapped for index in share} == set(whole)
    assert sum(map(len, wrapped)) - n < ranks
    cut = shares(n, ranks, drop_last=True, order_kind=kind)
    assert len({len(share) for share in cut}) == 1
    served = [index for share in cut for index in share]
    assert len(set(served)) == len(served) == n - n % ranks


def test_more_ranks_than_samples() -> None:
    assert sorted(chain(*shares(2, 5, padding="none"))) == [0, 1]
    wrapped = shares(2, 5)
    assert [len(share) for share in wrapped] == [1] * 5
    assert shares(2, 5, drop_last=True) == [[]] * 5


def test_epochs_reach_sampler_and_dataset() -> None:
    dataset = Numbers(1000)
    sampler = EpochSampler(dataset, 1, 0, seed=9)
    for epoch in (0, 4, 4, 2):
        sampler.set_epoch(epoch)
        assert dataset.epoch == epoch
        assert list(sampler) == order(1000, 9, epoch)[:].tolist()
    assert list(sampler) == list(sampler)


def test_without_shuffling_every_epoch_is_as_it_lies() -> None:
    sampler = EpochSampler(Numbers(20), 2, 1, shuffle=False)
    sampler.set_epoch(3)
    assert list(sampler) == list(range(1, 20, 2))


def test_iteration_is_lazy_at_any_size() -> None:
    sampler = EpochSampler(Numbers(10**12), 1, 0)
    indices = iter(sampler)
    assert [next(indices) for _ in range(3)] == order(10**12, 0, 0)[:3].tolist()


# --- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64, 100, DRAW - 1, DRAW, DRAW + 1, 3 * DRAW])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_are_slices_of_the_epoch(size: int, drop_last: bool) -> None:
    n = 2 * DRAW + 77
    sampler = EpochSampler(Numbers(n), 1, 0)
    batches = BatchSampler(sampler, size, drop_last)
    assert isinstance(batches, TorchBatchSampler)
    served = list(batches)
    assert len(served) == len(batches) == len(TorchBatchSampler(sampler, size, drop_last))
    assert all(batch.dtype == torch.int64 and batch.ndim == 1 for batch in served)
    assert all(len(batch) == size for batch in served[:-1])
    flat = torch.cat(served) if served else torch.empty(0, dtype=torch.int64)
    assert torch.equal(flat, order(n, 0, 0)[: n // size * size if drop_last else n])


def test_arrays_for_workers() -> None:
    batches = list(BatchSampler(EpochSampler(Numbers(10), 1, 0), 4, False, arrays=True))
    assert all(isinstance(batch, np.ndarray) and batch.dtype == np.int64 for batch in batches)
    assert np.concatenate(batches).tolist() == order(10, 0, 0)[:].tolist()


def test_a_foreign_sampler_is_asked_number_by_number() -> None:
    assert [list(batch) for batch in BatchSampler(range(5), 2, False)] == [[0, 1], [2, 3], [4]]
    assert [list(batch) for batch in BatchSampler(range(5), 2, True)] == [[0, 1], [2, 3]]
    drawn = [index for batch in BatchSampler(RandomSampler(Numbers(9)), 4, False) for index in batch]
    assert sorted(drawn) == list(range(9))
    BatchSampler(range(5), 2, True).set_epoch(3)


def test_a_batch_sampler_passes_the_epoch_on() -> None:
    dataset = Numbers(50)
    batches = BatchSampler(EpochSampler(dataset, 1, 0), 8, False)
    batches.set_epoch(5)
    assert dataset.epoch == 5
    assert torch.equal(torch.cat(list(batches)), order(50, 0, 5)[:])


def test_iterators_are_independent_and_may_be_abandoned() -> None:
    batches = BatchSampler(EpochSampler(Numbers(100), 1, 0), 8, False)
    first = iter(batches)
    next(first)
    second = iter(batches)
    assert torch.equal(next(second), order(100, 0, 0)[:8])
    assert torch.equal(next(first), order(100, 0, 0)[8:16])
    del first, second
    assert torch.equal(torch.cat(list(batches)), order(100, 0, 0)[:])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["sampler", "batch_sampler"])
def test_a_plain_dataloader_takes_them(how: str, workers: int) -> None:
    dataset = Numbers(100)
    sampler = EpochSampler(dataset, 3, 1, seed=2)
    options: dict[str, Any] = (
        {"sampler": sampler, "batch_size": 8}
        if how == "sampler"
        else {"batch_sampler": BatchSampler(sampler, 8, False, arrays=workers > 0)}
    )
    loader: DataLoader[Any] = DataLoader(dataset, num_workers=workers, collate_fn=as_is, **options)
    served = torch.cat(list(loader))
    assert torch.equal(served, sampler.indices(0, 0, len(sampler)))


@pytest.mark.cuda
@pytest.mark.parametrize("n", [1000, 100_000, 4 * SENT_DRAW])
def test_indices_arrive_on_a_device_wherever_they_are_made(n: int) -> None:
    sampler = EpochSampler(Numbers(n), 2, 1, device="cuda")
    batches = list(BatchSampler(sampler, 256, False))
    assert all(batch.is_cuda for batch in batches)
    assert torch.cat(batches).tolist() == list(EpochSampler(Numbers(n), 2, 1))
