"""The public functions: what they pass down, and what verify finds."""

from __future__ import annotations

import ast
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import jasper_store as js
from jasper_store import errors
from tests.builders import build_pt_dataset, jasper_tensors, write_pt

FIXED = {
    "open", "plan", "warm_up", "convert", "verify", "DatasetWriter", "JASPERSteeringDataset", "create_loader",
    "set_epoch", "validate_first_batch", "errors",
}  # fmt: skip


def test_public_names_are_a_decision() -> None:
    public = {name for name in dir(js) if not name.startswith("_")}
    assert set(js.__all__) >= FIXED
    assert public == set(js.__all__)
    assert js.__all__ == sorted(js.__all__)


@pytest.mark.parametrize("name", sorted(set(js.__all__) - {"errors"}))
def test_public_names_are_documented(name: str) -> None:
    thing = getattr(js, name)
    assert thing.__doc__
    assert len(thing.__doc__) > 40
    methods = (
        [value for key, value in vars(thing).items() if callable(value) and not key.startswith("_")]
        if isinstance(thing, type)
        else []
    )
    assert all(method.__doc__ for method in methods)


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_are_also_builtins_and_survive_a_worker(name: str) -> None:
    kind = getattr(errors, name)
    if issubclass(kind, Warning):
        assert issubclass(kind, errors.JasperStoreWarning)
        return
    error = kind("expected this, found that, do so", path="x", tensor="y")
    assert str(error) == "expected this, found that, do so"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.path, again.tensor) == (kind, str(error), "x", "y")
    # PyTorch rebuilds a worker's error from its text alone.
    assert str(kind("text alone")) == "text alone"


def test_errors_are_drawn_in_their_tree() -> None:
    drawn = ast.get_docstring(ast.parse(Path(errors.__file__).read_text())) or ""
    assert all(name in drawn for name in errors.__all__)


def test_plan_and_open_agree(tmp_path: Path) -> None:
    directory = build_pt_dataset(tmp_path / "data", n_neg=3)
    plan = js.plan(directory)
    reads = {entry.name: entry.reads_per_sample for entry in plan.entries}
    assert reads["source_embs"] == 4
    assert reads["keyword_embs"] == 0
    with js.open(directory) as store:
        assert [(e.name, e.placement) for e in store.plan.entries] == [(e.name, e.placement) for e in plan.entries]
        assert "source_embs" in str(store.plan)
        assert store.ragged("pair_keyword_ids")[0].tolist() == jasper_tensors()["pair_keyword_ids"][0]


def test_open_any_directory_and_any_file(tmp_path: Path) -> None:
    values = torch.randn(7, 3)
    save_file({"a": values, "b": values * 2}, tmp_path / "model.safetensors")
    np.save(tmp_path / "other.npy", values.numpy())
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with js.open(tmp_path / "model.safetensors") as store:
        assert sorted(store) == ["a", "b"]
        assert torch.equal(store["b"].take([6, 0]), values[[6, 0]] * 2)
    with js.open(tmp_path, format="npy") as store:
        assert torch.equal(store["other"].tensor(), values)


def findings(report: js.VerifyReport) -> set[tuple[str, str | None, str]]:
    return {(found.severity, found.tensor, found.check) for found in [*report.errors, *report.warnings]}


def test_verify_a_good_dataset(tmp_path: Path) -> None:
    directory = build_pt_dataset(tmp_path / "data")
    js.convert(directory, tmp_path / "s")
    report = js.verify(tmp_path / "s")
    assert report.ok
    # Fifty pairs of forty questions: some question stands in two splits.
    assert {check for _, _, check in findings(report)} <= {"split leakage"}
    json.dumps(report.to_dict())


def broken(name: str, change: Any) -> dict[str, Any]:
    tensors = jasper_tensors()
    tensors[name] = change(tensors[name])
    return tensors


def put(values: torch.Tensor, place: Any, value: Any) -> torch.Tensor:
    values = values.clone()
    values[place] = value
    return values


CASES = {
    "nan": (broken("source_embs", lambda t: put(t, (3, 1), float("nan"))), ("error", "source_embs", "finite")),
    "inf": (
        broken("steering_residual", lambda t: put(t, (0, 0), float("-inf"))),
        ("error", "steering_residual", "finite"),
    ),
    "zero": (broken("question_embs", lambda t: put(t, 5, 0.0)), ("warning", "question_embs", "zero rows")),
    "relevance": (broken("pair_relevance", lambda t: put(t, 2, 1.5)), ("error", "pair_relevance", "range")),
    "distance": (broken("centroid_distances", lambda t: put(t, 2, -0.5)), ("error", "centroid_distances", "range")),
    "distance nan": (
        broken("centroid_distances", lambda t: put(t, 2, float("nan"))),
        ("error", "centroid_distances", "range"),
    ),
    "tier": (broken("negative_tiers", lambda t: put(t, (9, 0), 7)), ("error", "negative_tiers", "range")),
    "index": (broken("pair_index", lambda t: put(t, (9, 0), 40)), ("error", "pair_index", "index bounds")),
    "keyword": (broken("pair_keyword_ids", lambda t: [[20], *t[1:]]), ("error", "pair_keyword_ids", "index bounds")),
    "overlap": (
        broken("val_idx", lambda t: put(t, 0, int(jasper_tensors()["train_idx"][0]))),
        ("error", "val_idx", "split overlap"),
    ),
    "repeat": (broken("train_idx", lambda t: put(t, 0, int(t[1]))), ("warning", "train_idx", "repeated pairs")),
    "missed": (broken("train_idx", lambda t: put(t, 0, int(t[1]))), ("warning", "train_idx", "missed pairs")),
    "positive": (
        broken("hard_negatives", lambda t: put(t, (4, 1), int(jasper_tensors()["pair_index"][4, 1]))),
        ("error", "hard_negatives", "positive among negatives"),
    ),
    "twice": (
        broken("hard_negatives", lambda t: put(t, (4, 1), int(t[4, 0]))),
        ("warning", "hard_negatives", "repeated negatives"),
    ),
    "shape": (broken("pair_relevance", lambda t: t[:-1]), ("error", "pair_relevance", "structure")),
}


