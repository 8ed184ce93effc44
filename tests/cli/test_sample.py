"""``jasper-store sample``: the bundled dataset, copied whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jasper_store as js
from jasper_store.cli import sample
from tests.cli.conftest import Run


def test_the_copy_is_a_dataset(run: Run, tmp_path: Path) -> None:
    result = run("sample", tmp_path / "data")
    assert result.exit_code == 0, result.output
    assert "jasper-store inspect" in result.stdout
    there, here = ({path.name: path.read_bytes() for path in of.iterdir()} for of in (tmp_path / "data", sample.SAMPLE))
    assert there == here
    with js.JASPERSteeringDataset(tmp_path / "data", "train") as dataset:
        assert len(dataset) == 800
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_copy_may_be_written_to(run: Run, tmp_path: Path) -> None:
    assert run("sample", tmp_path / "deep" / "data").exit_code == 0
    for path in (tmp_path / "deep" / "data").iterdir():
        path.write_bytes(b"")


def test_in_json(run_json: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = run_json("sample", tmp_path / "empty")
    assert found["path"] == str(tmp_path / "empty")
    assert found["files"] == len(list((tmp_path / "empty").iterdir()))
    assert 10 << 20 < found["nbytes"] < 12 << 20


def test_nothing_is_replaced(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine")
    assert "expected no directory of this name" in refused(6, "sample", tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine.txt"]
    assert "found a file" in refused(6, "sample", tmp_path / "data" / "mine.txt")


def test_a_copy_that_fails_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Path] = []
    copy = shutil.copyfile

    def full(source: Path, target: Path) -> None:
        if len(copied) == 3:
            raise OSError(28, "No space left on device", str(target))
        copied.append(target)
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    result = run("sample", tmp_path / "data")
    assert result.exit_code == 6
    assert "no room" in result.stderr
    assert not list(tmp_path.iterdir())


def test_an_installation_without_it(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "SAMPLE", tmp_path / "gone")
    assert "install jasper-store again" in refused(3, "sample", tmp_path / "data")
