"""A packed JASPER dataset: the same samples and draws, files that are verified, columns written anew, refusals."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import jasper_store as js
from jasper_store.errors import (
    ConversionError,
    CorruptFileError,
    DatasetNotFoundError,
    DeclarationError,
    IncompatibleOptionsError,
    IntegrityError,
    StaleDataWarning,
    UnknownNameError,
)
from jasper_store.jasper.schema import SPLITS
from jasper_store.packing import pack as packing, parts
from jasper_store.samples.declaration import Choice, Variant
from tests.builders import build_pt_dataset, jasper_tensors
from tests.packing.packs import require_same, same, small_blocks


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build_pt_dataset(tmp_path / "data", n_pairs=203, dim=16)


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("memory", [1, 20_000, None])
def test_samples_and_draws_are_those_of_the_source(
    source: Path, tmp_path: Path, memory: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_LEAST_ROOM", 1)
    report = js.pack(source, tmp_path / "packed", memory_limit=memory)
    assert report.samples == {"train": 142, "val": 30, "test": 31}
    for split in SPLITS:
        require_same(source, tmp_path / "packed", split)
    assert js.verify(tmp_path / "packed").ok
    assert [path.name for path in tmp_path.iterdir() if path.name[0] == "."] == []


def test_the_bytes_do_not_depend_on_the_memory(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_LEAST_ROOM", 1)
    js.pack(source, tmp_path / "one", memory_limit=1)
    js.pack(source, tmp_path / "two")
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one.keys() == two.keys()
    assert one["part-000001/packed.safetensors"] == two["part-000001/packed.safetensors"]


@pytest.mark.parametrize("fmt", ["safetensors", "npy", "hdf5"])
def test_any_format_gives_the_same_bytes(source: Path, tmp_path: Path, fmt: str) -> None:
    js.convert(source, tmp_path / "other", fmt, "gzip" if fmt == "hdf5" else None)
    shutil.copy(source / "config.json", tmp_path / "other")
    js.pack(source, tmp_path / "one")
    js.pack(tmp_path / "other", tmp_path / "two")
    part = "part-000001/packed.safetensors"
    assert files(tmp_path / "one")[part] == files(tmp_path / "two")[part]


def test_another_seed_is_another_order_of_the_same(source: Path, tmp_path: Path) -> None:
    js.pack(source, tmp_path / "one", seed=1)
    js.pack(source, tmp_path / "two", seed=2)
    require_same(source, tmp_path / "two")
    with js.open(tmp_path / "one") as one, js.open(tmp_path / "two") as two:
        assert not torch.equal(one["packed_row"].tensor(), two["packed_row"].tensor())


def test_safetensors_reads_the_file(source: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    js.pack(source, tmp_path / "packed")
    found = load_file(tmp_path / "packed" / "part-000001" / "packed.safetensors")
    with js.open(tmp_path / "packed") as store:
        assert torch.equal(found["question_emb.000003"], store["question_emb"][48:64])


def test_fields_are_left_out(source: Path, tmp_path: Path) -> None:
    js.pack(source, tmp_path / "packed", fields=["question_emb", "negative_embs"])
    with (
        js.JASPERSteeringDataset(tmp_path / "packed", "train") as packed,
        js.JASPERSteeringDataset(source, "train") as one,
    ):
        assert list(packed[0]) == ["question_emb", "negative_embs"]
        rows = packed.store["packed_row"].take(packed.split_indices.long()).tolist()
        position = one.split_indices.tolist().index(rows[7])
        assert torch.equal(packed[7]["negative_embs"], one[position]["negative_embs"])
        with pytest.raises(IncompatibleOptionsError, match="left out when the dataset was packed"):
            packed.subset_by_cluster([0])


def test_narrowed_fields(source: Path, tmp_path: Path) -> None:
    report = js.pack(source, tmp_path / "packed", dtype="float16")
    assert 0 < report.max_error["question_emb"] < 1e-3
    with (
        js.JASPERSteeringDataset(tmp_path / "packed", "train") as packed,
        js.JASPERSteeringDataset(source, "train") as one,
    ):
        rows = packed.store["packed_row"].take(packed.split_indices.long()).tolist()
        where = one.split_indices.tolist()
        wanted, found = one[[where.index(row) for row in rows]], packed[list(range(len(packed)))]
    assert found["negative_embs"].dtype == torch.float16
    assert found["relevance"].dtype == torch.float32
    wanted = {key: found[key] if key == "relevance" else value for key, value in wanted.items()}
    same({key: value.to(found[key].dtype) for key, value in wanted.items()}, found)


def test_a_value_that_would_be_infinite_is_refused(tmp_path: Path) -> None:
    source = build_pt_dataset(tmp_path / "data", n_pairs=40)
    torch.save(torch.full((40, 16), 1e6), source / "question_embs.pt")
    with pytest.raises(IntegrityError, match="float16 ends at 65504"):
        js.pack(source, tmp_path / "packed", dtype="float16")
    assert not (tmp_path / "packed").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_open_dataset_packs_its_split(source: Path, tmp_path: Path) -> None:
    with js.JASPERSteeringDataset(source, "val") as dataset:
        js.pack(dataset, tmp_path / "packed")
    require_same(source, tmp_path / "packed", "val")
    with pytest.raises(DatasetNotFoundError, match="expected a packed split 'train', found val"):
        js.JASPERSteeringDataset(tmp_path / "packed", "train")


def test_some_splits(source: Path, tmp_path: Path) -> None:
    js.pack(source, tmp_path / "packed", splits=["test", "train"])
    require_same(source, tmp_path / "packed", "test")
    with pytest.raises(UnknownNameError, match="unknown split 'trian'"):
        js.pack(source, tmp_path / "other", splits=["trian"])


def test_packed_again(source: Path, tmp_path: Path) -> None:
    js.pack(source, tmp_path / "one")
    js.pack(tmp_path / "one", tmp_path / "two", seed=7)
    with (
        js.JASPERSteeringDataset(tmp_path / "one", "train") as one,
        js.JASPERSteeringDataset(tmp_path / "two", "train") as two,
    ):
        rows = two.store["packed_row"].take(two.split_indices.long()).tolist()
        where = one.split_indices.tolist()
        for epoch in (0, 40):
            one.set_epoch(epoch)
            two.set_epoch(epoch)
            same(one[[where.index(row) for row in rows]], two[list(range(len(two)))])


def test_clusters_and_loaders(source: Path, tmp_path: Path) -> None:
    js.pack(source, tmp_path / "packed")
    with (
        js.JASPERSteeringDataset(tmp_path / "packed", "train") as packed,
        js.JASPERSteeringDataset(source, "train") as one,
    ):
        assert len(packed.subset_by_cluster([1, 2])) == len(one.subset_by_cluster([1, 2]))
        with pytest.raises(UnknownNameError, match="clusters 0 to 3"):
            packed.subset_by_cluster([4])
        with pytest.raises(IncompatibleOptionsError, match="pack them again"):
            packed.reload_negatives()
        packed.force_steering("residual")
        assert packed[0]["steering_variant"] == 3
    loader = js.create_loader(tmp_path / "packed", "train", 8, epoch=40)
    assert loader.order == "block"
    assert "the samples are packed" in loader.explain()
    js.validate_first_batch(loader)
    assert len(list(js.create_loader(tmp_path / "packed", "val", 8))) == 4


# --- columns written anew ---------------------------------------------------------------------------------------------


def test_new_negatives(source: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    js.pack(source, packed)
    before = js.JASPERSteeringDataset(packed, "train")
    old = before[list(range(len(before)))]
    tensors = jasper_tensors(n_pairs=203, dim=16, seed=5)
    other = (tensors["hard_negatives"] * 0 + torch.arange(3)) + (torch.load(source / "pair_index.pt")[:, 1:] > 20) * 0
    torch.save(other, source / "hard_negatives.pt")
    torch.save(tensors["negative_tiers"], source / "negative_tiers.pt")
    with pytest.warns(StaleDataWarning, match=r"hard_negatives.pt.*--columns"):
        js.JASPERSteeringDataset(packed, "train").close()
    data = (packed / "part-000001" / "packed.safetensors").read_bytes()
    report = js.pack(source, packed, columns=["negative_embs", "negative_tiers"])
    assert report.generation == 2
    assert set(report.columns) == {"negative_embs", "negative_tiers"}
    assert (packed / "part-000001" / "packed.safetensors").read_bytes() == data
    for split in SPLITS:
        require_same(source, packed, split)
    assert js.verify(packed).ok
    same(old, before[list(range(len(before)))])  # a reader keeps what it has open
    before.close()


def test_columns_of_another_source_are_refused(source: Path, tmp_path: Path) -> None:
    js.pack(source, tmp_path / "packed")
    kept = files(tmp_path / "packed")
    with pytest.raises(UnknownNameError, match="no packed field 'negatives'"):
        js.pack(source, tmp_path / "packed", columns=["negatives"])
    other = build_pt_dataset(tmp_path / "other", n_pairs=204, dim=16)
    with pytest.raises(ConversionError, match="pack the whole dataset"):
        js.pack(other, tmp_path / "packed", columns=["negative_embs"])
    torch.save(torch.load(source / "train_idx.pt").flip(0), source / "train_idx.pt")
    with pytest.raises(ConversionError, match="splits list the rows that were packed"):
        js.pack(source, tmp_path / "packed", columns=["negative_embs"])
    with pytest.raises(ConversionError, match="expected a packed dataset"):
        js.pack(source, tmp_path / "other", columns=["negative_embs"])
    assert files(tmp_path / "packed") == kept


# --- damage, refusals -------------------------------------------------------------------------------------------------


def test_verify_finds_a_flipped_byte_in_any_column(source: Path, tmp_path: Path) -> None:
    js.pack(source, tmp_path / "packed")
    path = tmp_path / "packed" / "part-000001" / "packed.safetensors"
    with js.open(tmp_path / "packed", use_mmap=True) as store:
        specs = {spec.name: spec for spec in store.specs}
    data = bytearray(path.read_bytes())
    for name, spec in specs.items():
        place: Any = spec.location
        offset = int(place.offset if hasattr(place, "offset") else place.offsets[len(place.offsets) // 2])
        data[offset] ^= 1
        path.write_bytes(data)
        wrong = js.verify(tmp_path / "packed").errors
        assert name in {found.tensor for found in wrong}, name
        data[offset] ^= 1
    path.write_bytes(data)
    assert js.verify(tmp_path / "packed").ok


def test_a_file_that_is_cut_does_not_open(source: Path, tmp_path: Path) -> None:
    js.pack(source, tmp_path / "packed")
    path = tmp_path / "packed" / "part-000001" / "packed.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptFileError, match="truncated or replaced"):
        js.JASPERSteeringDataset(tmp_path / "packed", "train")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"fields": ["question_embs"]}, UnknownNameError, "no field 'question_embs' is served.*question_emb"),
        ({"fields": []}, IncompatibleOptionsError, "at least one field"),
        ({"fields": ["steering_variant"]}, IncompatibleOptionsError, "pack both, or neither"),
        ({"dtype": "int8"}, IncompatibleOptionsError, "only floating tensors are narrowed"),
        ({"dtype": "half"}, (IncompatibleOptionsError, UnknownNameError), "half"),
        ({"memory_limit": "lots"}, IncompatibleOptionsError, "lots"),
    ],
)
def test_options_that_make_no_sense(
    source: Path, tmp_path: Path, options: dict[str, Any], error: Any, match: str
) -> None:
    with pytest.raises(error, match=match):
        js.pack(source, tmp_path / "packed", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_directory_that_is_there_is_kept(source: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "notes.txt").write_text("mine")
    with pytest.raises(ConversionError, match="overwrite=True"):
        js.pack(source, tmp_path / "packed")
    with pytest.raises(ConversionError, match=r"notes.txt; move them away"):
        js.pack(source, tmp_path / "packed", overwrite=True)
    js.pack(source, tmp_path / "other")
    js.pack(source, tmp_path / "other", overwrite=True, fields=["question_emb"])
    with js.JASPERSteeringDataset(tmp_path / "other", "train") as packed:
        assert list(packed[0]) == ["question_emb"]


def test_a_source_that_changes_meanwhile_is_not_published(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = parts._write_index

    def change(*arguments: Any) -> Any:
        torch.save(torch.rand(203), source / "pair_relevance.pt")
        return real(*arguments)

    monkeypatch.setattr(parts, "_write_index", change)
    with pytest.raises(ConversionError, match=r"pair_relevance.pt.*Nothing was published"):
        js.pack(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_what_is_written_by_a_later_release_is_refused(source: Path, tmp_path: Path) -> None:
    js.pack(source, tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    config["packed"]["version"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(CorruptFileError, match="version 2"):
        js.JASPERSteeringDataset(tmp_path / "packed", "train")


# --- any dataset --------------------------------------------------------------------------------------------------------


def write_generic(directory: Path, n: int = 100) -> Path:
    g = torch.Generator().manual_seed(3)
    with js.DatasetWriter(directory) as writer:
        writer.append("emb", torch.randn(n, 8, generator=g))
        writer.append("other", torch.randn(n, 8, generator=g))
        writer.append("label", torch.arange(n))
    return directory


def test_a_dataset_of_which_nothing_is_declared(tmp_path: Path) -> None:
    source = write_generic(tmp_path / "data")
    js.pack(source, tmp_path / "packed")
    with js.Dataset(source) as one, js.Dataset(tmp_path / "packed") as packed:
        rows = packed.store["packed_row"].tensor()
        assert sorted(rows.tolist()) == list(range(100))
        same(one[rows], packed[list(range(100))])
        assert len(list(js.create_loader(packed, batch_size=7, drop_last=False))) == 15


def test_probabilities_that_are_a_function_are_given_again(tmp_path: Path) -> None:
    source = write_generic(tmp_path / "data")

    def by_epoch(epoch: int) -> tuple[float, float, float]:
        return (0.5, 0.5, 0.0) if epoch < 3 else (0.0, 0.25, 0.75)

    fields: dict[str, Any] = {
        "some": Choice(("emb", "other"), by_epoch, rows="row"),
        "which": Variant("some"),
        "label": "label[i]",
    }
    with js.Dataset(source, fields) as dataset:
        js.pack(dataset, tmp_path / "packed")
        with pytest.raises(DeclarationError, match="a function of the epoch"):
            js.Dataset(tmp_path / "packed")
        again = {
            **fields,
            "some": Choice(("emb", "other"), by_epoch, rows="row", key="packed_row"),
            "label": "label[row]",
        }
        with js.Dataset(tmp_path / "packed", again) as packed:
            rows = packed.store["packed_row"].tensor()
            for epoch in (0, 5):
                dataset.set_epoch(epoch)
                packed.set_epoch(epoch)
                same(dataset[rows], packed[list(range(100))])


def test_no_samples(tmp_path: Path) -> None:
    source = write_generic(tmp_path / "data")
    torch.save(torch.empty(0, dtype=torch.int64), tmp_path / "none.pt")
    with js.DatasetWriter(tmp_path / "data2") as writer:
        writer.append("emb", torch.randn(5, 8))
        writer.append("rows", torch.empty(0, dtype=torch.int64))
    with js.Dataset(tmp_path / "data2", {"emb": "emb[row]"}, splits={"train": "rows"}, split="train") as dataset:
        report = js.pack(dataset, tmp_path / "packed")
    assert report.samples == {"train": 0}
    with js.Dataset(tmp_path / "packed", split="train") as packed:
        assert len(packed) == 0
    assert source.exists()
