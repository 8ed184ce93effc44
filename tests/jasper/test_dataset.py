"""The dataset as a user holds it: samples, batches, curriculum, subsets, reloading, closing."""

from __future__ import annotations

import copy
import io
import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, default_collate, random_split

from jasper_store.errors import (
    ClosedError,
    DatasetNotFoundError,
    IncompatibleOptionsError,
    IntegrityError,
    UnknownNameError,
)
from jasper_store.jasper.dataset import JASPERSteeringDataset
from jasper_store.jasper.loader import create_loader
from jasper_store.loading.epochs import set_epoch
from jasper_store.samples.batch import Batch, Sample
from tests.builders import build_pt_dataset, jasper_tensors, write_pt
from tests.jasper.expected import assert_same, expected_batch, expected_sample

TENSORS = jasper_tensors()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return build_pt_dataset(tmp_path / "data")


@pytest.fixture
def ds(directory: Path) -> JASPERSteeringDataset:
    return JASPERSteeringDataset(directory, "train")


def test_samples_are_what_the_tensors_say(ds: JASPERSteeringDataset) -> None:
    assert len(ds) == len(TENSORS["train_idx"])
    for position in range(len(ds)):
        assert_same(ds[position], expected_sample(TENSORS, "train", position))


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("epoch", [0, 15, 45])
def test_batches_are_the_samples(directory: Path, split: str, epoch: int) -> None:
    with JASPERSteeringDataset(directory, split, epoch=epoch, seed=7) as ds:  # type: ignore[arg-type]
        positions = [3, 0, 3, len(ds) - 1]
        batch = ds.__getitems__(positions)
        assert isinstance(batch, Batch)
        assert len(batch) == 4
        assert_same(batch.tensors, expected_batch(TENSORS, split, positions, seed=7, epoch=epoch))
        for place, position in enumerate(positions):
            assert_same(batch[place], ds[position])


@pytest.mark.parametrize("kind", ["list", "tensor", "numpy", "scalars", "range"])
def test_indices_of_any_kind(ds: JASPERSteeringDataset, kind: str) -> None:
    positions = torch.tensor([4, 1, 1, 9])
    given: Any = {
        "list": positions.tolist(),
        "tensor": positions,
        "numpy": positions.numpy(),
        "scalars": list(positions),
        "range": range(4),
    }[kind]
    assert_same(ds.__getitems__(given).tensors, expected_batch(TENSORS, "train", given))


@pytest.mark.parametrize("index", [-1, 35, 10**12, -(10**12)])
def test_index_out_of_range(ds: JASPERSteeringDataset, index: int) -> None:
    with pytest.raises(IndexError):
        ds[index]
    with pytest.raises(IndexError):
        ds.__getitems__([0, index])


def test_an_index_may_be_a_tensor_and_must_be_a_whole_number(ds: JASPERSteeringDataset) -> None:
    assert_same(ds[torch.tensor(3)], ds[3])
    with pytest.raises(TypeError):
        ds["3"]  # type: ignore[index]
    with pytest.raises(TypeError):
        ds[1.5]  # type: ignore[call-overload]


def test_an_empty_batch(ds: JASPERSteeringDataset) -> None:
    batch = ds.__getitems__([])
    assert len(batch) == 0
    assert batch.tensors["negative_embs"].shape == (0, 3, 16)


def test_plain_dataloader_hands_back_gathered_tensors(ds: JASPERSteeringDataset) -> None:
    seen: list[Batch] = []
    original = ds.__getitems__

    def spy(indices: Any) -> Batch:
        seen.append(original(indices))
        return seen[-1]

    ds.__getitems__ = spy  # type: ignore[method-assign]
    batches = list(DataLoader(ds, batch_size=8))
    assert type(batches[0]) is dict
    assert all(batches[0][key] is seen[0].tensors[key] for key in batches[0])
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    assert_same(whole, expected_batch(TENSORS, "train", range(len(ds))))


