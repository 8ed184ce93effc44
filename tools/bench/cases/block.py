"""Block order from a disk, on a dataset three times the memory limit, against the same loader with all in RAM."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tools.bench.auto_order import AUTO, against_orders
from tools.bench.jasper_data import Shape
from tools.bench.results import CaseResult, Column, Table, target
from tools.bench.settings import LEAST_CAP
from tools.bench.stats import median, ratio, spread

if TYPE_CHECKING:
    from tools.bench import spawn
    from tools.bench.context import Context

__all__ = ["BATCH", "COLUMNS", "NAME", "TIMES", "TITLE", "WAYS", "measure", "row", "run"]

NAME = "block"
TITLE = "Block order, cold, a dataset three times the memory limit"
BATCH = 256
TIMES = 3.1
COLUMNS = (
    Column("label", "way"),
    Column("samples_per_s", "samples/s", "rate"),
    Column("spread", "±", "percent"),
    Column("of_ram", "of RAM", "ratio"),
    Column("disk_bytes", "bytes read a sample", "bytes"),
    Column("anonymous", "peak anonymous", "bytes"),
)


@dataclass(frozen=True)
class _Way:
    label: str
    order: str
    use_mmap: bool | None
    capped: bool


WAYS = {
    "ram": _Way("all in RAM, block order", "block", use_mmap=False, capped=False),
    "block": _Way("capped and cold, block order", "block", use_mmap=None, capped=True),
    "global": _Way("capped and cold, global order", "global", use_mmap=None, capped=True),
    "auto": _Way(f"capped and cold, {AUTO}", "auto", use_mmap=None, capped=True),
}
DATASETS = {
    "jasper-shared-large": "4 pairs share a question and a source, 5 times as many pairs",
    "jasper-shared": "4 pairs share a question and a source",
    "jasper": "every pair has its own rows",
}


def run(context: Context) -> CaseResult:
    """Each dataset on its own; the target is judged where rows that any pair may name fit beside the window."""
    result = CaseResult(NAME, TITLE)
    settings = context.settings
    for name, words in DATASETS.items():
        path = context.assets.ensure(f"{name}.safetensors")
        nbytes = Shape.named(name, settings.pairs, settings.dim, settings.n_neg, settings.seed).nbytes
        limit = int(nbytes / TIMES)
        runs, failed = measure(context, str(path), limit, result)
        rates = {way: median([one.value["samples_per_s"] for one in runs.get(way, [])]) for way in WAYS}
        rows = [row(way, runs.get(way), failed.get(way, "not measured"), rates["ram"]) for way in WAYS]
        result.tables.append(Table(f"{words}: {nbytes / 1e9:.2f} GB, limit {limit / 1e9:.2f} GB", COLUMNS, rows))
        what = f"block order, cold, {TIMES} times the limit, {words}"
        result.targets.append(target(what, "the same loader with all in RAM", rates["block"], rates["ram"], 0.8))
        result.targets.append(target(f"{AUTO}, cold, {words}", *against_orders(rates)))
    result.notes.append(
        "A block order makes the rows that lie in the order of the pairs (steering, indices) sequential. Questions, "
        "sources and negatives are named at random: they are preloaded as far as the limit allows, and what does not "
        "fit stays random reads. The disk's sequential rate bounds what is left: bytes a sample times samples a second. "
        "A pass waits once, for its first window; the fewer pairs there are, the more that is of it."
    )
    return result


def measure(
    context: Context, path: str, limit: int, result: CaseResult, kind: str = "jasper"
) -> tuple[dict[str, list[spawn.Result]], dict[str, str]]:
    """All ways in turn: results, and the reasons where one failed."""
    runs: dict[str, list[spawn.Result]] = defaultdict(list)
    failed: dict[str, str] = {}
    for _ in range(context.settings.repeats):
        for name, way in WAYS.items():
            options: dict[str, Any] = {"use_mmap": way.use_mmap, "order": way.order}
            arguments: dict[str, Any] = {
                "way": "create_loader",
                "dataset": path,
                "kind": kind,
                "batch": BATCH,
                "seconds": context.settings.seconds,
            }
            call = "tools.bench.measure_loader:rate"
            if not way.capped:
                found = context.try_call(way.label, call, options=options, **arguments)
            else:
                options["memory_limit"] = limit
                with context.cap(max(limit, LEAST_CAP), result) as cap:
                    found = context.try_call(way.label, call, options=options, cap=cap, cold=True, **arguments)
            if isinstance(found, str):
                failed[name] = found
                continue
            runs[name].append(found)
            context.say(f"  {way.label}: {found.value['samples_per_s']:,.0f} samples/s")
    return runs, failed


def row(name: str, found: list[spawn.Result] | None, why: str, ram: float) -> dict[str, Any]:
    """For a table of :data:`COLUMNS`; ``ram`` is the rate of the first way."""
    facts: dict[str, Any] = {"key": name, "label": WAYS[name].label}
    if not found:
        return facts | {"why": why}
    rates = [float(one.value["samples_per_s"]) for one in found]
    read = [one.value["disk_bytes_per_sample"] for one in found if "disk_bytes_per_sample" in one.value]
    return facts | {
        "samples_per_s": median(rates),
        "all": rates,
        "spread": spread(rates),
        "of_ram": ratio(median(rates), ram),
        "disk_bytes": median(read) if read else None,
        "anonymous": max(one.peak.anonymous for one in found),
        "plan": found[0].value["plan"],
    }
