"""A dataset that declares its samples beside its data: written, opened, planned, verified, served, converted."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler as TorchBatchSampler, DataLoader, SequentialSampler

import jasper_store as js
from jasper_store.errors import (
    CorruptFileError,
    DatasetNotFoundError,
    DeclarationError,
    IncompatibleOptionsError,
    UnknownNameError,
)

N, DIM, NEGATIVES = 300, 8, 4
SAMPLES = {
    "fields": {
        "query": "queries[pairs[row, 0]]",
        "positive": "passages[pairs[row, 1]]",
        "negatives": "passages[negatives[row]]",
        "label": "labels[row]",
    },
    "splits": {"train": "train_rows", "test": "test_rows"},
}


def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "queries": random.normal(size=(90, DIM)).astype("f4"),
        "passages": random.normal(size=(120, DIM)).astype("f4"),
        "pairs": np.stack([random.integers(0, 90, N), random.integers(0, 120, N)], 1),
        "negatives": random.integers(0, 120, (N, NEGATIVES)).astype("i4"),
        "labels": random.integers(0, 9, N).astype("u1"),
        "train_rows": random.permutation(N)[:200],
        "test_rows": np.arange(10),
    }


def write(path: Path, storage: str = "safetensors", **options: object) -> Path:
    with js.DatasetWriter(path, storage, samples=SAMPLES, **options) as writer:  # type: ignore[arg-type]
        for name, values in tensors().items():
            writer.append(name, torch.from_numpy(values))
    return path


@pytest.mark.parametrize("storage", ["safetensors", "npy", "hdf5", "pt"])
def test_a_declaration_travels_with_the_data(tmp_path: Path, storage: str) -> None:
    data, values = write(tmp_path / "data", storage), tensors()
    assert json.loads((data / "config.json").read_text())["samples"] == SAMPLES
    loader = js.create_loader(data, "train", 50)
    rows = values["train_rows"]
    batch = next(iter(loader))
    sampler: Any = loader.batch_sampler
    at = next(iter(sampler))
    assert list(batch) == ["query", "positive", "negatives", "label"]
    assert np.array_equal(batch["negatives"].numpy(), values["passages"][values["negatives"][rows[at]]])
    assert np.array_equal(batch["label"].numpy(), values["labels"][rows[at]])
    plan = {entry.name: entry.reads_per_sample for entry in js.plan(data).entries}
    assert plan == {
        "queries": 1, "passages": 1 + NEGATIVES, "pairs": 1, "negatives": 1, "labels": 1, "train_rows": 1, "test_rows": 1,
    }  # fmt: skip
    assert js.verify(data).ok
    assert len(js.create_loader(data, "test", 4)) == 3
    js.warm_up(data)


def test_it_is_converted_with_its_declaration(tmp_path: Path) -> None:
    data = write(tmp_path / "data", "npy")
    js.convert(data, tmp_path / "copy", "hdf5", "gzip")
    with js.Dataset(data, split="train") as first, js.Dataset(tmp_path / "copy", split="train") as second:
        assert second.storage_format == "hdf5"
        assert first.fingerprint() == second.fingerprint()
        for key, value in first[[5, 3, 5]].items():
            assert torch.equal(value, second[[5, 3, 5]][key])


def test_what_does_not_fit_is_not_published(tmp_path: Path) -> None:
    writer = js.DatasetWriter(tmp_path / "data", samples={"emb": "embeddings[i]", "label": "labels[i]"})
    writer.append("embeddings", torch.zeros(4, 2))
    writer.append("labels", torch.zeros(5))
    with pytest.raises(DeclarationError, match="embeddings has 4, labels has 5"):
        writer.close()
    assert not (tmp_path / "data").exists()
    with pytest.raises(DeclarationError, match="cannot be understood"):
        js.DatasetWriter(tmp_path / "data", samples={"emb": "embeddings[i"})
    assert not list(tmp_path.iterdir())


def test_verify_finds_rows_that_do_not_exist_and_numbers_that_are_none(tmp_path: Path) -> None:
    data = write(tmp_path / "data", "npy")
    values = tensors()
    values["negatives"][7, 2] = 120
    values["queries"][3, 1] = np.nan
    for name in ("negatives", "queries"):
        np.save(data / f"{name}.npy", values[name])
    (data / "jasper_store.json").unlink()
    found = {finding.check: finding.message for finding in js.verify(data).errors}
    assert "negatives references row 120 of passages, but only 120 rows exist" in found["index bounds"]
    assert "[7, 2]" in found["index bounds"]
    assert "1 rows hold NaN or Inf, the first is row 3" in found["finite"]


def test_pytorchs_own_ways_of_asking(tmp_path: Path) -> None:
    dataset = js.Dataset(write(tmp_path / "data"), split="train")
    batches = TorchBatchSampler(SequentialSampler(dataset), 16, drop_last=False)
    whole = list(DataLoader(dataset, batch_size=None, sampler=batches))
    plain = list(DataLoader(dataset, batch_size=16))
    assert len(whole) == len(plain)
    for one, other in zip(whole, plain, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in other)
    ours = DataLoader(dataset, batch_size=None, sampler=js.create_loader(dataset, batch_size=16).batch_sampler)
    assert next(iter(ours))["query"].shape == (16, DIM)
    assert torch.equal(dataset[2:5]["query"], dataset[[2, 3, 4]]["query"])
    assert torch.equal(dataset[np.array([4])]["query"][0], dataset[4]["query"])


def test_a_loader_over_an_open_dataset(tmp_path: Path) -> None:
    dataset = js.Dataset(write(tmp_path / "data"), split="train", seed=7)
    loader = js.create_loader(dataset, batch_size=64)
    assert loader.sampler_obj.seed == 7
    assert len(loader) == 3
    assert not js.create_loader(dataset, batch_size=64, shuffle=False).sampler_obj.shuffle
    with pytest.raises(IncompatibleOptionsError, match="use_mmap=True: the dataset is open already"):
        js.create_loader(dataset, batch_size=64, use_mmap=True)
    with pytest.raises(IncompatibleOptionsError, match="open with split 'train'"):
        js.create_loader(dataset, "test", 64)
    with pytest.raises(IncompatibleOptionsError, match=r"200 samples.*at most 200"):
        js.create_loader(dataset, batch_size=5000)
    with pytest.raises(IncompatibleOptionsError, match="batch_size"):
        js.create_loader(dataset)
    with pytest.raises(UnknownNameError, match=r"'dev'.*'train', 'test'"):
        js.create_loader(tmp_path / "data", "dev", 64)


def test_sizes_may_be_written_as_people_do(tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    assert js.Dataset(data, split="train", memory_limit="8GiB").memory_usage_mb > 0
    assert js.Dataset(data, split="train", memory_limit="1KiB").use_mmap
    js.create_loader(data, "train", 8, memory_limit="1GiB")
    assert js.open(data, memory_limit="1KiB").use_mmap
    assert js.warm_up(data, budget="1MiB").budget == 1 << 20


def test_files_of_several_places_and_formats_are_one_dataset(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    emb, label = np.random.default_rng(0).normal(size=(50, 4)).astype("f4"), torch.arange(50)
    np.save(tmp_path / "one" / "emb.npy", emb)
    torch.save(label, tmp_path / "two" / "label.pt")
    files: list[str | Path] = [tmp_path / "one" / "emb.npy", str(tmp_path / "two" / "label.pt")]
    for use_mmap in (True, False, None):
        with js.Dataset(files, use_mmap=use_mmap) as dataset:
            batch = dataset[[7, 3]]
            assert np.array_equal(batch["emb"].numpy(), emb[[7, 3]])
            assert batch["label"].tolist() == [7, 3]
            again = pickle.loads(pickle.dumps(dataset))
            assert torch.equal(again[[7, 3]]["emb"], batch["emb"])
            again.close()
    assert not list(tmp_path.glob("*.json")), "the directory that holds both is no dataset"
    with js.open(files) as store:
        assert list(store) == ["emb", "label"]
    with pytest.raises(CorruptFileError, match="found it twice"):
        js.open([files[0], files[0]])
    with pytest.raises(DatasetNotFoundError, match="empty list"):
        js.Dataset([])
