"""When to stop announcing: what each way of knowing costs a batch, and whether it tells the truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tools.bench import spawn
from tools.bench.results import CaseResult, Column, Table
from tools.bench.stats import ratio

if TYPE_CHECKING:
    from tools.bench.context import Context

__all__ = ["NAME", "TITLE", "run"]

NAME = "signal"
TITLE = "Knowing when pages are resident"
BATCH, BATCHES = 256, 400
COLUMNS = (
    Column("label", "signal"),
    Column("us", "a batch, warm", "us"),
    Column("of_gather", "of the gather", "ratio"),
    Column("says_warm", "says, warm", "ratio"),
    Column("says_cold", "says, cold", "ratio"),
    Column("disk_bytes", "read from the disk by asking, cold", "bytes"),
)


def run(context: Context) -> CaseResult:
    """Batches of 256 rows of the row file."""
    s = context.settings
    path = context.assets.ensure("rows.safetensors")
    arguments = {"rows": s.rows, "dim": s.dim, "seed": s.seed, "batch": BATCH, "batches": min(BATCHES, s.rows // 512)}
    facts = spawn.call("tools.bench.measure_signal:signals", path=str(path), **arguments).value["facts"]
    gather = facts["gather"]["us"]
    rows: list[dict[str, Any]] = []
    for key, found in facts.items():
        rows.append(found | {"key": key, "of_gather": ratio(found.get("us"), gather)})
    note = (
        f"Batches of {BATCH} rows. A signal says the share of the rows asked for that is resident (of the whole file's "
        "pages where it asks for that); getrusage says how much a counter moved over one batch. The library uses the "
        "two counters of getrusage: blocks read while it announces, major faults while it is silent."
    )
    return CaseResult(NAME, TITLE, tables=[Table(TITLE, COLUMNS, rows)], notes=[note])
