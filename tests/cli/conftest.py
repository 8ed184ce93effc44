"""How commands are called in tests: through Typer's runner, as a user's shell would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from jasper_store.cli.app import app
from tests.builders import build_pt_dataset

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """Call ``jasper-store`` with these arguments."""

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call


@pytest.fixture
def run_json(run: Run) -> Callable[..., Any]:
    """Call with ``--json``; the whole of stdout must be one document."""

    def call(*arguments: object) -> Any:
        result = run(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return call


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """Call with what should be refused with an exit code; gives back the one line on stderr."""

    def call(code: int, *arguments: object) -> str:
        result = run(*arguments)
        assert result.exit_code == code, result.output
        assert not result.stdout
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert "Traceback" not in result.output
        return lines[0]

    return call


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return build_pt_dataset(tmp_path / "data")