def test_a_users_own_collate_gets_ordinary_samples(ds: JASPERSteeringDataset) -> None:
    def collate(samples: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        assert all(isinstance(sample, dict) for sample in samples)
        return torch.stack([sample["question_emb"] for sample in samples])

    found = torch.cat(list(DataLoader(ds, batch_size=8, collate_fn=collate)))
    assert torch.equal(found, expected_batch(TENSORS, "train", range(len(ds)))["question_emb"])


def test_subset_concat_and_random_split(ds: JASPERSteeringDataset) -> None:
    wanted = expected_batch(TENSORS, "train", [5, 2, 8])
    (found,) = DataLoader(Subset(ds, [5, 2, 8]), batch_size=3)
    assert_same(found, wanted)
    (found,) = DataLoader(ConcatDataset([Subset(ds, [5]), Subset(ds, [2, 8])]), batch_size=3)
    assert_same(found, wanted)
    one, two = random_split(ds, [10, len(ds) - 10], generator=torch.Generator().manual_seed(1))
    assert sorted([*one.indices, *two.indices]) == list(range(len(ds)))
    (found,) = DataLoader(one, batch_size=10)
    assert_same(found, expected_batch(TENSORS, "train", one.indices))


def test_batch_is_a_sequence_and_collates_from_any_list() -> None:
    batch = Batch({"a": torch.arange(6).view(3, 2), "b": torch.tensor([1.0, 2.0, 3.0])}, 3)
    assert isinstance(batch[0], Sample)
    assert torch.equal(batch[-1]["a"], torch.tensor([4, 5]))
    assert len(batch[1:]) == 2
    assert torch.equal(batch[1:][0]["b"], torch.tensor(2.0))
    with pytest.raises(IndexError):
        batch[3]
    assert [float(sample["b"]) for sample in batch] == [1.0, 2.0, 3.0]
    again = default_collate(list(batch))
    assert_same(again, batch.tensors)
    assert default_collate(batch) is batch.tensors  # type: ignore[arg-type]  # any sequence will do
    assert_same(pickle.loads(pickle.dumps(batch)).tensors, batch.tensors)


# --- curriculum -------------------------------------------------------------------------------------------------


def test_set_epoch_and_stats(ds: JASPERSteeringDataset) -> None:
    assert ds.get_steering_stats() == {
        "epoch": 0,
        "probs": [0.7, 0.2, 0.1, 0.0],
        "variant_names": ["none", "centroid", "keyword_weighted", "residual"],
    }
    ds.set_epoch(45)
    assert ds.epoch == 45
    assert ds.get_steering_stats()["probs"] == [0.0, 0.2, 0.4, 0.4]
    assert_same(ds.__getitems__(range(20)).tensors, expected_batch(TENSORS, "train", range(20), epoch=45))


@pytest.mark.parametrize(
    ("variant", "number"),
    [("none", 0), ("zero", 0), ("centroid", 1), ("keyword_weighted", 2), ("keyword", 2), ("residual", 3)],
)
def test_force_steering(ds: JASPERSteeringDataset, variant: str, number: int) -> None:
    ds.force_steering(variant)
    assert_same(ds.__getitems__(range(9)).tensors, expected_batch(TENSORS, "train", range(9), forced=number))
    ds.force_steering(None)
    assert_same(ds.__getitems__(range(9)).tensors, expected_batch(TENSORS, "train", range(9)))


def test_unknown_names(ds: JASPERSteeringDataset, directory: Path) -> None:
    with pytest.raises(UnknownNameError, match="centroid"):
        ds.force_steering("sideways")
    with pytest.raises(UnknownNameError, match="train, val, test"):
        JASPERSteeringDataset(directory, "training")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="safetensors"):
        JASPERSteeringDataset(directory, "train", storage_format="parquet")


