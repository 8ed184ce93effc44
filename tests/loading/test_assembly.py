"""Batches gathered several at a time are the batches gathered one at a time."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from jasper_store.errors import IntegrityError
from jasper_store.jasper.dataset import JASPERSteeringDataset
from jasper_store.jasper.loader import create_loader
from jasper_store.loading import coalescing
from jasper_store.loading.batches import BatchSampler
from jasper_store.loading.coalescing import CoalescingIterator, OwnGathers, batches_at_once
from jasper_store.loading.defaults import fits_ahead
from jasper_store.loading.samplers import EpochSampler
from jasper_store.memory.budget import FRACTION
from jasper_store.samples.dataset import Dataset
from tests.builders import build_pt_dataset

PLACEMENTS = [True, False]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pt_dataset(tmp_path_factory.mktemp("assembly") / "data", n_pairs=203, dim=16)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("use_mmap", PLACEMENTS)
@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("split", ["train", "val"])
def test_it_serves_what_pytorchs_iterator_serves(data: Path, use_mmap: bool, batch_size: int, split: Any) -> None:
    loader = create_loader(data, split, batch_size, use_mmap=use_mmap, drop_last=False)
    batches = list(loader)
    positions = list(loader.batch_sampler)  # type: ignore[arg-type]
    assert len(batches) == len(positions) == len(loader)
    for batch, wanted in zip(batches, positions, strict=True):
        assert same(batch, loader.dataset_obj.__getitems__(wanted).tensors)
        assert all(value.is_contiguous() for value in batch.values())


def test_how_many() -> None:
    assert batches_at_once(32, 12_000) == 32
    assert batches_at_once(256, 12_000) == 4
    assert batches_at_once(2048, 12_000) == 1
    assert batches_at_once(256, 1 << 20) == 1
    assert batches_at_once(1, 0) == 4096


def test_what_is_set_during_an_epoch_holds_from_the_next_batch_on(data: Path) -> None:
    loader = create_loader(data, "train", 10)
    dataset = loader.dataset_obj
    batches = iter(loader)
    next(batches)
    dataset.force_steering("residual")
    assert bool((next(batches)["steering_variant"] == 3).all())
    dataset.force_steering("none")
    forced = next(batches)
    assert bool((forced["steering_variant"] == 0).all())
    assert not forced["steering"].any()
    dataset.force_steering(None)
    served = [next(batches) for _ in range(2)]
    positions = list(loader.batch_sampler)  # type: ignore[arg-type]
    for batch, wanted in zip(served, positions[3:5], strict=True):
        assert same(batch, dataset.__getitems__(wanted).tensors)


def test_negatives_that_are_mined_anew_come_with_the_next_batch(data: Path, tmp_path: Path) -> None:
    copy = build_pt_dataset(tmp_path / "data", n_pairs=120, dim=16)
    loader = create_loader(copy, "train", 10)
    batches = iter(loader)
    before = next(batches)
    negatives = torch.load(copy / "hard_negatives.pt", weights_only=True)
    torch.save(torch.flip(negatives, [1]), copy / "hard_negatives.pt")
    loader.dataset_obj.reload_negatives()
    wanted = list(loader.batch_sampler)  # type: ignore[arg-type]
    assert same(next(batches), loader.dataset_obj.__getitems__(wanted[1]).tensors)
    assert not torch.equal(loader.dataset_obj.__getitems__(wanted[0]).tensors["negative_embs"], before["negative_embs"])
    torch.save(negatives + 10**6, copy / "hard_negatives.pt")
    with pytest.raises(IntegrityError):
        loader.dataset_obj.reload_negatives()
    assert same(next(batches), loader.dataset_obj.__getitems__(wanted[2]).tensors)


def test_writing_to_one_batch_changes_no_other_and_troubles_no_gradient(data: Path) -> None:
    loader = create_loader(data, "train", 10)
    weights = torch.ones(16, requires_grad=True)
    batches = iter(loader)
    first, second = next(batches), next(batches)
    kept = {key: value.clone() for key, value in first.items()}
    loss = (first["question_emb"] * weights).pow(2).sum()
    for value in second.values():
        value.zero_()  # with a version counter in common, backward() would refuse
    loss.backward()
    assert weights.grad is not None
    assert same(first, kept)
    again = create_loader(data, "train", 10)
    assert same(next(iter(again)), kept)


def test_a_users_collation_gets_samples(data: Path) -> None:
    seen: list[int] = []

    def collate(samples: Any) -> Any:
        seen.append(len(samples))
        return torch.stack([sample["question_emb"] for sample in samples])

    loader = create_loader(data, "train", 10, collate_fn=collate)
    plain = create_loader(data, "train", 10)
    for ours, theirs in zip(loader, plain, strict=True):
        assert torch.equal(ours, theirs["question_emb"])
    assert set(seen) == {10}


def test_a_dataset_of_the_users_own_is_served_by_pytorch(data: Path) -> None:
    class Mine(JASPERSteeringDataset):
        def __getitems__(self, indices: Any) -> Any:
            return [{"count": torch.tensor(len(indices))}]

    loader = create_loader(data, "train", 10)
    loader.dataset_obj.__class__ = Mine
    assert int(next(iter(loader))["count"]) == 10


def test_global_random_numbers_are_drawn_as_by_pytorch(data: Path) -> None:
    loader = create_loader(data, "val", 5)
    torch.manual_seed(1)
    list(loader)
    ours = torch.rand(3)
    torch.manual_seed(1)
    list(DataLoader(loader.dataset_obj, 5))
    assert torch.equal(torch.rand(3), ours)


def test_nothing_is_held_after_the_last_batch(data: Path) -> None:
    dataset = JASPERSteeringDataset(data, "train")
    sampler = EpochSampler(dataset, 1, 0, shuffle=False)
    indices = BatchSampler(sampler, -(-len(dataset) // 2), drop_last=False).tensors()
    batches = CoalescingIterator(dataset, OwnGathers(dataset, indices, 8), lambda batch: batch.tensors)
    assert len(list(batches)) == 2
    assert not batches._parts
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_megabytes_stay_what_they_are(tmp_path: Path, workers: int) -> None:
    """Large takes use memory again; a batch that is kept must keep it."""
    big = build_pt_dataset(tmp_path / "big", n_pairs=4000, n_questions=900, n_sources=900, dim=256)
    loader = create_loader(big, "train", 800, workers, use_mmap=False)
    kept = list(loader)
    assert kept[0]["question_emb"].nbytes > 512 << 10
    for batch, wanted in zip(kept, loader.batch_sampler, strict=True):  # type: ignore[arg-type]
        assert same(batch, loader.dataset_obj.__getitems__(wanted).tensors)


def test_a_pass_is_the_same_whether_units_are_begun_or_not(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where beginning fails: the error belongs to the batch that has the row, and it may never be asked for."""
    monkeypatch.setattr(coalescing, "_NBYTES", 8 << 10)
    found = []
    for begin in (Dataset.begin_gather, lambda *_: None, _refuse):
        monkeypatch.setattr(Dataset, "begin_gather", begin)
        found.append(list(create_loader(data, "train", 3, use_mmap=False)))
    assert len(found[0]) > 40
    for others in found[1:]:
        assert all(same(first, second) for first, second in zip(found[0], others, strict=True))


