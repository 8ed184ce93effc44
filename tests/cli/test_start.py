"""``--help``, ``--version`` and completion answer without torch, whose import takes seconds. No time is asserted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jasper_store.building.synth import SynthOptions
from jasper_store.cli import synth
from tests.cli.test_commands import COMMANDS

_CHILD = """
import sys
from jasper_store.cli.app import app
try:
    app(sys.argv[1:], prog_name="jasper-store")
except SystemExit as exc:
    heavy = [name for name in ("torch", "numpy", "h5py") if name in sys.modules]
    sys.exit(f"imported {heavy}" if heavy else exc.code)
"""


def _start(*arguments: str, **environ: str) -> str:
    """What a fresh process prints; it fails where it imported torch."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_and_version_import_no_torch(arguments: list[str]) -> None:
    assert _start(*arguments)


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "jasper_store", "no-such-command"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "jasper-store" in done.stderr
    assert "no-such-command" in done.stderr


@pytest.mark.parametrize(
    ("typed", "offered"), [("jasper-store pl", "plan"), ("jasper-store plan --mem", "--memory-limit")]
)
def test_completion_imports_no_torch(typed: str, offered: str) -> None:
    environ = {"_JASPER_STORE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    assert offered in _start(**environ)


def test_the_defaults_of_synth_are_those_of_its_options() -> None:
    made = SynthOptions(pairs=1000)
    shown = (synth._DIM, synth._N_NEG, synth._CLUSTERS, synth._SEED)
    assert shown == (made.dim, made.n_neg, made.clusters, made.seed)
