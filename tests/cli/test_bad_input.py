"""Each command on bad input: one line with the remedy, an exit code that says which kind, nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.builders import build_pt_dataset
from tests.cli.conftest import Run

Refused = Callable[..., str]


@pytest.mark.parametrize("command", ["inspect", "plan", "warm", "verify", "train", "convert"])
def test_missing_directory(refused: Refused, tmp_path: Path, command: str) -> None:
    assert "nowhere" in refused(3, command, tmp_path / "nowhere")


@pytest.mark.parametrize("command", ["inspect", "plan", "warm", "verify", "convert"])
def test_empty_directory(refused: Refused, tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    refused(3, command, tmp_path / "empty")


@pytest.mark.parametrize("command", ["inspect", "plan", "warm", "train"])
def test_truncated_file(refused: Refused, data: Path, command: str) -> None:
    file = data / "source_embs.pt"
    file.write_bytes(file.read_bytes()[:100])
    assert "source_embs.pt" in refused(4, command, data)


def test_truncated_file_is_found_by_verify(run: Run, data: Path) -> None:
    file = data / "source_embs.pt"
    file.write_bytes(file.read_bytes()[:100])
    result = run("verify", data)
    assert result.exit_code == 4
    assert "source_embs" in result.output
    assert result.output.count("source_embs.pt") == 1  # one finding, though two checks meet it


@pytest.mark.parametrize("config", [None, {"embedding_dim": 4, "n_neg": 2}, {"samples": {"fields": {"x": "x[i]"}}}])
@pytest.mark.parametrize("command", ["inspect", "plan", "warm", "verify", "convert", "report", "bench"])
def test_nothing_but_unreadable_files(run: Run, tmp_path: Path, config: object, command: str) -> None:
    for name in ("one.npy", "two.npy", "three.safetensors"):
        (tmp_path / name).write_bytes(b"garbage")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    out: dict[str, list[object]] = {"convert": [tmp_path / "out"], "report": ["--out", tmp_path / "report.html"]}
    result = run(command, tmp_path, *out.get(command, []))
    assert result.exit_code == 4
    assert all(name in result.output for name in ("one.npy", "two.npy", "three.safetensors"))
    assert "0 tensors" not in result.output
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_file_that_is_no_part_of_the_dataset_is_skipped_by_all(run: Run, data: Path, tmp_path: Path) -> None:
    (data / "notes.npy").write_bytes(b"garbage")
    for command in (["inspect", data], ["verify", data], ["convert", data, tmp_path / "out"]):
        result = run(*command)
        assert result.exit_code == 0, result.output
        assert "notes" in result.stdout
        assert "not part of the dataset" in result.stdout
    (data / "source_embs.pt").write_bytes(b"garbage")
    for command in (["inspect", data], ["verify", data], ["convert", data, tmp_path / "other"]):
        assert run(*command).exit_code == 4


def test_a_file_where_a_directory_should_be(refused: Refused, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        for code, command in (
            (2 if out.is_file() else 6, ["convert", data, out]),
            (6, ["synth", out, "--pairs", "200", "--dim", "4", "--clusters", "4"]),
        ):
            line = refused(code, *command)
            assert str(out) in line
            assert "Errno" not in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["inspect", "plan", "train"])
def test_unknown_format(refused: Refused, data: Path, command: str) -> None:
    assert "zarr" in refused(2, command, data, "--format", "zarr")


@pytest.mark.parametrize("text", ["lots", "-1", "8GiBs"])
def test_what_is_no_size(run: Run, data: Path, text: str) -> None:
    result = run("plan", data, f"--memory-limit={text}")
    assert result.exit_code == 2
    assert "expected a size such as 8GiB" in result.stderr


def test_unknown_command_and_option(run: Run, data: Path) -> None:
    assert run("fly").exit_code == 2
    assert run("plan", data, "--fast").exit_code == 2


def test_preloading_what_does_not_fit(run: Run, data: Path) -> None:
    result = run("plan", data, "--preload", "--memory-limit", "1KiB")
    assert result.exit_code == 5
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "leave out --preload" in line


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_a_file_that_the_manifest_does_not_know_any_more(run: Run, data: Path, tmp_path: Path, command: str) -> None:
    target = tmp_path / "npy"
    assert run("convert", data, target, "--to", "npy").exit_code == 0
    assert "not the file recorded" not in run(command, target).output
    with (target / "source_embs.npy").open("r+b") as file:
        file.seek(5000)
        file.write(b"x")
    result = run(command, target)
    assert result.exit_code == 0
    assert "source_embs.npy: not the file recorded in jasper_store.json" in result.stdout
    assert "not the file recorded" in run(command, target, "--json").stdout


def test_maps_and_a_device_do_not_mix(refused: Refused, data: Path) -> None:
    refused(2, "plan", data, "--device", "cuda", "--mmap")


def test_convert_onto_other_values(run: Run, refused: Refused, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("convert", data, out).exit_code == 0
    other = build_pt_dataset(tmp_path / "other", seed=1)
    before = (out / "source_embs.safetensors").read_bytes()
    assert "overwrite" in refused(6, "convert", other, out)
    assert (out / "source_embs.safetensors").read_bytes() == before
    assert run("convert", other, out, "--overwrite").exit_code == 0


def test_convert_to_an_unknown_format(refused: Refused, data: Path) -> None:
    assert "zarr" in refused(2, "convert", data, "--to", "zarr")
    assert "compression" in refused(2, "convert", data, "--compression", "gzip")


def test_warm_an_unknown_tensor(refused: Refused, data: Path) -> None:
    assert "sauce_embs" in refused(2, "warm", data, "--tensor", "sauce_embs")


def test_configuration_that_is_not_json(refused: Refused, data: Path) -> None:
    (data / "config.json").write_text("{")
    assert "config.json" in refused(4, "train", data)


def test_index_out_of_bounds(refused: Refused, data: Path) -> None:
    pairs = torch.load(data / "pair_index.pt", weights_only=True)
    pairs[3, 0] = 999
    torch.save(pairs, data / "pair_index.pt")
    assert "999" in refused(4, "train", data)


def test_batch_larger_than_the_split(refused: Refused, data: Path) -> None:
    assert "smaller batch size" in refused(2, "train", data, "--batch-size", "1000")


def test_debug_shows_where_it_came_from(run: Run, tmp_path: Path) -> None:
    result = run("--debug", "plan", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert isinstance(result.exception, FileNotFoundError)


def test_square_brackets_in_a_path_are_text(refused: Refused, tmp_path: Path) -> None:
    assert "[bold]x" in refused(3, "inspect", tmp_path / "[bold]x")


def test_warnings_are_one_line_on_stderr(run: Run, data: Path, tmp_path: Path) -> None:
    assert run("convert", data, tmp_path / "out", "--to", "hdf5", "--compression", "gzip").exit_code == 0
    result = run("train", tmp_path / "out", "--mmap", "--epochs", "1", "--batch-size", "8", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["format"] == "hdf5"
    assert any(line.startswith("warning: ") for line in result.stderr.splitlines())
