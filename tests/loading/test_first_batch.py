"""validate_first_batch: every check fails for its own reason, and looking changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset

from jasper_store.errors import BatchError
from jasper_store.jasper.dataset import JASPERSteeringDataset
from jasper_store.jasper.loader import create_loader
from jasper_store.loading.epochs import set_epoch
from jasper_store.loading.first_batch import validate_first_batch
from tests.builders import build_pt_dataset, jasper_tensors, write_pt


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pt_dataset(tmp_path_factory.mktemp("first") / "data")


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"use_mmap": True, "order": "block"}])
def test_a_sound_dataset_passes(data: Path, split: Any, options: dict[str, Any]) -> None:
    assert validate_first_batch(create_loader(data, split, 3, **options)) is True


def test_plain_loaders_pass(data: Path) -> None:
    dataset = JASPERSteeringDataset(data, "train")
    assert validate_first_batch(DataLoader(dataset, batch_size=4, shuffle=True))
    assert validate_first_batch(DataLoader(Subset(dataset, [3, 1, 2]), batch_size=8))
    assert validate_first_batch(DataLoader(ConcatDataset([dataset, dataset]), batch_size=8))


def test_it_disturbs_nothing(data: Path) -> None:
    loader = create_loader(data, "train", 5, drop_last=False)
    iterator = iter(loader)
    next(iterator)
    state, random = loader.state_dict(), torch.get_rng_state()
    validate_first_batch(loader)
    assert loader.state_dict() == state
    assert torch.equal(torch.get_rng_state(), random)
    rest = list(iterator)
    resumed = create_loader(data, "train", 5, drop_last=False)
    resumed.load_state_dict(state)
    validate_first_batch(resumed)
    assert resumed.state_dict() == state
    for batch, other in zip(rest, resumed, strict=True):
        assert torch.equal(batch["question_emb"], other["question_emb"])
    set_epoch(loader, 1)


def spoiled(key: str, spoil: Callable[[torch.Tensor], Any]) -> Callable[[Any], Any]:
    def collate(batch: Any) -> Any:
        tensors = {name: value.clone() for name, value in batch.tensors.items()}
        tensors[key] = spoil(tensors[key])
        return {name: value for name, value in tensors.items() if value is not None}

    return collate


def put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[2] = value
        return tensor

    return spoil


@pytest.mark.parametrize(
    ("key", "spoil", "check", "said"),
    [
        ("steering", lambda _: None, "keys", "missing steering"),
        ("steering", lambda _: [1], "type", "steering should be a tensor, got list"),
        ("steering", lambda t: t[:, 0], "shape", r"steering should be \[batch, 16\]"),
        ("steering", lambda t: t[:-1], "shape", "batch=3, but question_emb has batch=4"),
        (
            "negative_embs",
            lambda t: t[:, :, 1:],
            "shape",
            r"negative_embs should be \[batch, 3, 16\], got \[4, 3, 15\]",
        ),
        ("negative_tiers", lambda t: t[:, 1:], "shape", r"negative_tiers should be \[batch, 3\], got \[4, 2\]"),
        ("question_emb", lambda t: t.long(), "dtype", "question_emb should be floating point"),
        ("cluster_id", lambda t: t.float(), "dtype", "cluster_id should be integers"),
        ("negative_tiers", lambda t: t.bool(), "dtype", "negative_tiers should be integers"),
        ("question_emb", put(float("nan")), "NaN", "question_emb of sample 2"),
        ("negative_embs", put(float("inf")), "infinity", "negative_embs of sample 2"),
        ("relevance", put(1.5), "range", r"relevance of sample 2 in the batch is \[1.5\], expected 0.0 to 1.0"),
        ("centroid_distance", put(-0.5), "range", "centroid_distance"),
        ("steering_variant", put(4), "range", "steering_variant"),
        ("negative_tiers", put(5), "range", "negative_tiers"),
        ("cluster_id", put(4), "range", r"cluster_id of sample 2 in the batch is \[4\], expected 0 to 3"),
        ("cluster_id", put(-1), "range", "cluster_id"),
    ],
)
def test_every_check_names_itself(data: Path, key: str, spoil: Any, check: str, said: str) -> None:
    loader = create_loader(data, "train", 4, collate_fn=spoiled(key, spoil))
    with pytest.raises(BatchError, match=f"failed the check '{check}': .*{said}") as caught:
        validate_first_batch(loader)
    assert isinstance(caught.value, AssertionError)


def test_nan_in_the_files_is_found(tmp_path: Path) -> None:
    tensors = jasper_tensors()
    tensors["question_embs"][:] = float("nan")
    with pytest.raises(BatchError, match="NaN"):
        validate_first_batch(create_loader(write_pt(tmp_path / "data", tensors), "train", 4))


def test_what_is_no_batch_is_told(data: Path) -> None:
    with pytest.raises(BatchError, match="expected a dictionary"):
        validate_first_batch(create_loader(data, "train", 4, collate_fn=list))


def test_a_rank_without_samples_is_told(data: Path) -> None:
    loader = create_loader(data, "val", 4, rank=99, world_size=100, padding="none")
    with pytest.raises(BatchError, match="no samples"):
        validate_first_batch(loader)
