"""Epochs under a memory limit, restarts with other ranks, negatives read again: nothing of it stays in the process.

``JASPER_SOAK_MINUTES=60 pytest --slow tests/loading/test_soak.py -s`` prints what was held after each leg.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cgroups import limited

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

CAP = 700 << 20
_GROWTH_KIB = 4 << 10  # less than the tensors that one reload makes
_ARENAS_KIB = 160 << 10  # that glibc's arenas may keep of memory which is free
_ROUND = 4  # legs, after which each number of workers has come once


def soak(
    root: Path, minutes: float, leg: float, reload: float, pairs: int, cgroup: Path | str = ""
) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("soak.py")
    arguments = [root, minutes, leg, reload, pairs, cgroup]
    with subprocess.Popen(
        [sys.executable, script, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        held = []
        for line in process.stdout:
            held.append(json.loads(line))
            print(line, end="", flush=True)  # noqa: T201 - the figures of docs/reliability.md
        assert process.wait() == 0, process.stderr.read()
    return held


def assert_flat(held: list[dict[str, Any]]) -> None:
    """After the first round of legs nothing grows any more."""
    first, last = held[_ROUND - 1], held[-1]
    for key in ("descriptors", "threads", "children", "shared_memory", "locks"):
        assert last[key] <= first[key], (key, held)
    assert last["children"] == last["locks"] == 0
    assert last["in_use_kib"] <= first["in_use_kib"] + _GROWTH_KIB, held
    assert last["mapped_kib"] <= first["mapped_kib"] + _GROWTH_KIB, held
    assert last["anonymous_kib"] <= first["anonymous_kib"] + _ARENAS_KIB, held
    assert last["maps"] <= first["maps"] + 40, held


def test_a_short_soak(tmp_path):
    """Eight legs on a small dataset: restarts and reloads come many times as often as in the long one."""
    held = soak(tmp_path, 8 / 60, 1, 0.3, 3_000)
    assert_flat(held)
    assert held[-1]["reloads"] >= 4
    assert held[-1]["epochs"] >= 1


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.timeout(6 * 3600)
def test_a_long_soak(tmp_path):
    """Under a limit that holds about half of the data; a leg and a minute each are ten times as many as in the short one."""
    minutes = float(os.environ.get("JASPER_SOAK_MINUTES", "3"))
    with limited(CAP) as cgroup:
        leg = max(minutes / 12, 0.25) * 60
        held = soak(tmp_path, minutes, leg, leg / 10, 150_000, cgroup)
    assert_flat(held)
