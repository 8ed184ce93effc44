"""Checking a dataset's checksums and meaning, against the disk's sequential rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools.bench import spawn
from tools.bench.results import CaseResult, Table, target
from tools.bench.stats import median
from tools.bench.timings import COLUMNS, Timings, Way

if TYPE_CHECKING:
    from tools.bench.context import Context

__all__ = ["NAME", "TITLE", "run"]

NAME = "verify"
TITLE = "Verifying a safetensors dataset"
CALL = "tools.bench.measure_files"


def run(context: Context) -> CaseResult:
    """The dataset is converted first, so that it has a manifest with checksums."""
    result = CaseResult(NAME, TITLE)
    src = context.assets.ensure("jasper.pt")
    dst = context.assets.path("verified")
    spawn.call(f"{CALL}:convert", src=str(src), dst=str(dst), layout="safetensors")
    try:
        ways = {
            "cold": Way("`js.verify`, files cold", f"{CALL}:verify", {"path": str(dst), "cold": True}),
            "warm": Way("`js.verify`, files warm", f"{CALL}:verify", {"path": str(dst), "cold": False}),
        }
        timings = Timings(ways).measure(context)
        probes = [context.disk_sequential(dst / "steering_residual.safetensors") for _ in range(3)]
    finally:
        context.assets.remove("verified")
    limit = median(probes)
    result.tables.append(Table(TITLE, COLUMNS, timings.rows()))
    result.targets.append(target("verify, files cold", "the disk's sequential rate", timings.rate("cold"), limit, 0.5))
    result.notes.append(f"The disk's sequential rate, own probe: {limit / 1e9:.2f} GB/s.")
    return result
