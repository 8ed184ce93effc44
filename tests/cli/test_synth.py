"""``jasper-store synth``: sizes as people write them, and a dataset that verifies and trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import jasper_store as js
from jasper_store.cli.counts import parse_count
from tests.cli.conftest import Run

SMALL = ("--pairs", "200", "--dim", "8", "--clusters", "4", "--n-neg", "2")


@pytest.mark.parametrize(
    ("text", "count"), [("10M", 10_000_000), ("200k", 200_000), ("1_000", 1000), ("1,000", 1000), ("1.5k", 1500)]
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "many", "-5", "1.5", "10MB", "9999999G", "٣"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_count(text)


@pytest.mark.parametrize("to", ["safetensors", "npy", "hdf5", "pt"])
def test_every_format_verifies(run: Run, run_json: Callable[..., Any], tmp_path: Path, to: str) -> None:
    found = run_json("synth", tmp_path / "made", *SMALL, "--format", to)
    assert (found["pairs"], found["dim"], found["format"]) == (200, 8, to)
    assert found["nbytes"] > 200 * 8 * 4
    assert run("verify", tmp_path / "made").exit_code == 0
    assert run_json("inspect", tmp_path / "made")["format"] == to


def test_sizes_have_defaults(run_json: Callable[..., Any], tmp_path: Path) -> None:
    found = run_json("synth", tmp_path / "made", "--pairs", "0.5k")
    assert (found["pairs"], found["dim"], found["n_neg"], found["clusters"]) == (500, 384, 5, 64)


def test_the_seed_decides(run: Run, tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        assert run("synth", tmp_path / name, *SMALL, "--seed", seed).exit_code == 0
    one, same, other = (js.open(tmp_path / name)["question_embs"].tensor().clone() for name in ("one", "same", "other"))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_says_what_to_do_next(run: Run, tmp_path: Path) -> None:
    result = run("synth", tmp_path / "made", *SMALL)
    assert result.exit_code == 0, result.output
    assert "200 pairs" in result.stdout
    assert "jasper-store train" in result.stdout


def test_does_not_overwrite_unasked(run: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    made = tmp_path / "made"
    assert run("synth", made, *SMALL).exit_code == 0
    before = (made / "question_embs.safetensors").read_bytes()
    refused(6, "synth", made, *SMALL, "--seed", "1")
    assert (made / "question_embs.safetensors").read_bytes() == before
    assert run("synth", made, *SMALL, "--seed", "1", "--overwrite").exit_code == 0
    assert (made / "question_embs.safetensors").read_bytes() != before


def test_sizes_that_cannot_be_made(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "2 pairs per cluster" in refused(2, "synth", tmp_path / "made", "--pairs", "10", "--clusters", "8")
    assert "zarr" in refused(2, "synth", tmp_path / "made", *SMALL, "--format", "zarr")
    assert not (tmp_path / "made").exists()


def test_pairs_must_be_said(run: Run, tmp_path: Path) -> None:
    result = run("synth", tmp_path / "made")
    assert result.exit_code == 2
    assert "--pairs" in result.stderr
    result = run("synth", tmp_path / "made", "--pairs", "lots")
    assert result.exit_code == 2
    assert "expected a count such as 10M" in result.stderr
