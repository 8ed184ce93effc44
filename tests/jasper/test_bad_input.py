"""Everything that can be wrong with a dataset gets its own error, before anything is served, and leaves nothing open."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from jasper_store.errors import (
    CorruptFileError,
    DatasetNotFoundError,
    IncompatibleOptionsError,
    InsufficientMemoryError,
    IntegrityError,
    JasperStoreError,
)
from jasper_store.jasper.dataset import JASPERSteeringDataset
from jasper_store.jasper.schema import TENSORS
from tests.builders import build_pt_dataset, jasper_tensors, write_pt


def open_files() -> set[str]:
    """Files of this process that are open or mapped, by path."""
    handles = {str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}
    maps = {line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    return handles | maps


def refuse(directory: Path, error: type[Exception], text: str, split: str = "train", **how: Any) -> None:
    for use_mmap in (None, True, False):
        with pytest.raises(error, match=text) as caught:
            JASPERSteeringDataset(directory, split, use_mmap=use_mmap, **how)  # type: ignore[arg-type]
        assert isinstance(caught.value, JasperStoreError)
        assert isinstance(caught.value, ValueError)
        assert "Traceback" not in str(caught.value)
    if Path("/proc/self/fd").exists():
        left = {name for name in open_files() if name.startswith(str(directory) + os.sep)}
        assert not left, "left open"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return build_pt_dataset(tmp_path / "data")


def test_missing_directory(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", DatasetNotFoundError, "not found")
    with pytest.raises(FileNotFoundError):
        JASPERSteeringDataset(tmp_path / "nowhere", "train")


def test_missing_config(directory: Path) -> None:
    (directory / "config.json").unlink()
    refuse(directory, DatasetNotFoundError, "config")


@pytest.mark.parametrize(
    "text", ["", "{", "not json", "[1, 2]", '"text"', "\xff\xfe", "[" * 100_000, '{"n": ' + "9" * 5000 + "}"]
)
def test_config_that_is_not_json(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text, encoding="latin-1")
    refuse(directory, CorruptFileError, "JSON")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"embedding_dim": None}, "embedding_dim"),
        ({"embedding_dim": 17}, "expected 17 as in embedding_dim"),
        ({"embedding_dim": "16"}, "embedding_dim"),
        ({"embedding_dim": -16}, "embedding_dim"),
        ({"embedding_dim": True}, "embedding_dim"),
        ({"n_neg": 4}, "expected 4 as in n_neg"),
        ({"n_neg": 0}, "n_neg"),
        ({"n_clusters": 5}, "expected 5 as n_clusters"),
        ({"split_sizes": {"train": 36}}, "expected 36 as split_sizes"),
        ({"split_sizes": {"train": "36"}}, "split_sizes"),
        ({"split_sizes": 36}, "split_sizes"),
    ],
)
def test_config_that_lacks_or_contradicts_a_dimension(directory: Path, change: dict[str, Any], text: str) -> None:
    config = json.loads((directory / "config.json").read_text()) | change
    (directory / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    refuse(directory, IntegrityError, text)


@pytest.mark.parametrize("name", [name for name in jasper_tensors() if not name.endswith("_idx")])
def test_missing_tensor(directory: Path, name: str) -> None:
    (directory / f"{name}.pt").unlink()
    if TENSORS[name].optional:
        with JASPERSteeringDataset(directory, "train") as ds:
            assert len(ds[0]) == 9
        return
    refuse(directory, DatasetNotFoundError, name)


def test_all_missing_tensors_are_named_at_once(directory: Path) -> None:
    for name in ("hard_negatives", "source_embs", "train_idx"):
        (directory / f"{name}.pt").unlink()
    refuse(directory, DatasetNotFoundError, "source_embs, hard_negatives, train_idx are missing")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_missing_split(directory: Path, split: str) -> None:
    (directory / f"{split}_idx.pt").unlink()
    refuse(directory, DatasetNotFoundError, f"{split}_idx", split=split)
    other = "val" if split == "train" else "train"
    JASPERSteeringDataset(directory, other).close()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("pair_index", 999, "pair_index references question 999, but only 40 questions exist"),
        ("pair_index", -1, "pair_index references question -1, but only 40 questions exist"),
        ("hard_negatives", 45, "hard_negatives references source 45, but only 45 sources exist"),
        ("hard_negatives", -3, "hard_negatives references source -3, but only 45 sources exist"),
        ("pair_cluster_id", 4, "pair_cluster_id references cluster 4, but only 4 clusters exist"),
        ("pair_cluster_id", -1, "pair_cluster_id references cluster -1"),
        ("train_idx", 50, "train_idx references pair 50, but only 50 pairs exist"),
        ("train_idx", -1, "train_idx references pair -1"),
    ],
)
def test_index_out_of_bounds(tmp_path: Path, name: str, value: int, what: str) -> None:
    tensors = jasper_tensors()
    tensors[name].view(-1)[-2 if name == "pair_index" else 7] = value
    refuse(write_pt(tmp_path / "bad", tensors), IntegrityError, what)


def test_source_and_keyword_out_of_bounds(tmp_path: Path) -> None:
    tensors = jasper_tensors()
    tensors["pair_index"][11, 1] = 45
    refuse(
        write_pt(tmp_path / "source", tensors),
        IntegrityError,
        r"pair_index references source 45, but only 45 sources exist \(at position \[11, 1\]",
    )
    tensors = jasper_tensors()
    tensors["pair_keyword_ids"][3] = [1, 20]
    refuse(
        write_pt(tmp_path / "keyword", tensors), IntegrityError, "pair_keyword_ids references keyword 20, but only 20"
    )


@pytest.mark.parametrize("name", [name for name in jasper_tensors() if name != "pair_keyword_ids"])
def test_wrong_dtype(tmp_path: Path, name: str) -> None:
    tensors = jasper_tensors()
    tensors[name] = tensors[name].long() if tensors[name].is_floating_point() else tensors[name].float()
    refuse(write_pt(tmp_path / "bad", tensors), IntegrityError, f"{name} should have")


@pytest.mark.parametrize("name", [name for name in jasper_tensors() if not name.endswith("_idx")])
def test_wrong_number_of_rows(tmp_path: Path, name: str) -> None:
    tensors = jasper_tensors()
    tensors[name] = tensors[name][:-1]
    if name in {"question_embs", "source_embs", "keyword_embs"}:
        # Nothing else says how many there should be, so it is an index that breaks, if one does.
        tensors["pair_index"][:, 0].clamp_(max=37), tensors["pair_index"][:, 1].clamp_(max=42)
        return
    directory = write_pt(tmp_path / "bad", tensors)
    (directory / "config.json").write_text(json.dumps({"embedding_dim": 16, "n_neg": 3, "n_clusters": 4}))
    refuse(directory, IntegrityError, "has")


@pytest.mark.parametrize("name", [name for name in jasper_tensors() if name != "pair_keyword_ids"])
def test_wrong_number_of_dimensions(tmp_path: Path, name: str) -> None:
    tensors = jasper_tensors()
    directory = build_pt_dataset(tmp_path / "bad")
    torch.save(tensors[name].unsqueeze(-1), directory / f"{name}.pt")
    refuse(directory, IntegrityError, f"{name} should have shape")


def test_legacy_pt(directory: Path) -> None:
    torch.save(torch.zeros(40, 16), directory / "question_embs.pt", _use_new_zipfile_serialization=False)
    refuse(directory, CorruptFileError, "question_embs")


def test_hostile_pickle_is_refused_and_never_run(directory: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    torch.save(Hostile(), directory / "source_embs.pt")
    refuse(directory, CorruptFileError, "source_embs")
    assert not (tmp_path / "pwned").exists()


def test_preloading_what_does_not_fit(directory: Path) -> None:
    with pytest.raises(InsufficientMemoryError, match="memory_limit") as caught:
        JASPERSteeringDataset(directory, "train", use_mmap=False, memory_limit=100)
    assert isinstance(caught.value, MemoryError)
    with JASPERSteeringDataset(directory, "train", memory_limit=100) as ds:
        assert ds.use_mmap


@pytest.mark.parametrize("missing", [True, False])
def test_guard_refuses_before_anything_is_opened(tmp_path: Path, directory: Path, missing: bool) -> None:
    """Without CUDA on the machine, and even without a dataset."""
    where = tmp_path / "nowhere" if missing else directory
    with pytest.raises(IncompatibleOptionsError, match="use_mmap"):
        JASPERSteeringDataset(where, "train", device="cuda", use_mmap=True)


def test_empty_split_is_served(tmp_path: Path) -> None:
    tensors = jasper_tensors()
    tensors["val_idx"] = torch.empty(0, dtype=torch.int64)
    with JASPERSteeringDataset(write_pt(tmp_path / "empty", tensors), "val") as ds:
        assert len(ds) == 0
        with pytest.raises(IndexError):
            ds[0]


def test_read_only_directory(directory: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write to a read-only directory")
    shutil.copytree(directory, directory.with_name("copy"))
    directory.chmod(0o500)
    with JASPERSteeringDataset(directory, "train") as ds:
        assert len(ds) == 35
