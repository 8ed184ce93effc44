"""Ranks of one node divide the memory budget, and what that leaves mapped they share through the page cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jasper_store.conversion.converter import convert
from jasper_store.jasper.schema import SCHEMA
from tests.builders import build_pt_dataset
from tests.integrations.launch import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")

MIB = 1 << 20
LIMIT = 100 * MIB
#: What a process may take besides tensors: batches in flight, the allocator's spare pages.
SLACK = 12 * MIB


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """62 MiB, of which the three steering tensors are 61."""
    source = build_pt_dataset(tmp_path_factory.mktemp("node") / "pt", n_pairs=40_000, dim=128)
    convert(source, source.parent / "data", format="safetensors", schema=SCHEMA)
    return source.parent / "data"


def ranks_of(data: Path, count: int) -> list[dict[str, Any]]:
    """Run this many ranks at once, and measure each while all hold what they hold."""
    script = Path(__file__).with_name("node_rank.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, data, str(LIMIT)],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        return [json.loads(process.stdout.readline()) for process in processes]  # type: ignore[union-attr]
    finally:
        for process in processes:
            process.communicate("end\n", timeout=60)


def test_two_ranks_of_a_node_stay_within_the_budget_of_one(data: Path) -> None:
    [alone] = ranks_of(data, 1)
    pair = ranks_of(data, 2)
    assert alone["budget"] == int(0.8 * LIMIT)
    assert alone["mapped"] == 0
    assert alone["preloaded"] - SLACK < alone["grown"] < alone["preloaded"] + SLACK
    for rank in pair:
        # Half the budget, so the plan is another: what does not fit is mapped, and shared through the page cache.
        assert rank["budget"] == int(0.4 * LIMIT)
        assert "2 ranks on this node" in rank["plan"]
        assert rank["mapped"] > 0
        assert 0 < rank["preloaded"] <= rank["budget"]
        assert rank["preloaded"] - SLACK < rank["grown"] < rank["preloaded"] + SLACK
    assert sum(rank["grown"] for rank in pair) < alone["budget"]