def test_both_config_forms(tmp_path: Path) -> None:
    fixed = {"steering_probabilities": {"zero": 0.0, "centroid": 0.0, "keyword": 1.0, "residual": 0.0}}
    with JASPERSteeringDataset(build_pt_dataset(tmp_path / "fixed", config=fixed), "train") as ds:
        assert set(ds.__getitems__(range(len(ds))).tensors["steering_variant"].tolist()) == {2}
    linear = fixed | {"curriculum": {"zero_prob_start": 1.0, "zero_prob_end": 0.0, "epochs_total": 4}}
    with JASPERSteeringDataset(build_pt_dataset(tmp_path / "linear", config=linear), "train") as ds:
        assert set(ds.__getitems__(range(len(ds))).tensors["steering_variant"].tolist()) == {0}
        ds.set_epoch(1)
        assert ds.get_steering_stats()["probs"] == [0.75, 0.0, 0.25, 0.0]
        ds.set_epoch(4)
        assert set(ds.__getitems__(range(len(ds))).tensors["steering_variant"].tolist()) == {2}


# --- workers ----------------------------------------------------------------------------------------------------


def collect(loader: DataLoader[Any]) -> dict[str, torch.Tensor]:
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_changes_reach_persistent_workers(ds: JASPERSteeringDataset, directory: Path, method: str) -> None:
    loader = DataLoader(ds, batch_size=8, num_workers=2, persistent_workers=True, multiprocessing_context=method)
    everything = range(len(ds))
    assert_same(collect(loader), expected_batch(TENSORS, "train", everything))
    ds.set_epoch(30)
    assert_same(collect(loader), expected_batch(TENSORS, "train", everything, epoch=30))
    ds.force_steering("residual")
    assert_same(collect(loader), expected_batch(TENSORS, "train", everything, epoch=30, forced=3))
    ds.force_steering(None)
    changed = dict(TENSORS, hard_negatives=(TENSORS["hard_negatives"] + 1) % 45)
    torch.save(changed["hard_negatives"], directory / "hard_negatives.tmp")
    (directory / "hard_negatives.tmp").replace(directory / "hard_negatives.pt")
    ds.reload_negatives()
    assert_same(collect(loader), expected_batch(changed, "train", everything, epoch=30))


def test_pickles_small_at_any_size(tmp_path: Path) -> None:
    sizes = []
    for pairs in (50, 5000):
        ds = JASPERSteeringDataset(build_pt_dataset(tmp_path / str(pairs), n_pairs=pairs), "train", use_mmap=False)
        again = pickle.loads(pickle.dumps(ds))
        assert_same(again[3], ds[3])
        sizes.append(len(pickle.dumps(ds)))
        buffer = io.BytesIO()
        multiprocessing.reduction.ForkingPickler(buffer).dump(ds)
        sizes.append(len(buffer.getvalue()))
    assert max(sizes) < 64 << 10
    assert max(sizes) - min(sizes) < 1 << 10


# --- parts ------------------------------------------------------------------------------------------------------


def test_subset_by_cluster(ds: JASPERSteeringDataset) -> None:
    subset = ds.subset_by_cluster([0, 3])
    assert isinstance(subset, Subset)
    clusters = TENSORS["pair_cluster_id"][TENSORS["train_idx"]]
    wanted = [place for place in range(len(ds)) if int(clusters[place]) in {0, 3}]
    assert list(subset.indices) == wanted
    assert len(subset) == len(wanted)
    (found,) = DataLoader(subset, batch_size=len(wanted))
    assert_same(found, expected_batch(TENSORS, "train", wanted))
    assert_same(subset[1], expected_sample(TENSORS, "train", wanted[1]))
    assert len(ds.subset_by_cluster([])) == 0
    with pytest.raises(UnknownNameError, match="cluster 4"):
        ds.subset_by_cluster([4])


