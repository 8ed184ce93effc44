"""``jasper-store bench``: everything that can be measured is, what cannot is said; no speed is asserted."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import jasper_store as js
from jasper_store.bench import disk, run as bench_run
from jasper_store.samples import integrity
from tests.cli.conftest import Run

SHORT = ("--seconds", "0.2", "--batch-size", "8")


def test_says_rows_samples_and_what_it_compares_with(run: Run, data: Path) -> None:
    result = run("bench", data, *SHORT)
    assert result.exit_code == 0, result.output
    for word in ("source_embs", "rows/s warm", "batch 8", "mapped, warm", "torch.load of all files"):
        assert word in result.stdout
    assert not result.stderr


def test_in_json(run_json: Callable[..., Any], data: Path) -> None:
    found = run_json("bench", data, *SHORT, "--no-cold")
    names = {rate["name"] for rate in found["tensors"]}
    assert {"source_embs", "question_embs", "pair_index", "steering_residual"} <= names
    assert "keyword_embs" not in names  # no sample reads it
    assert all(rate["warm"] > 0 and rate["cold"] is None for rate in found["tensors"])
    assert {rate["batch_size"] for rate in found["loader"]} == {8}
    assert all(rate["samples_per_second"] > 0 and rate["state"] == "warm" for rate in found["loader"])
    assert set(found["torch_load"]) == {"warm"}
    assert found["disk"] == []
    assert found["open_seconds"] > 0


@pytest.mark.parametrize("kind", ["data", "declared"])
def test_nothing_is_written(run: Run, request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    path: Path = request.getfixturevalue(kind)
    (path / "jasper_store.json").unlink(missing_ok=True)
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    for command in (
        ["bench", path, *SHORT],
        ["report", path, "--json", "--no-verify"],
        ["report", path, "--out", tmp_path / "report.html"],
    ):
        assert run(*command).exit_code == 0
        assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before, command[0]


def test_what_is_checked_in_memory_is_checked_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    check = integrity.check_bound

    def watched(tensor: Any, bound: Any, nouns: Any = None) -> None:
        checked.append(str(bound))
        check(tensor, bound, nouns)

    monkeypatch.setattr(integrity, "check_bound", watched)
    with integrity.unrecorded(), integrity.unrecorded():
        for _ in range(2):
            js.JASPERSteeringDataset(data, "train").close()
    assert checked
    assert len(checked) == len(set(checked))
    assert not (data / "jasper_store.json").exists()
    js.JASPERSteeringDataset(data, "train").close()
    assert len(checked) == 2 * len(set(checked))  # outside nothing is known of it
    assert (data / "jasper_store.json").exists()


def test_a_memory_limit(run: Run, run_json: Callable[..., Any], data: Path) -> None:
    planned = run_json("bench", data, *SHORT, "--no-cold", "--memory-limit", "10KiB")["planned"]
    assert 0 < planned["preloaded"] <= 10 << 10
    assert planned["mapped"] > 0
    assert run_json("bench", data, *SHORT, "--no-cold")["planned"]["mapped"] == 0
    shown = run("bench", data, *SHORT, "--no-cold", "--memory-limit", "10KiB").stdout
    assert "as planned (" in shown
    assert "KiB mapped), warm" in shown


def test_every_format(run_json: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    js.convert(data, tmp_path / "h5", format="hdf5", compression="gzip")
    found = run_json("bench", tmp_path / "h5", *SHORT)
    assert {rate["placement"] for rate in found["tensors"] if rate["name"] == "source_embs"} == {"chunked"}
    assert any("not .pt" in note for note in found["notes"])
    assert found["torch_load"] == {}


def test_a_directory_that_is_no_dataset(run_json: Callable[..., Any], tmp_path: Path) -> None:
    torch.save(torch.arange(4000.0).reshape(-1, 4), tmp_path / "values.pt")
    found = run_json("bench", tmp_path, *SHORT, "--no-cold")
    assert [rate["name"] for rate in found["tensors"]] == ["values"]
    assert all(rate["samples_per_second"] > 0 for rate in found["loader"])
    torch.save(torch.arange(8.0).reshape(-1, 4), tmp_path / "others.pt")
    found = run_json("bench", tmp_path, *SHORT, "--no-cold")
    assert found["loader"] == []
    assert any("which tensors belong together" in note for note in found["notes"])


def test_what_cannot_be_made_cold_is_said(
    run_json: Callable[..., Any], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_run, "make_cold", lambda files: 0.5)
    found = run_json("bench", data, *SHORT)
    assert any("50% of the files stayed" in note for note in found["notes"])
    assert all(rate["cold"] is None for rate in found["tensors"])
    assert {rate["state"] for rate in found["loader"]} == {"warm"}


def test_the_system_that_cannot_say(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "cached_bytes", lambda *_: None)
    report = bench_run.bench(data, seconds=0.2, batch_sizes=(8,))
    assert report.cached_before is None
    assert any("cannot say" in note for note in report.notes)


def test_bad_input(refused: Callable[..., str], run: Run, data: Path, tmp_path: Path) -> None:
    assert "nowhere" in refused(3, "bench", tmp_path / "nowhere")
    assert "zarr" in refused(2, "bench", data, "--format", "zarr")
    assert run("bench", data, "--batch-size", "0").exit_code == 2
    assert run("bench", data, "--seconds", "0").exit_code == 2
    (data / "source_embs.pt").write_bytes(b"PK")
    assert "source_embs.pt" in refused(4, "bench", data)


@pytest.mark.parametrize("random", [True, False])
def test_the_probe_reads(tmp_path: Path, *, random: bool) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(3 << 20))
    rate = disk.probe(file, random=random, seconds=0.05)
    assert rate is not None
    assert rate.reads_per_second > 0
    assert math.isclose(rate.bytes_per_second, rate.reads_per_second * rate.block)


def test_the_probe_of_a_file_that_is_too_small(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"few")
    assert disk.probe(tmp_path / "file", random=True, seconds=0.01) is None
    assert disk.probe(tmp_path / "file", random=False, seconds=0.01) is None


def test_a_file_system_that_refuses_direct_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 16))
    opened = os.open

    def no_direct(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", no_direct)
    rate = disk.probe(file, random=True, seconds=0.02)
    assert rate is not None
    assert not rate.direct
