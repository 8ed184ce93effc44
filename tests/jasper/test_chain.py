"""A batch made by one call of the kernel is the batch made step by step, bit by bit, whatever happens meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jasper_store.errors import ClosedError
from jasper_store.jasper.dataset import JASPERSteeringDataset
from jasper_store.native import gather
from jasper_store.samples import draw as way
from tests.builders import build_pt_dataset

pytestmark = pytest.mark.skipif(gather.kernel() is None, reason="the kernel was not built: no C compiler here")

EPOCHS = [0, 15, 40]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return build_pt_dataset(tmp_path / "data", n_pairs=120, dim=24)


def step_by_step(dataset: JASPERSteeringDataset, positions: Any) -> dict[str, torch.Tensor]:
    draw = dataset.draw_now()
    return dataset.reader.gather(dataset.reader.resolve(positions, draw), draw)


def compiled(dataset: JASPERSteeringDataset) -> Any:
    return dataset._compiled_now(dataset.draw_now())


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return list(first) == list(second) and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


@pytest.mark.parametrize("epoch", EPOCHS)
@pytest.mark.parametrize("forced", [None, "none", "residual"])
@pytest.mark.parametrize("size", [0, 1, 5, 84])
def test_equal_to_step_by_step(data: Path, epoch: int, forced: str | None, size: int) -> None:
    dataset = JASPERSteeringDataset(data, "train", epoch, use_mmap=False)
    dataset.force_steering(forced)
    assert compiled(dataset) is not None
    positions = torch.randperm(len(dataset))[:size]
    for wanted in (positions, positions.tolist(), positions.numpy(), positions.to(torch.int32)):
        assert same(dataset.__getitems__(wanted).tensors, step_by_step(dataset, positions))


def test_equal_without_a_kernel(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = torch.randperm(84)
    fast = JASPERSteeringDataset(data, "train", 40, use_mmap=False).__getitems__(positions).tensors
    monkeypatch.setattr(gather, "kernel", lambda: None)
    for use_mmap in (False, True):
        slow = JASPERSteeringDataset(data, "train", 40, use_mmap=use_mmap)
        assert compiled(slow) is None
        assert same(fast, slow.__getitems__(positions).tensors)


def test_mapped_data_has_no_chain(data: Path) -> None:
    assert compiled(JASPERSteeringDataset(data, "train", use_mmap=True)) is None


def test_many_pairs_have_no_table_and_no_chain(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = torch.randperm(84)
    fast = JASPERSteeringDataset(data, "train", 15, use_mmap=False).__getitems__(positions).tensors
    monkeypatch.setattr(way, "_TABLE_ROWS", 50)
    dataset = JASPERSteeringDataset(data, "train", 15, use_mmap=False)
    assert compiled(dataset) is None
    assert same(fast, dataset.__getitems__(positions).tensors)


def test_new_negatives_are_followed(data: Path) -> None:
    splits = JASPERSteeringDataset.create_combined_splits(data, use_mmap=False)
    train, val = splits["train"], splits["val"]
    before = [dataset.__getitems__([0, 1]).tensors["negative_embs"] for dataset in (train, val)]
    negatives = torch.load(data / "hard_negatives.pt")
    torch.save(negatives.flip(1), data / "hard_negatives.pt")
    train.reload_negatives()
    for dataset, old in zip((train, val), before, strict=True):
        assert torch.equal(dataset.__getitems__([0, 1]).tensors["negative_embs"], old.flip(1))


def test_a_position_out_of_range_is_named(data: Path) -> None:
    dataset = JASPERSteeringDataset(data, "train", use_mmap=False)
    for bad in (-1, len(dataset)):
        with pytest.raises(IndexError, match=f"row {bad} at position 1"):
            dataset.__getitems__([0, bad])


def test_a_closed_dataset_says_so(data: Path) -> None:
    dataset = JASPERSteeringDataset(data, "train", use_mmap=False)
    dataset.__getitems__([0])
    store = dataset.store
    store.close()
    with pytest.raises(ClosedError):
        dataset.__getitems__([0])
    dataset.close()
    with pytest.raises(ClosedError):
        dataset.__getitems__([0])
