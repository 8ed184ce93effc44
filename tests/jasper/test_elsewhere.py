"""A dataset serves the same batches where system calls are missing: see ``tests/elsewhere.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def whole_way(system: str, directory: Path) -> dict[str, Any]:
    directory.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.elsewhere", system, str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return whole_way("linux", tmp_path_factory.mktemp("linux") / "data")


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_the_whole_way_without_what_is_missing_there(system: str, here: dict[str, Any], tmp_path: Path) -> None:
    found = whole_way(system, tmp_path / "data")
    assert found == here
    assert found["left"] == ["hdf5", "npy", "pt", "safetensors", "written"]
