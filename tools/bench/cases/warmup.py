"""Warming a cold file against ``vmtouch -t``."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from tools.bench.results import CaseResult, Table, target
from tools.bench.timings import COLUMNS, Timings, Way

if TYPE_CHECKING:
    from tools.bench.context import Context

__all__ = ["NAME", "TITLE", "run"]

NAME = "warmup"
TITLE = "Warming a cold file"


def run(context: Context) -> CaseResult:
    """Both ways evict the file before, and the share that is resident afterwards is checked."""
    result = CaseResult(NAME, TITLE)
    path = context.assets.ensure("rows.safetensors")
    ways = {"ours": Way("`js.warm_up`", "tools.bench.measure_files:warm_up", {"path": str(path)})}
    if shutil.which("vmtouch"):
        ways["vmtouch"] = Way("`vmtouch -t`", "tools.bench.measure_files:vmtouch", {"path": str(path)})
    else:
        result.notes.append("vmtouch is not installed (Debian package of that name), so there is nothing beside it.")
    for kib in context.read_ahead_settings(result):
        with context.read_ahead(kib):
            timings = Timings(ways).measure(context)
            sequential = context.disk_sequential(path)
        result.tables.append(Table(f"Read-ahead {kib} KiB", COLUMNS, timings.rows()))
        what = f"warm-up, read-ahead {kib} KiB"
        result.targets.append(target(what, "`vmtouch -t`", timings.rate("ours"), timings.rate("vmtouch"), 1.0))
        resident = {key: timings.value(key, "resident") for key in ways}
        result.notes.append(
            f"Read-ahead {kib} KiB: resident afterwards {resident}; the disk {sequential / 1e9:.2f} GB/s."
        )
    return result
