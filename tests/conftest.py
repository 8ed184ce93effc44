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
    missing = [name for name in TRAINERS if importlib.util.find_spec(name) is None]
    if missing:
        reasons["integrations"] = f"needs {', '.join(missing)}: pip install 'jasper-store[integrations]'"
    return reasons


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for mark, reason in _skips(config).items():
        for item in items:
            if mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
