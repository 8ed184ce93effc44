"""Half the data fits: what the plan preloads against mapping everything, whole batches, under one memory limit."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, TypeAlias

from tools.bench.auto_order import AUTO, against_orders
from tools.bench.jasper_data import Shape
from tools.bench.results import CaseResult, Column, Table, target
from tools.bench.stats import median, spread

if TYPE_CHECKING:
    from tools.bench import spawn
    from tools.bench.context import Context

__all__ = ["NAME", "TITLE", "run"]

NAME = "hybrid"
TITLE = "Hybrid placement, half the data fits"
BATCH = 256
BUDGET_FRACTION = 0.8
WAYS = {"hybrid": None, "mapped": True}
EPOCHS = (0, 40)
ORDERS = ("block", "global")
LABELS = {"hybrid": "hybrid, as planned", "mapped": "everything mapped"}
_Key: TypeAlias = "tuple[str, int, str]"
COLUMNS = (
    Column("label", "placement"),
    Column("order", "order"),
    Column("epoch", "epoch", "int"),
    Column("samples_per_s", "samples/s", "rate"),
    Column("spread", "±", "percent"),
    Column("disk_reads", "disk reads a sample", "ratio"),
    Column("open_s", "open", "s"),
    Column("anonymous", "peak anonymous", "bytes"),
    Column("placements", "where tensors live"),
)


def run(context: Context) -> CaseResult:
    """The ways take turns; epoch 0 draws a steering row for 3 samples of 10, epoch 40 for all."""
    result = CaseResult(NAME, TITLE)
    settings = context.settings
    path = context.assets.ensure("jasper.safetensors")
    nbytes = Shape(settings.pairs, 1, settings.dim, settings.n_neg, settings.seed).nbytes
    limit = int(nbytes / 2 / BUDGET_FRACTION)
    runs: dict[_Key, list[spawn.Result]] = defaultdict(list)
    failed: dict[_Key, str] = {}
    keys = [*itertools.product(ORDERS, EPOCHS, WAYS), *(("auto", epoch, "hybrid") for epoch in EPOCHS)]
    for _, key in itertools.product(range(settings.repeats), keys):
        order, epoch, way = key
        with context.cap(limit, result) as cap:
            options: dict[str, Any] = {"use_mmap": WAYS[way], "order": order, "memory_limit": limit}
            found = context.try_call(
                LABELS[way],
                "tools.bench.measure_loader:rate",
                way="create_loader",
                dataset=str(path),
                batch=BATCH,
                epoch=epoch,
                seconds=settings.seconds,
                options=options,
                cap=cap,
                cold=True,
            )
        if isinstance(found, str):
            failed[key] = found
            continue
        runs[key].append(found)
        context.say(f"  {LABELS[way]}, {order} order, epoch {epoch}: {found.value['samples_per_s']:,.0f} samples/s")
    rows = [_row(key, runs.get(key), failed) for key in keys]
    result.tables.append(Table(f"{nbytes / 1e9:.2f} GB under a limit of {limit / 1e9:.2f} GB", COLUMNS, rows))
    for order, epoch in itertools.product(ORDERS, EPOCHS):
        rates = [median([one.value["samples_per_s"] for one in runs.get((order, epoch, way), [])]) for way in WAYS]
        what = f"hybrid placement, half the data fits, {order} order, epoch {epoch}"
        result.targets.append(target(what, "everything mapped, same order", rates[0], rates[1], 4.0))
    for epoch in EPOCHS:
        rates_of = {
            order: median([one.value["samples_per_s"] for one in runs.get((order, epoch, "hybrid"), [])])
            for order in (*ORDERS, "auto")
        }
        what = f"{AUTO}, hybrid placement, half the data fits, epoch {epoch}"
        result.targets.append(target(what, *against_orders(rates_of)))
    result.notes.append(
        f"The limit is half the data over {BUDGET_FRACTION}, the share of memory that the plan spends; batches of {BATCH} "
        "evicted before, the page cache of the run inside the limit."
    )
    return result


def _row(key: _Key, found: list[spawn.Result] | None, failed: dict[_Key, str]) -> dict[str, Any]:
    order, epoch, way = key
    facts: dict[str, Any] = {"key": way, "label": LABELS[way], "order": order, "epoch": epoch}
    if not found:
        return facts | {"why": failed.get(key, "not measured")}
    rates = [float(one.value["samples_per_s"]) for one in found]
    places = Counter((found[0].value["plan"] or {}).values())
    reads = [one.value["disk_reads_per_sample"] for one in found if "disk_reads_per_sample" in one.value]
    return facts | {
        "samples_per_s": median(rates),
        "all": rates,
        "spread": spread(rates),
        "disk_reads": median(reads) if reads else None,
        "open_s": median([float(one.value["open_s"]) for one in found]),
        "anonymous": max(one.peak.anonymous for one in found),
        "placements": ", ".join(f"{count} {place}" for place, count in sorted(places.items())),
        "plan": found[0].value["plan"],
    }
