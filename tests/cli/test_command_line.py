"""What all commands share: exit codes, errors as JSON, flags in messages, one table style, pipes that close."""

from __future__ import annotations

import builtins
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console

import jasper_store.errors as tree
from jasper_store.cli.console import table
from jasper_store.cli.errors import EXIT_CODES, error_entry
from jasper_store.cli.exit_codes import ERRORS, ExitCode, code_of
from jasper_store.cli.flags import in_flags
from tests.builders import build_pt_dataset
from tests.cli.conftest import Run

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"
PYTHON_OPTION = re.compile(r"\b(use_mmap|overwrite|memory_limit|num_workers|batch_size|device|compression|format)=")


# ---- exit codes


def test_the_table_of_exit_codes_in_the_docs_is_that_of_the_code() -> None:
    section = DOCS.read_text(encoding="utf-8").partition("## Exit codes")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (.*?) ?\|$", section, re.MULTILINE)
    assert [(int(code), meaning.partition(";")[0]) for code, meaning, _ in rows] == [
        (code.value, code.meaning) for code in ExitCode
    ]
    for code, _, named in rows:
        for name in re.findall(r"`(\w+)`", named):
            kind = getattr(tree, name, None) or getattr(builtins, name)
            assert any(issubclass(kind, known) and found == int(code) for known, found in ERRORS), name


def test_every_error_of_the_tree_has_its_code() -> None:
    expected = {
        "DatasetNotFoundError": 3,
        "CorruptFileError": 4,
        "IntegrityError": 4,
        "IncompatibleOptionsError": 2,
        "UnknownNameError": 2,
        "DeclarationError": 2,
        "ConversionError": 6,
        "InsufficientMemoryError": 5,
        "WorkerDiedError": 1,
    }
    assert {name: int(code_of(getattr(tree, name)("x"))) for name in expected} == expected
    assert all(f"{code.value} {code.meaning}" in EXIT_CODES for code in ExitCode)


# ---- errors as JSON


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["inspect", "{}/nowhere"], 3, "DatasetNotFoundError"),
        (["plan", "{}/data", "--format", "zarr"], 2, "UnknownNameError"),
        (["plan", "{}/data", "--preload", "--memory-limit", "1KiB"], 5, "InsufficientMemoryError"),
        (["plan", "{}/data", "--memory-limit", "lots"], 2, "BadParameter"),
        (["verify", "{}/data", "--nonsense"], 2, "NoSuchOption"),
        (["convert", "{}/data", "{}/out", "--compression", "gzip"], 2, "IncompatibleOptionsError"),
        (["train", "{}/data", "--resume"], 2, "IncompatibleOptionsError"),
        (["report", "{}/data", "--out", "{}/no/where.html", "--format", "x"], 2, "UnknownNameError"),
        (["bench", "{}/nowhere"], 3, "DatasetNotFoundError"),
        (["warm", "{}/data", "--tensor", "sauce_embs"], 2, "UnknownNameError"),
        (["fly"], 2, "UsageError"),
    ],
)
def test_an_error_is_a_json_document_too(
    run: Run, data: Path, tmp_path: Path, arguments: list[str], code: int, kind: str
) -> None:
    assert data == tmp_path / "data"
    result = run(*(word.format(tmp_path) for word in arguments), "--json")
    assert result.exit_code == code
    error = json.loads(result.stdout)["error"]
    assert (error["type"], error["exit_code"]) == (kind, code)
    assert error["message"]
    assert result.stderr  # and for people all the same


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_what_is_found_and_what_is_wrong_with_it_are_one_document(run: Run, data: Path, command: str) -> None:
    assert json.loads(run(command, data, "--json").stdout)["error"] is None
    (data / "source_embs.pt").unlink()
    result = run(command, data, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == found["error"]["exit_code"] == 3
    assert found["error"]["type"] == "DatasetNotFoundError"
    assert found["error"]["tensor"] == "source_embs"
    assert len(found["tensors"]) == 17
    assert "source_embs" in result.stderr


def test_an_interruption_is_a_json_document_too(run: Run, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jasper_store.verify", interrupted)
    result = run("verify", data, "--json")
    assert result.exit_code == 130
    assert json.loads(result.stdout)["error"]["exit_code"] == 130


# ---- flags, not keywords of Python


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("pass overwrite=True to replace", "pass --overwrite to replace"),
        ("use_mmap=False, or use_mmap=True", "--preload, or --mmap"),
        ("device='cuda:1' or device=None", "--device cuda:1 or no --device"),
        ("dtype=torch.float16 or dtype='bfloat16'", "--dtype float16 or --dtype bfloat16"),
        ("or pass format=.", "or pass --format."),
        ("num_workers=0.", "--workers 0."),
        ("memory_limit=8589934592: x", "--memory-limit 8589934592: x"),
        ("js.convert and js.warm_up(...)", "jasper-store convert and jasper-store warm"),
        ("a shape=3 is left", "a shape=3 is left"),
    ],
)
def test_options_of_python_are_flags(said: str, shown: str) -> None:
    assert in_flags(said) == shown