def test_combined_splits_share_one_store(directory: Path) -> None:
    splits = JASPERSteeringDataset.create_combined_splits(directory, epoch=12, use_mmap=False)
    assert list(splits) == ["train", "val", "test"]
    stores = {id(ds.store) for ds in splits.values()}
    assert len(stores) == 1
    for split, ds in splits.items():
        assert_same(ds.__getitems__(range(5)).tensors, expected_batch(TENSORS, split, range(5), epoch=12))
    splits["val"].force_steering("none")
    assert splits["train"].get_steering_stats()["epoch"] == 12
    assert_same(splits["train"][0], expected_sample(TENSORS, "train", 0, epoch=12))
    splits["train"].close()
    splits["train"].close()
    assert_same(splits["test"][0], expected_sample(TENSORS, "test", 0, epoch=12))
    with pytest.raises(ClosedError):
        splits["train"][0]
    splits["val"].close()
    store = splits["test"].store
    splits["test"].close()
    assert store.closed


def test_reload_negatives_keeps_the_old_ones_on_any_failure(ds: JASPERSteeringDataset, directory: Path) -> None:
    before = ds.__getitems__(range(10)).tensors
    bad_values = [
        TENSORS["hard_negatives"] + 1000,
        TENSORS["hard_negatives"] - 1000,
        TENSORS["hard_negatives"][:, :2],
        TENSORS["hard_negatives"].float(),
    ]
    for bad in bad_values:
        torch.save(bad, directory / "hard_negatives.pt")
        with pytest.raises(IntegrityError, match="hard_negatives"):
            ds.reload_negatives()
        assert_same(ds.__getitems__(range(10)).tensors, before)
    (directory / "hard_negatives.pt").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="hard_negatives"):
        ds.reload_negatives()
    (directory / "hard_negatives.pt").unlink()
    with pytest.raises(DatasetNotFoundError, match="hard_negatives"):
        ds.reload_negatives()
    assert_same(ds.__getitems__(range(10)).tensors, before)


def test_facts(ds: JASPERSteeringDataset, directory: Path) -> None:
    assert (ds.embedding_dim, ds.n_neg, ds.storage_format) == (16, 3, "pt")
    assert ds.device == torch.device("cpu")
    assert ds.dataset_dir == directory
    assert ds.config["dataset_name"] == "tests"
    assert torch.equal(ds.split_indices, TENSORS["train_idx"])
    assert not ds.use_mmap
    assert ds.memory_usage_mb > 0
    with JASPERSteeringDataset(directory, "train", use_mmap=True) as mapped:
        assert mapped.use_mmap
        assert mapped.memory_usage_mb < ds.memory_usage_mb
        assert mapped.fingerprint() == ds.fingerprint()
    with JASPERSteeringDataset(directory, "val") as val:
        assert val.fingerprint() != ds.fingerprint()


def test_writing_to_a_batch_never_reaches_the_dataset(directory: Path) -> None:
    for use_mmap in (True, False):
        with JASPERSteeringDataset(directory, "train", use_mmap=use_mmap) as ds:
            batch = ds.__getitems__(range(5))
            for value in batch.tensors.values():
                value.zero_()
            assert_same(ds.__getitems__(range(5)).tensors, expected_batch(TENSORS, "train", range(5)))


def test_use_after_close(ds: JASPERSteeringDataset) -> None:
    batch = ds.__getitems__([1])
    ds.close()
    ds.close()
    assert_same(batch.tensors, expected_batch(TENSORS, "train", [1]))
    for use in (
        lambda: ds[0],
        lambda: ds.store,
        lambda: ds.config,
        ds.__enter__,
        ds.get_steering_stats,
        ds.reload_negatives,
    ):
        with pytest.raises(ClosedError, match="open it again"):
            use()
    assert "closed" in repr(ds)


# --- datasets of other builders ---------------------------------------------------------------------------------


