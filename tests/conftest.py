"""What every test shares: which marks are skipped where, and why."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from hypothesis import settings

# One example may be slow on a busy machine with a cold cache; a wall clock is no property of the code.
settings.register_profile("jasper_store", deadline=None, derandomize=True)
settings.load_profile("jasper_store")

# Test processes beside each other would fight over the cores with a thread per core each.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

TRAINERS = ("lightning", "accelerate", "ray")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def _skips(config: pytest.Config) -> dict[str, str]:
    """Mark to the reason for skipping it here; marks that can run are absent."""
    reasons = {}
    if not config.getoption("--slow"):
        reasons["slow"] = "slow: run with --slow, or make test-slow"
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        reasons["root"] = "needs root: cgroups and the page cache cannot be changed otherwise"
    if not torch.cuda.is_available():
        reasons["cuda"] = "needs a CUDA device: torch.cuda.is_available() is false here"
    return reasons


def _missing(mark: pytest.Mark) -> list[str]:
    """Which of the trainers that a test names are not installed."""
    return [name for name in mark.args or TRAINERS if importlib.util.find_spec(name) is None]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = _skips(config)
    for item in items:
        # Marks and not keywords: the name of a directory is a keyword too.
        for mark in list(item.iter_markers()):
            if mark.name in reasons:
                item.add_marker(pytest.mark.skip(reason=reasons[mark.name]))
            elif mark.name == "integrations" and (missing := _missing(mark)):
                reason = f"needs {', '.join(missing)}: pip install 'jasper-store[integrations]'"
                item.add_marker(pytest.mark.skip(reason=reason))