@pytest.mark.parametrize("case", CASES)
def test_verify_finds(tmp_path: Path, case: str) -> None:
    tensors, expected = CASES[case]
    report = js.verify(write_pt(tmp_path / "data", tensors))
    assert expected in findings(report)
    assert report.ok == (expected[0] != "error")
    assert expected[2] in str(report)


def test_verify_with_positions_that_can_be_looked_up(tmp_path: Path) -> None:
    tensors, _ = CASES["nan"]
    (found,) = js.verify(write_pt(tmp_path / "data", tensors)).errors
    assert found.position == 3
    assert "row 3" in found.message


def test_verify_damage_after_conversion(tmp_path: Path) -> None:
    js.convert(build_pt_dataset(tmp_path / "data"), tmp_path / "s")
    file = tmp_path / "s" / "source_embs.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    report = js.verify(tmp_path / "s")
    assert ("error", "source_embs", "checksum") in findings(report)


def test_verify_a_missing_split_and_a_missing_tensor(tmp_path: Path) -> None:
    directory = build_pt_dataset(tmp_path / "data")
    (directory / "test_idx.pt").unlink()
    report = js.verify(directory)
    assert ("warning", "test_idx", "missing split") in findings(report)
    (directory / "pair_index.pt").unlink()
    assert ("error", "pair_index", "structure") in findings(js.verify(directory))


def test_writer_knows_the_names(tmp_path: Path) -> None:
    tensors = jasper_tensors()
    source = write_pt(tmp_path / "source", tensors)
    config = json.loads((source / "config.json").read_text())
    for kind in ("safetensors", "hdf5", "npy", "pt"):
        with js.DatasetWriter(tmp_path / kind, kind, config=config) as writer:
            for name, values in tensors.items():
                if isinstance(values, list):
                    writer.append_ragged(name, values)
                else:
                    for block in values.split(17):
                        writer.append(name, block)
        assert js.verify(tmp_path / kind).ok
        with js.JASPERSteeringDataset(tmp_path / kind, "train") as ds, js.JASPERSteeringDataset(source, "train") as pt:
            assert ds.storage_format == kind
            for key, value in pt.__getitems__(range(len(pt))).tensors.items():
                assert torch.equal(ds.__getitems__(range(len(pt))).tensors[key], value)


def test_warm_up_takes_a_path_or_a_store(tmp_path: Path) -> None:
    directory = build_pt_dataset(tmp_path / "data")
    assert js.warm_up(directory, tensors=["source_embs"]) is not None
    with js.open(directory, use_mmap=True) as store:
        report = js.warm_up(store)
        assert "source_embs" in str(report)


@pytest.mark.parametrize(
    ("config", "samples", "says"),
    [
        ({"embedding_dim": 2, "n_neg": 2}, None, ("source_embs", "pair_index", "centroid_distances")),
        (None, {"x": "nope[i]", "y": "question_embs[nada[i]]"}, ("'nope'", "'nada'")),
    ],
)
def test_a_writer_names_all_tensors_that_are_missing(
    tmp_path: Path, config: Any, samples: Any, says: tuple[str, ...]
) -> None:
    writer = js.DatasetWriter(tmp_path / "out", config=config, samples=samples)
    writer.append("question_embs", torch.ones(4, 2))
    with pytest.raises((js.errors.DatasetNotFoundError, js.errors.UnknownNameError)) as caught:
        writer.close()
    assert all(name in str(caught.value) for name in says)
    assert not (tmp_path / "out").exists()


def test_a_writer_refuses_a_jasper_dataset_that_contradicts_itself(tmp_path: Path) -> None:
    with js.JASPERSteeringDataset(build_pt_dataset(tmp_path / "data"), "train") as dataset:
        config, tensors = dataset.config, {name: tensor.tensor() for name, tensor in dataset.store.items()}
        ragged = dataset.store.ragged("pair_keyword_ids")
        lists = [ragged[row].tolist() for row in range(len(ragged))]
    wrong = tensors | {"hard_negatives": tensors["hard_negatives"][:, :1]}
    for name, values in (("right", tensors), ("wrong", wrong)):
        writer = js.DatasetWriter(tmp_path / name, config=config)
        for key, value in values.items():
            if not key.startswith("pair_keyword_ids"):
                writer.append(key, value)
        writer.append_ragged("pair_keyword_ids", lists)
        if name == "right":
            writer.close()
            assert js.verify(tmp_path / name).ok
        else:
            with pytest.raises(js.errors.IntegrityError, match="hard_negatives has 1 columns, expected 3"):
                writer.close()
            assert not (tmp_path / name).exists()
