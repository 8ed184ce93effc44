"""A JASPER directory declared by hand is the JASPER dataset: the same bits in every epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import jasper_store as js
from jasper_store.samples.declaration import Field
from tests.builders import build_pt_dataset, jasper_tensors
from tests.jasper.expected import assert_same, default_probabilities, expected_batch

STEERING = ("steering_centroid", "steering_keyword_weighted", "steering_residual")
SPLITS = {"train": "train_idx", "val": "val_idx", "test": "test_idx"}
FIELDS: dict[str, Any] = {
    "question_emb": "question_embs[pair_index[row, 0]]",
    "target_source_emb": "source_embs[pair_index[row, 1]]",
    "steering": js.Choice(STEERING, default_probabilities),
    "negative_embs": "source_embs[hard_negatives[row]]",
    "cluster_id": "pair_cluster_id[row]",
    "relevance": "pair_relevance[row]",
    "centroid_distance": "centroid_distances[row]",
    "steering_variant": js.Variant("steering"),
    "negative_tiers": "negative_tiers[row]",
}
#: The same, in other words: negative columns, fields by name, nested where the other is not.
IN_OTHER_WORDS: dict[str, Any] = {
    "_pair": "pair_index[row]",
    "_question": "pair_index[row, -2]",
    "_source": "pair_index[row, -1]",
    "_negatives": "hard_negatives[row]",
    **FIELDS,
    "question_emb": "question_embs[_question]",
    "target_source_emb": "source_embs[_source]",
    "negative_embs": "source_embs[_negatives]",
    "cluster_id": Field.parse("pair_cluster_id[row]", "cluster_id", torch.int64),
}
SIZES: dict[str, Any] = {"n_pairs": 300, "dim": 16, "n_neg": 3}
SEED = 13


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pt_dataset(tmp_path_factory.mktemp("by_hand") / "data", **SIZES)


def batches_of(dataset: js.Dataset, **options: Any) -> list[dict[str, torch.Tensor]]:
    return list(js.create_loader(dataset, batch_size=16, drop_last=False, **options))


@pytest.mark.parametrize("how", [{"use_mmap": True}, {"use_mmap": False}, {"memory_limit": 30_000}], ids=str)
@pytest.mark.parametrize("fields", [FIELDS, IN_OTHER_WORDS], ids=["as_it_is", "in_other_words"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_declared_by_hand(data: Path, split: Any, fields: dict[str, Any], how: dict[str, Any]) -> None:
    tensors = jasper_tensors(**SIZES)
    theirs = js.JASPERSteeringDataset(data, split, seed=SEED, **how)
    # The directory is JASPER's, and what is declared goes before.
    mine = js.Dataset(data, fields, splits=SPLITS, split=split, seed=SEED, **how)
    with theirs, mine:
        assert len(mine) == len(theirs)
        drawn = set()
        for epoch in (0, 15, 40):
            theirs.set_epoch(epoch)
            mine.set_epoch(epoch)
            every = range(len(theirs))
            wanted = theirs.__getitems__(every).tensors
            assert_same(wanted, expected_batch(tensors, split, every, seed=SEED, epoch=epoch))
            assert_same(mine.__getitems__(every).tensors, wanted)
            drawn |= set(wanted["steering_variant"].tolist())
            for order in ("global", "block"):
                pairs = zip(batches_of(mine, order=order), batches_of(theirs, order=order), strict=True)
                for found, expected in pairs:
                    assert_same(found, expected)
        assert drawn == {0, 1, 2, 3}


def test_it_is_planned_alike(data: Path) -> None:
    theirs = js.JASPERSteeringDataset(data, "train")
    mine = js.Dataset(data, FIELDS, splits=SPLITS, split="train")
    with theirs, mine:
        reads = [{entry.name: entry.reads_per_sample for entry in ds.store.plan.entries} for ds in (mine, theirs)]
        # JASPER plans by the whole curriculum, a choice by hand by epoch 0 unless typical probabilities are given.
        for name in reads[0].keys() - set(STEERING) - {"pair_keyword_ids", "keyword_embs", "centroid_embs"}:
            assert reads[0][name] == reads[1][name], name
        assert list(mine.graph.keys) == list(theirs.graph.keys)
        assert mine.graph.bounds == theirs.graph.bounds
        assert mine.graph.sample_nbytes == theirs.graph.sample_nbytes
