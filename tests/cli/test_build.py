"""``jasper-store build``: from files to a dataset, in a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jasper_store as js
from jasper_store.cli.sample import SAMPLE
from tests.building.raw import raw, values
from tests.cli.conftest import Run


@pytest.fixture
def files(tmp_path: Path) -> list[object]:
    inputs = raw()
    for name in ("questions", "sources", "keywords", "pairs"):
        np.save(tmp_path / f"{name}.npy", inputs[name])
    torch.save(inputs["pair_keywords"], tmp_path / "pair_keywords.pt")
    named = [f"--{name}={tmp_path / name}.npy" for name in ("questions", "sources", "keywords", "pairs")]
    return [*named, f"--pair-keywords={tmp_path / 'pair_keywords.pt'}", "--n-neg", "3"]


def test_build_makes_what_python_makes(run: Run, files: list[object], tmp_path: Path) -> None:
    result = run("build", tmp_path / "out", *files)
    assert result.exit_code == 0, result.output
    for words in (
        "Stages",
        "clusters",
        "mine",
        "write",
        "pairs in train",
        "relevance: none was given",
        "Next: jasper-store",
    ):
        assert words in result.stdout
    js.build(tmp_path / "same", **raw())
    one, other = values(tmp_path / "out"), values(tmp_path / "same")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert "there already" in run("build", tmp_path / "out", *files).stdout


def test_the_report_as_json(run_json: Callable[..., Any], files: list[object], tmp_path: Path) -> None:
    found = run_json("build", tmp_path / "out", *files, "--clusters", "4", "--splits", "0.6,0.2,0.2", "--format", "npy")
    assert found["format"] == "npy"
    assert found["counts"]["clusters"] == 4
    assert found["splits"]["val"] == pytest.approx(16, abs=4)
    assert [stage["name"] for stage in found["stages"]] == ["read", "clusters", "splits", "mine", "write"]
    assert found["settings"]["mining"]["n_neg"] == 3


def test_numbers_of_clusters_come_from_a_file(run: Run, files: list[object], tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.arange(60) % 4)
    assert run("build", tmp_path / "one", *files, "--clusters", tmp_path / "c.npy").exit_code == 0
    owned = ("--clusters", tmp_path / "c.npy", "--clusters-of", "sources")
    assert run("build", tmp_path / "two", *files, *owned).exit_code == 0
    assert torch.equal(values(tmp_path / "one")["pair_cluster_id"], values(tmp_path / "two")["pair_cluster_id"])


def test_errors_speak_of_flags(refused: Callable[..., str], files: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "--n-neg 60" in refused(2, "build", out, *files, "--n-neg", "60")
    assert "--clusters 1" in refused(2, "build", out, *files, "--clusters", "1")
    assert "--clusters-of" in refused(2, "build", out, *files, "--clusters-of", "pairs")
    assert "as --questions has" in refused(4, "build", out, *files, f"--sources={SAMPLE}/source_embs.pt")
    assert "nothing.npy" in refused(3, "build", out, *files, "--questions", tmp_path / "nothing.npy")
    assert "--memory-limit" in refused(5, "build", out, *files, "--memory-limit", "2kB")
    (out).mkdir()
    (out / "mine.txt").write_text("mine")
    assert str(out) in refused(6, "build", out, *files)


def test_build_from_the_raw_sample(run: Run, tmp_path: Path) -> None:
    given = [f"--{name}={SAMPLE}" for name in ("questions", "sources", "pairs", "keywords", "pair-keywords")]
    result = run("build", tmp_path / "out", *given, "--memory-limit", "200MiB")
    assert result.exit_code == 0, result.output
    report = js.verify(tmp_path / "out")
    assert report.ok
    assert not list(report.warnings)
