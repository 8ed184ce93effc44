"""The memory of an epoch must not grow with the number of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tools.bench.jasper_data import Shape
from tools.bench.results import CaseResult, Column, Table, target

if TYPE_CHECKING:
    from tools.bench.context import Context

__all__ = ["NAME", "TITLE", "run"]

NAME = "growth"
TITLE = "Memory of an epoch at growing size"
BATCH, BATCHES = 256, 2000
SLACK = 16 << 20
COLUMNS = (
    Column("pairs", "pairs", "int"),
    Column("anonymous", "peak anonymous", "bytes"),
    Column("grown", "of it added by opening and serving", "bytes"),
    Column("file", "peak mapped", "bytes"),
    Column("batches", "batches served", "int"),
    Column("open_s", "open", "s"),
)


def run(context: Context) -> CaseResult:
    """Sparse datasets, everything mapped, the first batches of a shuffled epoch."""
    result = CaseResult(NAME, TITLE)
    settings = context.settings
    rows: list[dict[str, Any]] = []
    for pairs in settings.growth_pairs:
        shape = Shape(pairs, 1, settings.dim, settings.n_neg, settings.seed)
        path = context.assets.ensure("growth", recipe=context.assets.dataset("safetensors", shape, sparse=True))
        arguments = {"dataset": str(path), "batch": BATCH, "batches": BATCHES}
        found = context.try_call(f"{pairs:,} pairs", "tools.bench.measure_loader:growth", 1800.0, **arguments)
        context.assets.remove("growth")
        if isinstance(found, str):
            rows.append({"pairs": pairs, "why": found})
            continue
        facts = {"pairs": pairs, "anonymous": found.peak.anonymous, "grown": found.grown, "file": found.peak.file}
        rows.append(facts | found.value)
        context.say(f"  {pairs:,} pairs: {found.grown / 1e6:.1f} MB added")
    result.tables.append(Table(TITLE, COLUMNS, rows))
    measured = [row for row in rows if "anonymous" in row]
    if len(measured) > 1:
        first, last = measured[0], measured[-1]
        what = f"peak anonymous memory of an epoch, {last['pairs']:,} pairs"
        base = float(first["anonymous"] + SLACK)
        against = f"that of {first['pairs']:,} pairs and 16 MiB"
        result.targets.append(target(what, against, float(last["anonymous"]), base, 1.0, at_most=True))
    result.notes.append(f"Batches of {BATCH} in global order, of datasets that are holes of the right size.")
    return result
