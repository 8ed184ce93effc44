"""Random rows of a resident file: mapped rows against ``torch.index_select`` on a tensor in RAM, and the peers."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from tools.bench import spawn
from tools.bench.readers.registry import MAIN as OURS, READERS, chosen
from tools.bench.results import CaseResult, Column, Table, target
from tools.bench.stats import median, ratio, spread

if TYPE_CHECKING:
    from tools.bench.context import Context

__all__ = ["COLUMNS", "NAME", "RAM", "TITLE", "measure", "row", "run"]

NAME = "warm"
TITLE = "Random rows, warm"
SMALL = 32
RAM = "index_select"
RAM_LABEL = "`torch.index_select` on a tensor in RAM"
COLUMNS = (
    Column("label", "reader"),
    Column("batch", "batch", "int"),
    Column("rows_per_s", "rows/s", "rate"),
    Column("spread", "±", "percent"),
    Column("of_ram", "of RAM", "ratio"),
    Column("first_rows_per_s", "first pass, rows/s", "rate"),
    Column("anonymous", "peak anonymous", "bytes"),
    Column("file", "peak mapped", "bytes"),
)


def run(context: Context) -> CaseResult:
    """Every reader beside the RAM tensor and this library, one file of a peer at a time on the disk."""
    result = CaseResult(NAME, TITLE)
    settings = context.settings
    base = READERS[OURS].asset
    runs: dict[tuple[str, int], list[spawn.Result]] = defaultdict(list)
    failed: dict[tuple[str, int], str] = {}
    readers = chosen(settings.readers)
    for asset in dict.fromkeys(reader.asset for reader in readers):
        paths = {name: str(context.assets.ensure(name, {base, asset})) for name in (base, asset)}
        group = [reader.key for reader in readers if reader.asset == asset]
        for batch in _batches(settings.batches):
            for repeat in range(settings.repeats):
                # The yardstick runs beside this library's own file only; every group holds one of its readers.
                keys = [RAM, *group] if asset == base else group
                for key in keys if repeat % 2 == 0 else reversed(keys):
                    measure(context, key, paths[base if key == RAM else asset], batch, runs, failed)
    rows = [row(key, batch, runs, failed) for batch in _batches(settings.batches) for key in (RAM, *READERS)]
    result.tables.append(Table(TITLE, COLUMNS, rows))
    for batch in _batches(settings.batches):
        rates = {key: median([one.value["rows_per_s"] for one in runs.get((key, batch), [])]) for key in (OURS, RAM)}
        result.targets.append(
            target(f"warm mapped rows, batch {batch}", RAM_LABEL, rates[OURS], rates[RAM], _least(batch))
        )
    result.notes.append(
        f"{min(settings.max_rows, settings.rows // 2):,} of {settings.rows:,} rows in a global shuffle, again and again; "
        "the first pass meets fresh page tables, the rate is the median of the later ones. Sums are compared after the "
        "clock. Nothing is capped."
    )
    return result


def _batches(batches: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the row readers, and a small one, where the calls around a gather count most."""
    return tuple(sorted({SMALL, *batches}))


def _least(batch: int) -> float:
    """The share of the RAM tensor's rate that is the target."""
    return 0.95 if batch <= SMALL else 1.0


def measure(
    context: Context,
    key: str,
    path: str,
    batch: int,
    runs: dict[tuple[str, int], list[spawn.Result]],
    failed: dict[tuple[str, int], str],
) -> None:
    """One run in a child."""
    s = context.settings
    facts: dict[str, Any] = {"rows": s.rows, "dim": s.dim, "batch": batch, "seed": s.seed}
    facts |= {"path": path, "count": min(s.max_rows, s.rows // 2), "seconds": s.seconds}
    if key != RAM:
        facts |= {"reader": key, "lookahead": s.lookahead}
    function = "index_select" if key == RAM else "warm"
    found = context.try_call(key, f"tools.bench.measure_rows:{function}", **facts)
    if isinstance(found, str):
        failed[key, batch] = found
        return
    others = [one for (_, size), done in runs.items() if size == batch for one in done[:1]]
    if others and others[0].value["sums"] != found.value["sums"]:
        failed[key, batch] = "wrong values: its sums are not those of the other readers"
        return
    runs[key, batch].append(found)
    context.say(f"  {key}, batch {batch}: {found.value['rows_per_s']:,.0f} rows/s")


def row(
    key: str, batch: int, runs: dict[tuple[str, int], list[spawn.Result]], failed: dict[tuple[str, int], str]
) -> dict[str, Any]:
    """A row of the table."""
    reader = READERS.get(key)
    facts: dict[str, Any] = {"key": key, "label": reader.label if reader else RAM_LABEL, "batch": batch}
    found = runs.get((key, batch))
    if not found:
        missing = reader.missing() if reader else None
        return facts | {"why": missing or failed.get((key, batch), "not measured")}
    rates = [float(one.value["rows_per_s"]) for one in found]
    ram = median([one.value["rows_per_s"] for one in runs.get((RAM, batch), [])])
    return facts | {
        "rows_per_s": median(rates),
        "all": rates,
        "spread": spread(rates),
        "of_ram": ratio(median(rates), ram),
        "first_rows_per_s": median([float(one.value["first_rows_per_s"]) for one in found]),
        "anonymous": max(one.peak.anonymous for one in found),
        "file": max(one.peak.file for one in found),
    }
