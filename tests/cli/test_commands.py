"""Each command on good input: what it says to people, and to machines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import jasper_store as js
from tests.cli.conftest import Run

COMMANDS = ("demo", "sample", "inspect", "plan", "convert", "warm", "verify", "train", "synth", "report", "bench")


def test_help_lists_every_command(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f" {command} " in result.stdout
    assert "Exit codes" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"jasper-store {command}" in result.stdout
    assert "--json" in result.stdout


def test_without_a_command_the_help_is_shown(run: Run) -> None:
    result = run()
    assert "Commands" in result.output


def test_version(run: Run) -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.strip() == js.__version__


def test_inspect_says_what_is_there(run: Run, data: Path) -> None:
    result = run("inspect", data)
    assert result.exit_code == 0
    assert "source_embs" in result.stdout
    assert "float32" in result.stdout
    assert "embedding_dim 16" in result.stdout


def test_inspect_in_json(run_json: Callable[..., Any], data: Path) -> None:
    found = run_json("inspect", data)
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert found["format"] == "pt"
    assert tensors["source_embs"]["shape"] == [45, 16]
    assert tensors["source_embs"]["nbytes"] == 45 * 16 * 4
    assert found["nbytes"] == sum(tensor["nbytes"] for tensor in tensors.values())
    assert found["config"]["n_neg"] == 3


def test_inspect_a_single_file(run_json: Callable[..., Any], data: Path) -> None:
    found = run_json("inspect", data / "source_embs.pt")
    assert [tensor["name"] for tensor in found["tensors"]] == ["source_embs"]
    assert found["config"] == {}


def test_inspect_does_not_mind_a_directory_that_is_no_dataset(run_json: Callable[..., Any], tmp_path: Path) -> None:
    torch.save(torch.arange(6.0), tmp_path / "[odd] name.pt")
    found = run_json("inspect", tmp_path)
    assert found["tensors"][0]["name"] == "[odd] name"


def test_inspect_lists_the_fields_of_a_sample(run: Run, run_json: Callable[..., Any], declared: Path) -> None:
    shown = run("inspect", declared).stdout
    fields, tensors = shown.index("samples: train 30, val 10; 4 fields"), shown.index("hard_negatives")
    assert tensors < fields
    for words in ("passage_embs[hard_negatives[row]]", "[3, 8]", "[...]"):
        assert words in shown[fields:]
    found = run_json("inspect", declared)["samples"]
    assert found["fields"][2] == {
        "name": "negatives",
        "dtype": "float32",
        "shape": [3, 8],
        "expression": "passage_embs[hard_negatives[row]]",
    }
    assert found["fields"][3]["shape"] == [None]
    assert (found["declared"], found["split"], found["length"]) == (True, "train", 30)


def test_inspect_lists_what_would_be_served_without_a_declaration(run: Run, data: Path, tmp_path: Path) -> None:
    torch.save(torch.ones(6, 2), tmp_path / "values.pt")
    shown = run("inspect", tmp_path).stdout
    assert "values[i]" in shown
    assert "nothing is declared" in shown
    assert "source_embs[hard_negatives[row]]" in run("inspect", data).stdout


@pytest.mark.parametrize("command", ["inspect", "plan"])
@pytest.mark.parametrize(
    ("samples", "says"),
    [
        ({"fields": {"x": "nope[i]", "y": "query_embs[nada[i]]"}}, ["'nope'", "'nada'", "config.json", "query_embs"]),
        ({"fields": {"x": "query_embs[passage_embs[i]]"}}, ["rows are named by integers", "config.json"]),
    ],
)
def test_a_declaration_that_does_not_fit_is_an_error(
    run: Run,
    declared: Path,
    redeclare: Callable[[Path, object], None],
    command: str,
    samples: object,
    says: list[str],
) -> None:
    redeclare(declared, samples)
    result = run(command, declared)
    assert result.exit_code == 2
    assert "passage_embs" in result.stdout  # the tensors are shown all the same
    (line,) = result.stderr.splitlines()
    assert all(words in line for words in says)
    result = run(command, declared, "--json")
    assert result.exit_code == 2
    assert len(json.loads(result.stdout)["tensors"]) == 8


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_a_jasper_dataset_that_lacks_tensors_is_an_error(run: Run, data: Path, command: str) -> None:
    for name in ("source_embs", "hard_negatives", "keyword_embs", "val_idx"):
        (data / f"{name}.pt").unlink()
    result = run(command, data)
    assert result.exit_code == 3
    assert "question_embs" in result.stdout
    (line,) = result.stderr.splitlines()
    assert "source_embs" in line
    assert "hard_negatives" in line
    for name in ("train_idx", "test_idx"):
        (data / f"{name}.pt").unlink()
    assert run(command, data).exit_code == 3


def test_plan_says_why(run: Run, data: Path) -> None:
    result = run("plan", data)
    assert result.exit_code == 0
    assert "source_embs" in result.stdout
    assert "ram" in result.stdout


def test_plan_in_json_is_the_librarys(run_json: Callable[..., Any], data: Path) -> None:
    found = run_json("plan", data, "--memory-limit", "1KiB")
    placements = {tensor["name"]: tensor["placement"] for tensor in found["tensors"]}
    plan = js.plan(data, memory_limit=1024)
    assert placements == {entry.name: entry.placement for entry in plan.entries}
    assert placements["source_embs"] == "mmap"


@pytest.mark.parametrize(("flag", "placement"), [("--mmap", "mmap"), ("--preload", "ram")])
def test_plan_maps_or_preloads_on_request(run_json: Callable[..., Any], data: Path, flag: str, placement: str) -> None:
    found = run_json("plan", data, flag)
    assert {tensor["placement"] for tensor in found["tensors"] if tensor["name"] == "source_embs"} == {placement}


@pytest.mark.parametrize("to", ["safetensors", "npy", "hdf5", "pt"])
def test_convert_keeps_every_value(run: Run, data: Path, tmp_path: Path, to: str) -> None:
    result = run("convert", data, tmp_path / "out", "--to", to)
    assert result.exit_code == 0, result.output
    with js.open(data, format="pt") as before, js.open(tmp_path / "out", format=to) as after:
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(tensor.tensor(), after[name].tensor())


def test_convert_reports_in_json(run_json: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    found = run_json("convert", data, tmp_path / "out", "--to", "hdf5", "--compression", "gzip")
    assert found["format"] == "hdf5"
    assert found["compression"] == "gzip"
    assert found["bytes_in"] > 0


def test_warm_reports(run: Run, run_json: Callable[..., Any], data: Path) -> None:
    result = run("warm", data, "--tensor", "source_embs", "--budget", "1MiB")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    assert run_json("warm", data)


def test_verify_sound_data(run: Run, run_json: Callable[..., Any], data: Path) -> None:
    assert run("verify", data).exit_code == 0
    assert run_json("verify", data)["ok"] is True


def test_verify_finds_a_nan(run: Run, data: Path) -> None:
    values = torch.load(data / "source_embs.pt", weights_only=True)
    values[7, 3] = float("nan")
    torch.save(values, data / "source_embs.pt")
    result = run("verify", data, "--json")
    assert result.exit_code == 4
    found = json.loads(result.stdout)
    assert found["ok"] is False
    assert any(finding["tensor"] == "source_embs" for finding in found["errors"])


def test_output_in_a_pipe_has_no_escapes_and_no_bars(run: Run, data: Path, tmp_path: Path) -> None:
    for arguments in (["inspect", data], ["plan", data], ["convert", data, tmp_path / "out"]):
        result = run(*arguments)
        assert "\x1b" not in result.output
        assert not result.stderr
