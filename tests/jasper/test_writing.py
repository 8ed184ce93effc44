"""A JASPER dataset that grows: what is checked, and that it is still one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import jasper_store as js
from jasper_store.errors import IntegrityError, JasperStoreError
from tests.builders import build_pt_dataset


@pytest.mark.parametrize("fmt", ["safetensors", "hdf5"])
def test_more_pairs_for_training(tmp_path: Path, fmt: str) -> None:
    js.convert(build_pt_dataset(tmp_path / "pt", n_neg=3), tmp_path / "set", fmt)
    with js.JASPERSteeringDataset(tmp_path / "set", "train") as data:
        length = len(data)
        first = data[0]["question_emb"].clone()
    writer = js.DatasetWriter(tmp_path / "set", mode="append")
    writer.append("train_idx", torch.tensor([0, 1]))
    with pytest.raises(IntegrityError, match="split_sizes"):
        writer.close()
    config = json.loads((tmp_path / "set" / "config.json").read_text())
    del config["split_sizes"]
    (tmp_path / "set" / "config.json").write_text(json.dumps(config))
    with js.DatasetWriter(tmp_path / "set", mode="append") as writer:
        writer.append("train_idx", torch.tensor([0, 1]))
    with js.JASPERSteeringDataset(tmp_path / "set", "train") as data:
        assert len(data) == length + 2
        assert torch.equal(data[0]["question_emb"], first)
    loader = js.create_loader(tmp_path / "set", "train", batch_size=4, num_workers=2)
    assert sum(len(batch["question_emb"]) for batch in loader) >= length


def test_pairs_without_negatives_are_refused(tmp_path: Path) -> None:
    js.convert(build_pt_dataset(tmp_path / "pt", n_neg=3), tmp_path / "set")
    with js.open(tmp_path / "set") as store:
        pairs = store["pair_index"].take([0])
    writer = js.DatasetWriter(tmp_path / "set", mode="append")
    writer.append("pair_index", pairs)
    with pytest.raises(IntegrityError, match="Append to all"):
        writer.close()
    with js.JASPERSteeringDataset(tmp_path / "set", "train") as data:
        assert len(data)


def test_shards_bring_their_declaration(tmp_path: Path) -> None:
    for shard in range(2):
        with js.DatasetWriter(tmp_path / "set", shard=shard, shards=2, samples={"emb": "emb[i]"}) as writer:
            writer.append("emb", torch.full((3, 2), float(shard)))
    assert js.commit(tmp_path / "set") == tmp_path / "set"
    with js.Dataset(tmp_path / "set") as data:
        assert len(data) == 6
        assert data[5]["emb"].tolist() == [1.0, 1.0]


def test_shards_that_do_not_fit_their_declaration(tmp_path: Path) -> None:
    for shard in range(2):
        fields = {"emb": "emb[i]", "label": "label[i]"}
        with js.DatasetWriter(tmp_path / "set", shard=shard, shards=2, samples=fields) as writer:
            writer.append("emb", torch.zeros(3, 2))
            writer.append("label", torch.zeros(3 - shard))
    with pytest.raises(JasperStoreError):
        js.commit(tmp_path / "set")
    assert not (tmp_path / "set" / "config.json").exists()
