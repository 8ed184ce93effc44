"""Training from the command line: what it gains, and going on after an interruption."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import jasper_store as js
from jasper_store.cli import demo as demo_module
from jasper_store.cli.demo import SAMPLE
from tests.cli.conftest import Run

VARIANTS = ("none", "centroid", "keyword_weighted", "residual")
SMALL = ("--batch-size", "8", "--epochs")


def test_train_shows_recall_before_and_after(run: Run, data: Path) -> None:
    result = run("train", data, *SMALL, "2")
    assert result.exit_code == 0, result.output
    for word in ("question alone", "trained", "a guess", *VARIANTS):
        assert word in result.stdout
    assert "epoch 2/2" in result.stderr


def test_train_moves_the_curriculum(run_json: Callable[..., Any], data: Path) -> None:
    found = run_json("train", data, *SMALL, "12")
    assert [report["epoch"] for report in found["epochs"]] == list(range(12))
    assert found["epochs"][0]["probabilities"] == [0.7, 0.2, 0.1, 0.0]
    assert found["epochs"][11]["probabilities"] == [0.5, 0.3, 0.15, 0.05]
    assert set(found["recall_at_1"]["trained"]) == set(VARIANTS)


def test_a_resumed_run_equals_one_that_never_stopped(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run("train", data, *SMALL, "4", "--out", whole).exit_code == 0
    from jasper_store.model.training import Trainer

    saved = Trainer.save

    def save_then_stop(trainer: Trainer, path: Path) -> None:
        saved(trainer, path)
        if trainer.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save_then_stop)
        assert run("train", data, *SMALL, "4", "--out", cut).exit_code == 130
    assert run("train", data, *SMALL, "4", "--out", cut, "--resume").exit_code == 0
    one, other = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (whole, cut))
    assert one["model"].keys() == other["model"].keys()
    for name, weights in one["model"].items():
        assert torch.equal(weights, other["model"][name])


def test_an_interruption_in_the_first_epoch_leaves_a_checkpoint(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jasper_store.model.training import Trainer

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run("train", data, *SMALL, "2", "--out", whole).exit_code == 0
    stepped = Trainer._step
    steps = []

    def step_then_stop(trainer: Trainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        steps.append(0)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return stepped(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step_then_stop)
        result = run("train", data, *SMALL, "2", "--out", cut)
    assert result.exit_code == 130
    assert "0 of 2 epochs" in result.stderr
    assert "--resume" in result.stderr
    assert run("train", data, *SMALL, "2", "--out", cut, "--resume").exit_code == 0
    one, other = (torch.load(path / "checkpoint.pt", weights_only=True)["model"] for path in (whole, cut))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("command", ["train", "demo"])
def test_a_file_where_a_directory_should_be(
    refused: Callable[..., str], data: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_text("mine")
    arguments = [data] if command == "train" else []
    for out in ("file", "file/below"):
        line = refused(6, command, *arguments, "--epochs", "1", "--out", tmp_path / out)
        assert str(tmp_path / out) in line
        assert "Errno" not in line
    assert (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_is_not_overwritten_by_accident(
    run: Run, refused: Callable[..., str], data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("train", data, *SMALL, "1", "--out", out).exit_code == 0
    assert "--resume" in refused(2, "train", data, *SMALL, "1", "--out", out)
    assert "epochs" in refused(2, "train", data, *SMALL, "2", "--out", out, "--resume")
    assert "--out" in refused(2, "train", data, "--resume")


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut"])
def test_a_damaged_checkpoint(refused: Callable[..., str], data: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)
    assert "checkpoint" in refused(4, "train", data, *SMALL, "1", "--out", tmp_path, "--resume")


def test_a_checkpoint_of_something_else(refused: Callable[..., str], data: Path, tmp_path: Path) -> None:
    torch.save({"version": 1, "model": {}}, tmp_path / "checkpoint.pt")
    assert "lacks" in refused(4, "train", data, *SMALL, "1", "--out", tmp_path, "--resume")


def test_the_sample_is_sound(tmp_path: Path) -> None:
    report = js.verify(shutil.copytree(SAMPLE, tmp_path / "sample"))
    assert report.ok, str(report)
    assert {"LICENSE-WordNet-3.0.txt", "LICENSE-Apache-2.0.txt", "README.md"} <= {p.name for p in SAMPLE.iterdir()}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure speeds for one epoch only; the figures are not what is tested."""
    monkeypatch.setattr(demo_module, "_SPEED_SECONDS", 0.0)


@pytest.mark.usefixtures("quick")
def test_demo_shows_every_step(run: Run, tmp_path: Path) -> None:
    result = run("demo", "--epochs", "1", "--out", tmp_path / "kept")
    assert result.exit_code == 0, result.output
    for words in (
        "Stages",
        "clusters",
        "Report: the dataset is sound",
        "Conversion",
        "rows/sample",
        "Recall@1",
        "predictor, untrained",
        "samples/s",
        "epoch 1/1",
    ):
        assert words in result.output
    # The headline: what a memory limit leaves on the disk is mapped, and served beside the others.
    assert "--memory-limit" in result.stdout
    assert "tensors mapped" in result.stdout
    with js.open(tmp_path / "kept" / "hdf5") as store:
        assert store.format == "hdf5"
    assert "<html" in (tmp_path / "kept" / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("quick")
def test_demo_learns_from_real_embeddings(run_json: Callable[..., Any]) -> None:
    before = sorted(path.name for path in SAMPLE.iterdir())
    found = run_json("demo", "--epochs", "20")
    assert found["build"]["counts"]["pairs"] == 1000
    assert [stage["name"] for stage in found["build"]["stages"]] == ["read", "clusters", "splits", "mine", "write"]
    assert found["report"]["ok"]
    recall = found["recall_at_1"]
    assert recall["predictor, untrained"] == recall["question alone"]
    for variant in ("centroid", "keyword_weighted", "residual"):
        assert recall["predictor, 20 epochs"][variant] > recall["question alone"][variant] + 0.1
    assert {(speed["format"], speed["placement"]) for speed in found["speed"]} >= {
        ("pt", "mmap"),
        ("pt", "ram"),
        ("safetensors", "mmap"),
        ("safetensors", "ram"),
        ("hdf5", "chunked"),
    }
    (limited,) = [speed for speed in found["speed"] if speed["memory_limit"] is not None]
    assert limited["mapped"]
    assert 0 < limited["preloaded_nbytes"] <= limited["memory_limit"]
    places = {tensor["name"]: tensor["placement"] for tensor in found["plan_under_limit"]["tensors"]}
    assert sorted(limited["mapped"]) == sorted(name for name, place in places.items() if place == "mmap")
    assert set(places.values()) == {"ram", "mmap"}
    assert sorted(path.name for path in SAMPLE.iterdir()) == before


@pytest.mark.usefixtures("quick")
def test_demo_without_faiss_takes_the_clusters_of_the_sample(
    run_json: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    found = run_json("demo", "--epochs", "1")
    assert found["build"]["counts"]["clusters"] == 41


@pytest.mark.usefixtures("quick")
def test_demo_warms_up_before_it_measures(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[str] = []
    warm_up = js.warm_up

    def watched(store: js.TensorStore) -> js.WarmupReport:
        warmed.append(store.format)
        return warm_up(store)

    monkeypatch.setattr(js, "warm_up", watched)
    assert run("demo", "--epochs", "1").exit_code == 0
    assert sorted(warmed) == sorted(["pt", "pt", "safetensors", "safetensors", "safetensors", "hdf5", "hdf5"])
