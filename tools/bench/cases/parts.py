"""A tensor in many files, and Arrow where it lies: against one file, and against what reads the same Arrow file."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from tools.bench.assets import ReopenSpec
from tools.bench.cases import cold, warm
from tools.bench.readers.hf_datasets import HfDatasets
from tools.bench.readers.ours import OursArrow, OursParts
from tools.bench.readers.registry import MAIN, READERS
from tools.bench.results import CaseResult, Column, Table, Target, target
from tools.bench.stats import median

if TYPE_CHECKING:
    from tools.bench import spawn
    from tools.bench.context import Context
    from tools.bench.readers.base import Reader

__all__ = ["NAME", "TITLE", "run"]

NAME = "parts"
TITLE = "One tensor in many files, and Arrow in place"
KIB = 128
MANY = 10_000
LIMIT_S = 0.100
OPEN_COLUMNS = (
    Column("label", "what"),
    Column("first_ms", "first time in a process", "ms"),
    Column("ms", "again", "ms"),
    Column("take_ms", "256 rows of 256 parts, never read before", "ms"),
)
Rates = dict[tuple[str, int], float | None]


def run(context: Context) -> CaseResult:
    """The same rows in one file, in many, and in an Arrow file; then many small files opened."""
    result = CaseResult(NAME, TITLE)
    arrow: tuple[type[Reader], ...] = () if HfDatasets.missing() else (OursArrow, HfDatasets)
    readers: list[type[Reader]] = [READERS[MAIN], OursParts, *arrow]
    rates = _cold(context, readers, result)
    _targets(context, "cold", rates, 0.95, 15.0, result.targets)
    rates = _warm(context, readers, result)
    _targets(context, "warm", rates, 0.9, 10.0, result.targets)
    _opening(context, result)
    result.notes.append(
        "Rows, batches and checks are those of the cases cold and warm. Cold is at a read-ahead of 128 KiB where it can be "
        "set. Ratios are medians over medians of interleaved runs."
    )
    return result


def _cold(context: Context, readers: list[type[Reader]], result: CaseResult) -> Rates:
    keep = [reader.asset for reader in readers]
    paths = {name: context.assets.ensure(name, keep) for name in dict.fromkeys(keep)}
    runs: dict[tuple[str, int, int], cold.Run] = defaultdict(cold.Run)
    kib = KIB if KIB in context.read_ahead_settings(result) else None
    with context.read_ahead(kib):
        cold.measure_group(context, 0, readers, paths, kib or 0, runs, defaultdict(list), result)
    found = sorted(runs.items(), key=lambda item: (item[0][2], list(READERS).index(item[0][0])))
    result.tables.append(Table("Cold", cold.COLUMNS, [cold.row(key, state) for key, state in found]))
    return {(key, batch): median(state.rates) if state.rates else None for (key, _, batch), state in runs.items()}


def _warm(context: Context, readers: list[type[Reader]], result: CaseResult) -> Rates:
    runs: dict[tuple[str, int], list[spawn.Result]] = defaultdict(list)
    failed: dict[tuple[str, int], str] = {}
    for batch in context.settings.batches:
        for repeat in range(context.settings.repeats):
            for reader in readers if repeat % 2 == 0 else reversed(readers):
                warm.measure(context, reader.key, str(context.assets.path(reader.asset)), batch, runs, failed)
    keys = [reader.key for reader in readers]
    rows = [warm.row(key, batch, runs, failed) for batch in context.settings.batches for key in keys]
    columns = tuple(column for column in warm.COLUMNS if column.key != "of_ram")
    result.tables.append(Table("Warm", columns, rows))
    return {
        (key, batch): median([float(one.value["rows_per_s"]) for one in runs.get((key, batch), [])])
        for batch in context.settings.batches
        for key in keys
    }


def _targets(
    context: Context, state: str, rates: Rates, of_one: float, of_datasets: float, targets: list[Target]
) -> None:
    for batch in context.settings.batches:
        for key, base, against, wanted in (
            (OursParts.key, MAIN, "one file", of_one),
            (OursArrow.key, HfDatasets.key, HfDatasets.label, of_datasets),
        ):
            what = f"{state} rows, {READERS[key].label}, batch {batch}"
            targets.append(target(what, against, rates.get((key, batch)), rates.get((base, batch)), wanted))


def _opening(context: Context, result: CaseResult) -> None:
    settings = context.settings
    facts = {"parts": MANY, "rows": 10 * MANY, "dim": 64, "seed": settings.seed}
    recipe = ReopenSpec("tools.bench.measure_files:write_parts", facts, facts["rows"] * facts["dim"] * 4 + MANY * 8192)
    path = context.assets.ensure("many.parts", recipe=recipe)
    (path / "jasper_store.json").unlink(missing_ok=True)
    rows: list[dict[str, Any]] = []
    last: float | None = None
    for process, check in (
        ("never seen before", False),
        ("verified in this process", True),
        ("verified before", False),
    ):
        found = context.try_call("open", "tools.bench.measure_files:open_parts", 1800.0, path=str(path), check=check)
        if isinstance(found, str):
            rows.append({"label": process, "why": found})
            continue
        every = [float(one) for one in found.value["seconds"]]
        take_ms = (median([float(one) for one in found.value["take_seconds"]]) or 0.0) * 1e3
        again = median(every[1:])
        rows.append({"label": process, "first_ms": every[0] * 1e3, "ms": (again or 0.0) * 1e3, "take_ms": take_ms})
        last = again
    result.tables.append(Table(f"`js.open` of {MANY:,} files that are one tensor", OPEN_COLUMNS, rows))
    what = f"open, {MANY:,} parts, once verified"
    result.targets.append(target(what, "100 ms", last, LIMIT_S, 1.0, at_most=True))
