"""``jasper-store mine``: hard negatives for the bundled sample, in a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import jasper_store as js
from jasper_store.cli.sample import SAMPLE
from tests.building.raw import values
from tests.cli.conftest import Run


@pytest.fixture
def mined(tmp_path: Path) -> Path:
    js.convert(SAMPLE, tmp_path / "sample", "safetensors")
    return tmp_path / "sample"


def test_mine_writes_what_python_writes(run: Run, mined: Path, tmp_path: Path) -> None:
    js.convert(SAMPLE, tmp_path / "same", "safetensors")
    result = run("mine", mined, "--n-neg", "6", "--tiers", "1,1,1,1", "--similarities", "--ranks", "2,90")
    assert result.exit_code == 0, result.output
    for words in ("Negatives", "in cluster", "relative margin", "ranks", "1,000 pairs, 6 negatives each"):
        assert words in result.stdout
    js.mine_negatives(tmp_path / "same", 6, tiers=(1, 1, 1, 1), similarities=True, ranks=(2, 90))
    one, other = values(mined), values(tmp_path / "same")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert run("verify", mined).exit_code == 0
    again = run("mine", mined, "--tiers", "1,1,1,1", "--ranks", "2,90")
    assert "up to date" in again.stdout


def test_the_report_as_json(run_json: Callable[..., Any], mined: Path) -> None:
    found = run_json("mine", mined, "--max-similarity", "0.5", "--tier-numbers", "builder")
    assert sum(found["kinds"].values()) == 5000
    assert found["counts"]["candidates"] == 1_000_000
    assert found["settings"]["max_similarity"] == 0.5
    assert not found["existed"]
    assert set(values(mined)["negative_tiers"].unique().tolist()) <= {1, 2, 3, 4}
    assert run_json("mine", mined, "--max-similarity", "0.5", "--tier-numbers", "builder")["existed"]


def test_errors_speak_of_flags(refused: Callable[..., str], mined: Path, tmp_path: Path) -> None:
    assert "--tiers" in refused(2, "mine", mined, "--tiers", "1,x")
    assert "--relative-margin" in refused(2, "mine", mined, "--relative-margin", "3")
    assert "--method" in refused(2, "mine", mined, "--method", "magic")
    assert "found none" in refused(3, "mine", tmp_path / "none")
