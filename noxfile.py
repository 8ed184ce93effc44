"""The tests on every Python that is supported and found here, with the oldest and the newest allowed dependencies.

``nox`` runs them all, ``nox --session "newest-3.12"`` one of them, ``nox --list`` shows which there are. A Python that
is not installed is skipped, never downloaded. ``make test-min`` needs no nox, and runs the oldest on one Python.
"""

from __future__ import annotations

import os
from pathlib import Path

import nox

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
EXTRAS = ".[build,hdf5plugin,state,test]"
# The pin of constraints.txt is a CPU build; PyPI's builds of other releases bring gigabytes of CUDA.
TORCH = os.environ.get("TORCH") or next(
    line.strip().removeprefix("torch==")
    for line in Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    if line.startswith("torch==")
)

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """The newest releases that pip finds."""
    session.install(f"torch=={TORCH}", "--upgrade", EXTRAS)
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=PYTHONS)
def oldest(session: nox.Session) -> None:
    """The oldest releases that pyproject.toml allows."""
    found = session.run("python", "tools/minimum.py", "--torch", TORCH, silent=True)
    constraints = Path(session.create_tmp(), "minimum.txt")
    constraints.write_text(str(found), encoding="utf-8")
    session.install("--constraint", str(constraints), EXTRAS)
    session.run("python", "-m", "pytest", *session.posargs)