def test_tiers_of_other_builders(tmp_path: Path) -> None:
    tensors = jasper_tensors()
    tensors["negative_tiers"] = tensors["negative_tiers"] + 2
    with JASPERSteeringDataset(write_pt(tmp_path / "tiers", tensors), "train") as ds:
        assert_same(ds.__getitems__(range(9)).tensors, expected_batch(tensors, "train", range(9)))


def test_narrow_index_dtypes(tmp_path: Path) -> None:
    tensors = jasper_tensors()
    for name in ("pair_index", "hard_negatives", "train_idx", "pair_cluster_id"):
        tensors[name] = tensors[name].to(torch.int32)
    tensors["negative_tiers"] = tensors["negative_tiers"].to(torch.uint8)
    with JASPERSteeringDataset(write_pt(tmp_path / "narrow", tensors), "train") as ds:
        assert_same(ds.__getitems__(range(9)).tensors, expected_batch(TENSORS, "train", range(9)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_embeddings_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = jasper_tensors(dtype=dtype)
    with JASPERSteeringDataset(write_pt(tmp_path / "d", tensors), "train") as ds:
        assert_same(ds.__getitems__(range(9)).tensors, expected_batch(tensors, "train", range(9)))


def test_config_values_survive(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    with JASPERSteeringDataset(directory, "train") as ds:
        assert ds.config == config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loader_takes_the_dtype_that_messages_recommend(directory: Path, dtype: torch.dtype) -> None:
    batch = next(iter(create_loader(directory, "train", 4, dtype=dtype)))
    assert batch["negative_embs"].dtype is dtype
    assert batch["relevance"].dtype is torch.float32  # one dimension


@pytest.mark.parametrize("epoch", [-1, 1.0, True, "3"])
def test_one_rule_for_epochs(directory: Path, ds: JASPERSteeringDataset, epoch: Any) -> None:
    calls = (
        lambda: JASPERSteeringDataset(directory, "train", epoch=epoch),
        lambda: JASPERSteeringDataset.create_combined_splits(directory, epoch=epoch),
        lambda: create_loader(directory, "train", 4, epoch=epoch),
        lambda: set_epoch(ds, epoch),
        lambda: ds.set_epoch(epoch),
    )
    for call in calls:
        with pytest.raises(IncompatibleOptionsError, match=f"epoch={epoch!r}: expected a whole number, 0 or more"):
            call()
    assert ds.epoch == 0


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("use_mmap", [False, True])
def test_a_copy_lives_where_the_dataset_does(directory: Path, copying: Any, *, use_mmap: bool) -> None:
    ds = JASPERSteeringDataset(directory, "train", use_mmap=use_mmap, epoch=3)
    ds.force_steering("residual")
    copied = copying(ds)
    assert copied.use_mmap is ds.use_mmap is use_mmap
    assert copied.store is ds.store  # nothing is held twice
    assert (copied.epoch, copied.seed, copied.split, copied.config) == (3, ds.seed, "train", ds.config)
    assert_same(copied.__getitems__([5, 3]).tensors, ds.__getitems__([5, 3]).tensors)
    copied.set_epoch(7)
    copied.force_steering(None)
    assert ds.epoch == 3
    assert ds.__getitems__([0]).tensors["steering_variant"].tolist() == [3]
    ds.close()
    with pytest.raises(ClosedError):
        copying(ds)
    assert_same(copied[2], copied[2])  # the store stays open for the copy
    store = copied.store
    copied.close()
    assert store.closed


def test_what_a_subclass_adds_is_copied(directory: Path) -> None:
    class Mine(JASPERSteeringDataset):
        pass

    ds = Mine(directory, "train")
    ds.notes = {"seen": [1]}  # type: ignore[attr-defined]
    shallow, deep = copy.copy(ds), copy.deepcopy(ds)
    assert shallow.notes is ds.notes  # type: ignore[attr-defined]
    assert deep.notes == ds.notes  # type: ignore[attr-defined]
    assert deep.notes["seen"] is not ds.notes["seen"]  # type: ignore[attr-defined]
    assert type(deep) is Mine