def test_an_option_without_a_flag_here_is_pythons() -> None:
    assert in_flags("use dtype='float16'", {"--device"}) == "use dtype='float16' in Python"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["convert", "{}/other", "{}/out"], "--overwrite"),
        (["convert", "{}/data", "{}/x", "--to", "npy", "--compression", "gzip"], "--format hdf5"),
        (["convert", "{}/data", "{}/x", "--to", "zarr"], "--format zarr"),
        (["plan", "{}/data", "--device", "cuda", "--mmap"], "--device cuda"),
        (["plan", "{}/data", "--preload", "--memory-limit", "1KiB"], "--preload"),
        (["plan", "{}/data", "--preload"], "--preload"),
        (["plan", "{}/data", "--mmap"], "--mmap"),
        (["plan", "{}/data/weights.bin"], "--format"),
        (["train", "{}/data", "--device", "tpu"], "--device tpu"),
    ],
)
def test_messages_speak_of_flags(run: Run, data: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    (data / "weights.bin").write_bytes(b"x")
    build_pt_dataset(tmp_path / "other", seed=1)
    assert run("convert", data, tmp_path / "out").exit_code == 0
    shown = run(*(word.format(tmp_path) for word in arguments)).output
    assert says in shown
    assert not PYTHON_OPTION.search(shown.replace("in Python", "")), shown


@pytest.mark.parametrize("pairs", ["10", "400"])
def test_what_synth_suggests_runs(run: Run, tmp_path: Path, pairs: str) -> None:
    made = tmp_path / "made"
    shape = ("--pairs", pairs, "--clusters", "2", "--n-neg", "2", "--dim", "4")
    shown = run("synth", made, *shape).stdout.partition("Next: ")[2]
    suggested = [words.split()[1:] for words in shown.split(", ")]
    assert [words[0] for words in suggested] == ["report", "bench", "train"]
    quick = {
        "report": ["--out", str(tmp_path / "r.html"), "--no-verify"],
        "bench": ["--seconds", "0.1", "--no-cold"],
        "train": ["--epochs", "1"],
    }
    for words in suggested:
        result = run(*words, *quick[words[0]])
        assert result.exit_code == 0, result.output


def test_the_format_of_a_file_whose_name_says_none(run: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    torch.save(torch.ones(4, 2), tmp_path / "values.bin")
    assert "pass --from" in refused(2, "convert", tmp_path / "values.bin", tmp_path / "out")
    assert run("convert", tmp_path / "values.bin", tmp_path / "out", "--from", "pt").exit_code == 0
    assert "pass --format" in refused(2, "inspect", tmp_path / "values.bin")
    assert run("inspect", tmp_path / "values.bin", "--format", "pt").exit_code == 0


@pytest.mark.parametrize(
    ("said", "known", "suggested", "not_suggested"),
    [
        (
            "use_mmap=False asks to preload everything.",
            {"--preload", "--memory-limit"},
            ["--preload", "--memory-limit"],
            [],
        ),
        (
            "device='cuda' holds all.",
            {"--device", "--preload", "--memory-limit"},
            ["--device"],
            ["--mmap", "--preload"],
        ),
        ("It does not fit.", {"--overwrite"}, ["--dtype bfloat16"], ["--preload", "--memory-limit", "--device"]),
    ],
)
def test_remedies_are_options_of_the_command(
    said: str, known: set[str], suggested: list[str], not_suggested: list[str]
) -> None:
    message = error_entry(tree.InsufficientMemoryError(f"{said}\nthe table"), known)["message"]
    remedies = message.partition("To go on: ")[2]
    assert all(words in remedies for words in suggested)
    assert not any(words in remedies for words in not_suggested)
    assert "the table" not in message


@pytest.mark.parametrize("command", ["plan", "train"])
def test_both_placements_at_once_are_refused(refused: Callable[..., str], data: Path, command: str) -> None:
    line = refused(2, command, data, "--mmap", "--preload")
    assert "--mmap" in line
    assert "--preload" in line


# ---- tables


def test_tables_fold_text_and_never_numbers() -> None:
    cells = [("a_tensor_of_a_long_name", "1234.56 MiB", "word " * 30, "987,654,321")] * 3
    out = io.StringIO()
    made = table("title", ("tensor", "size", "why", "rows/s"), cells, right=("size", "rows/s"))
    Console(file=out, width=100).print(made)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("1234.56 MiB" in line and "987,654,321" in line for line in lines) == 3
    assert sum("word" in line for line in lines) > 3


def test_no_hash_unless_asked(run: Run, data: Path, tmp_path: Path) -> None:
    hashes = re.compile(r"\b[0-9a-f]{16,}\b")
    shown = run("convert", data, tmp_path / "out").stdout
    assert not hashes.search(shown)
    assert "\u2500" in shown  # the rule below the heads of the one table style
    assert len(hashes.findall(run("convert", data, tmp_path / "out", "--checksums").stdout)) == 18
    for command in ("inspect", "plan", "warm", "verify"):
        shown = run(command, tmp_path / "out").stdout
        assert not hashes.search(shown)
        assert command == "verify" or "\u2500" in shown


def test_a_budget_of_nothing_says_what_was_there_already(run: Run, data: Path) -> None:
    shown = run("warm", data, "--budget", "0", "--tensor", "source_embs").stdout
    (line,) = [line for line in shown.splitlines() if "source_embs" in line]
    assert "100.0%" not in line or "all of it was there before" in line


# ---- pipes


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path: Path, more: tuple[str, ...]) -> None:
    for number in range(600):
        torch.save(torch.ones(2), tmp_path / f"a_tensor_whose_name_fills_the_pipe_of_the_reader_{number}.pt")
    code = "from jasper_store.cli.app import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "inspect", str(tmp_path), *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert said == b""


def test_a_small_output_into_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    torch.save(torch.ones(2), tmp_path / "a.pt")
    code = "from jasper_store.cli.app import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "inspect", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert said == b""


def test_an_exit_code_is_an_int_for_the_shell() -> None:
    assert typer.Exit(ExitCode.DATA).exit_code == 4
