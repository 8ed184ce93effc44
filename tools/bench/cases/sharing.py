"""What a worker of a preloaded dataset holds for itself, from the first batch of an epoch to its last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tools.bench.results import CaseResult, Column, Table, target

if TYPE_CHECKING:
    from tools.bench.context import Context

__all__ = ["NAME", "TITLE", "run"]

NAME = "sharing"
TITLE = "Private memory of workers over an epoch"
BATCH, WORKERS, MARKS = 256, 2, (0.0, 0.25, 0.5, 0.75, 1.0)
SLACK = 16 << 20
METHODS = {"fork": "forked, shares the trainer's memory", "spawn": "spawned, maps the files"}
COLUMNS = (
    Column("label", "worker"),
    *(Column(f"at_{round(100 * mark)}", f"at {round(100 * mark)} % of the epoch", "bytes") for mark in MARKS),
    Column("nbytes", "the dataset", "bytes"),
)


def run(context: Context) -> CaseResult:
    """The larger of two workers, by the pages that it wrote and shares with nobody (Private_Dirty)."""
    result = CaseResult(NAME, TITLE)
    path = str(context.assets.ensure("jasper.safetensors"))
    rows: list[dict[str, Any]] = []
    for method, label in METHODS.items():
        arguments = {"dataset": path, "batch": BATCH, "workers": WORKERS, "method": method, "marks": list(MARKS)}
        found = context.try_call(label, "tools.bench.measure_loader:sharing", 900.0, **arguments)
        facts: dict[str, Any] = {"key": method, "label": label}
        if isinstance(found, str):
            rows.append(facts | {"why": found})
            continue
        private = [float(size) for size in found.value["private"]]
        facts |= {f"at_{round(100 * mark)}": size for mark, size in zip(MARKS, private, strict=True)}
        rows.append(facts | {"nbytes": found.value["nbytes"]})
        context.say(f"  {label}: {private[0] / 1e6:.1f} MB, then {private[-1] / 1e6:.1f} MB")
        what = f"private memory of a worker at the end of an epoch, {label}"
        base = private[0] + SLACK
        result.targets.append(target(what, "at its first batch and 16 MiB", private[-1], base, 1.0, at_most=True))
    result.tables.append(Table(TITLE, COLUMNS, rows))
    result.notes.append(
        f"{WORKERS} workers, batches of {BATCH}, the dataset preloaded by the trainer. What a worker holds besides the "
        "interpreter's own pages are batches on their way."
    )
    return result
