"""``jasper-store pack``, and what ``plan`` says of packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from jasper_store.cli.app import app
from tests.builders import build_pt_dataset
from tests.packing.packs import require_same, small_blocks


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return build_pt_dataset(tmp_path / "data", n_pairs=400, dim=64, n_questions=3000, n_sources=3000)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_pack_and_its_columns(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    done = run("pack", data, tmp_path / "packed")
    assert done.exit_code == 0, done.output
    assert "train 280, val 60, test 60 samples" in done.output
    require_same(data, tmp_path / "packed")
    done = run("pack", data, tmp_path / "packed", "--columns", "negative_tiers, relevance", "--json")
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout)["columns"]) == {"negative_tiers", "relevance"}
    done = run(
        "pack", data, tmp_path / "half", "--dtype", "float16", "--splits", "val", "--fields", "question_emb,relevance"
    )
    assert done.exit_code == 0, done.output
    assert "question_emb: largest error" in done.output
    for command in ("inspect", "verify", "plan", "warm"):
        done = run(command, tmp_path / "packed")
        assert done.exit_code == 0, done.output
    assert run("report", tmp_path / "packed", "--out", tmp_path / "report.html").exit_code == 0
    assert run("convert", tmp_path / "packed", tmp_path / "npy", "--to", "npy").exit_code == 0


def test_errors_name_what_to_do(data: Path, tmp_path: Path) -> None:
    assert "did you mean 'relevance'" in run("pack", data, tmp_path / "p", "--fields", "relevanc").output.replace(
        "\n", " "
    )
    run("pack", data, tmp_path / "p")
    refused = run("pack", data, tmp_path / "p")
    assert refused.exit_code != 0
    assert "--overwrite" in refused.output
    compacted = run("compact", tmp_path / "p")
    assert compacted.exit_code != 0
    assert "pack again" in compacted.output


def test_plan_says_where_packing_pays_and_that_a_source_has_changed(data: Path, tmp_path: Path) -> None:
    done = run("plan", data, "--memory-limit", "60KB", "--json")
    orders = {each["order"]: each for each in json.loads(done.stdout)["orders"]}
    assert orders["packed"]["samples_per_s"] > orders["global"]["samples_per_s"]
    assert orders["packed"]["total_nbytes"] > 400 * 64 * 4 * 7
    assert "jasper-store pack" in run("plan", data, "--memory-limit", "60KB").output
    assert "jasper-store pack" not in run("plan", data).output
    run("pack", data, tmp_path / "packed")
    torch.save(torch.rand(400), data / "pair_relevance.pt")
    for command in ("plan",):
        assert "pair_relevance.pt" in run(command, tmp_path / "packed").output