def _refuse(*_: object) -> None:
    raise IndexError("row 7 of embs: it has 3 rows")


def test_what_is_set_while_a_unit_is_begun_counts(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coalescing, "_NBYTES", 8 << 10)
    loader = create_loader(data, "train", 3, use_mmap=False)
    dataset = loader.dataset_obj
    for position, (batch, wanted) in enumerate(zip(loader, loader.batch_sampler, strict=True)):  # type: ignore[arg-type]
        assert same(batch, dataset.__getitems__(wanted).tensors)
        dataset.set_epoch(position)


def test_a_pass_that_is_left_while_a_unit_is_begun(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that were served stay what they are when the dataset is closed, or its memory used for others."""
    monkeypatch.setattr(coalescing, "_NBYTES", 8 << 10)
    for closes in [True, False] * 20:
        loader = create_loader(data, "train", 3, use_mmap=False)
        first, passing = next(iter(loader)), iter(loader)
        kept = {key: value.clone() for key, value in first.items()}
        assert same(first, next(passing))
        if closes:
            loader.dataset_obj.close()
        del passing, loader
        gc.collect()
        assert same(first, kept)


def test_a_unit_of_staged_rows_is_not_begun(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for the next batches releases the rows of these."""
    monkeypatch.setattr(coalescing, "_NBYTES", 8 << 10)
    for use_mmap in PLACEMENTS:
        loader = create_loader(data, "train", 3, use_mmap=use_mmap)
        batches = loader.begin_pass()[0]
        next(batches)
        assert (batches.gathers._begun is None) == use_mmap  # type: ignore[attr-defined]


def test_a_unit_is_begun_only_if_the_memory_limit_has_room_for_two(data: Path) -> None:
    loader = create_loader(data, "train", 8, use_mmap=False)
    dataset = loader.dataset_obj
    left = dataset.store.plan.budget.nbytes - dataset.store.plan.preloaded_nbytes
    assert fits_ahead(dataset, left // 2)
    assert not fits_ahead(dataset, left // 2 + 1)
    just_enough = int(dataset.store.plan.preloaded_nbytes / FRACTION) + 4096
    limited = create_loader(data, "train", 8, use_mmap=False, memory_limit=just_enough)
    passing = limited.begin_pass()[0]
    next(passing)
    assert passing.gathers._ahead is False  # type: ignore[attr-defined]
