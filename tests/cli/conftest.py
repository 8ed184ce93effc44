"""How commands are called in tests: through Typer's runner, as a user's shell would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import jasper_store as js
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


@pytest.fixture
def declared(tmp_path: Path) -> Path:
    """A dataset that is none of JASPER's: triplets with a ragged field, and splits, in npy files."""
    fields = {
        "_passage": "pairs[row, 1]",
        "query": "query_embs[pairs[row, 0]]",
        "positive": "passage_embs[_passage]",
        "negatives": "passage_embs[hard_negatives[row]]",
        "tokens": "tokens[_passage]",
    }
    samples = {"fields": fields, "splits": {"train": "train_idx", "val": "val_idx"}}
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "declared"
    config: dict[str, object] = {"dataset_name": "triplets <b>", "samples": samples}
    with js.DatasetWriter(path, format="npy", config=config) as writer:
        writer.append("query_embs", torch.randn(30, 8, generator=generator))
        writer.append("passage_embs", torch.randn(50, 8, generator=generator))
        writer.append("pairs", torch.randint(30, (40, 2), generator=generator))
        writer.append("hard_negatives", torch.randint(50, (40, 3), generator=generator))
        writer.append_ragged("tokens", [list(range(row % 4)) for row in range(50)])
        writer.append("train_idx", torch.arange(30))
        writer.append("val_idx", torch.arange(30, 40))
    return path


@pytest.fixture
def redeclare() -> Callable[[Path, object], None]:
    """Write another declaration beside the same tensors."""

    def write(path: Path, samples: object) -> None:
        (path / "config.json").write_text(json.dumps({"samples": samples}))

    return write
