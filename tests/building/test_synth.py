"""The synthetic dataset: valid, reproducible, and something to learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import jasper_store as js
from jasper_store.building import synth
from jasper_store.building.synth import SynthOptions, synthesize
from jasper_store.errors import IncompatibleOptionsError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("synth") / "data", SynthOptions(pairs=1000, dim=24, n_neg=4, clusters=8))


def test_is_valid(made: Path) -> None:
    report = js.verify(made)
    assert report.ok, str(report)
    assert not report.warnings, str(report)


def test_everything_is_computed_from_the_embeddings(made: Path) -> None:
    with js.open(made) as store:
        get = {name: store[name].tensor() for name in store}
    pairs, clusters = get["pair_index"], get["pair_cluster_id"]
    questions, sources = get["question_embs"][pairs[:, 0]], get["source_embs"][pairs[:, 1]]
    centroids = get["centroid_embs"][clusters]
    assert torch.allclose(get["centroid_distances"], 1 - (questions * centroids).sum(1), atol=1e-5)
    assert torch.equal(get["steering_centroid"], centroids)
    assert torch.allclose(get["steering_residual"], questions - centroids, atol=1e-6)
    positive = (questions * sources).sum(1)
    negative = torch.einsum("nd,nkd->nk", questions, get["source_embs"][get["hard_negatives"]])
    # Hard, but not hopeless: the positive is usually nearer than each negative, not always nearer than all.
    assert 0.6 < float((positive[:, None] > negative).float().mean()) < 1.0
    tiers = get["negative_tiers"]
    means = [float(negative[tiers == tier].mean()) for tier in range(3)]
    assert means == sorted(means)
    assert means[2] - means[0] > 0.05


def test_is_a_function_of_its_options(tmp_path: Path) -> None:
    options = SynthOptions(pairs=200, dim=8, n_neg=3, clusters=4, seed=3)
    one, two = (synthesize(tmp_path / name, options) for name in ("one", "two"))
    three = synthesize(tmp_path / "three", SynthOptions(pairs=200, dim=8, n_neg=3, clusters=4, seed=4))
    for name in ("question_embs", "hard_negatives", "train_idx", "steering_keyword_weighted"):
        first, again, other = ((path / f"{name}.safetensors").read_bytes()[4096:] for path in (one, two, three))
        assert first == again
        assert first != other


def test_blocks_of_any_size_are_mined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "_BLOCK", 64)
    path = synthesize(tmp_path / "data", SynthOptions(pairs=129, dim=8, n_neg=3, clusters=4), format="npy")
    report = js.verify(path)
    assert report.ok, str(report)
    assert js.open(path)["pair_index"].n_rows == 129


@pytest.mark.parametrize(
    "options",
    [
        {"pairs": 10},
        {"pairs": 100, "clusters": 1},
        {"pairs": 100, "n_neg": 0},
        {"pairs": 100, "clusters": 50, "n_neg": 2},
    ],
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleOptionsError):
        SynthOptions(**options)
