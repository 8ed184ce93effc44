"""Datasets that declare their samples, through the same measurements as JASPER's: in RAM, in block order, cold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tools.bench.auto_order import AUTO, against_orders
from tools.bench.cases import block, loader
from tools.bench.generic_data import KINDS, PREFIX, GenericShape, largest_file
from tools.bench.results import CaseResult, Column, Table, Target, target
from tools.bench.settings import LEAST_CAP
from tools.bench.stats import median, spread

if TYPE_CHECKING:
    from pathlib import Path

    from tools.bench import spawn
    from tools.bench.context import Context

__all__ = ["NAME", "TITLE", "run"]

NAME = "generic"
TITLE = "Any tensors: embeddings with labels, and triplets"
DISK = "the disk's 4 KiB reads at depth 32"
RAM = "the same loader with all in RAM"
OWN_ROWS = "every pair has its own rows"
COLD_COLUMNS = (
    Column("batch", "batch", "int"),
    Column("samples_per_s", "samples/s", "rate"),
    Column("spread", "±", "percent"),
    Column("rows_per_s", "embeddings/s", "rate"),
    Column("of_disk", "of the disk's limit", "ratio"),
    Column("disk_reads_per_row", "disk reads an embedding", "ratio"),
    Column("disk_bytes_per_row", "bytes read an embedding", "bytes"),
    Column("anonymous", "peak anonymous", "bytes"),
)
BESIDE_COLUMNS = (
    Column("what", "case"),
    Column("against", "against"),
    Column("ratio", "ratio", "ratio"),
    Column("jasper", "JASPER's row", "ratio"),
)


@dataclass
class _Cold:
    """Runs of one batch size, and what the disk gave just before each."""

    results: list[spawn.Result] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    failed: str = "not measured"

    def values(self, key: str) -> list[float]:
        return [float(one.value[key]) for one in self.results if key in one.value]

    def of_disk(self, rows: int) -> float | None:
        """Median share of the limit, ``rows`` embeddings a sample."""
        rates = self.values("samples_per_s")
        shares = [rows * rate / limit for rate, limit in zip(rates, self.limits, strict=True)]
        return median(shares) if shares else None


def run(context: Context) -> CaseResult:
    """One dataset after the other; each target has beside it what this document says of JASPER's row."""
    result = CaseResult(NAME, TITLE)
    for kind, words in KINDS.items():
        path = context.assets.ensure(f"{PREFIX}{kind}.safetensors")
        shape = GenericShape.of(kind, context.settings)
        name = f"{words}, {shape.rows:,} samples"
        agreement = context.try_call("equality", "tools.bench.measure_loader:equal", dataset=str(path), kind=kind)
        said = agreement if isinstance(agreement, str) else str(agreement.value)
        result.notes.append(f"{name}: batched, one-by-one and plain access bit-equal: {said}.")
        _in_ram(context, path, kind, name, result)
        _block_order(context, path, shape, name, result)
        _cold(context, path, shape, name, result)
    beside = [_beside(context, item) for item in result.targets]
    result.tables.append(Table("Beside JASPER's rows", BESIDE_COLUMNS, beside))
    result.notes.append(
        "Measured by the functions that measure JASPER's rows: in RAM as in the case loader, block order as in the case "
        "block, cold as in the case cold, but through `create_loader` with everything mapped. JASPER's row is that of the "
        f"same run, of the generated dataset; in block order of the dataset where {OWN_ROWS}. An embedding that is read "
        "again while its page is in the page cache costs the disk nothing, so a share may be above 1."
    )
    return result


def _in_ram(context: Context, path: Path, kind: str, name: str, result: CaseResult) -> None:
    runs = loader.measure(context, path, kind, more_workers=())
    result.tables.append(Table(f"In RAM: {name}", loader.COLUMNS, loader.rows(runs)))
    result.targets += loader.targets(name, context.settings.loader_batches, runs)


def _block_order(context: Context, path: Path, shape: GenericShape, name: str, result: CaseResult) -> None:
    limit = int(shape.nbytes / block.TIMES)
    runs, failed = block.measure(context, str(path), limit, result, shape.kind)
    rates = {way: median([one.value["samples_per_s"] for one in runs.get(way, [])]) for way in block.WAYS}
    rows = [block.row(way, runs.get(way), failed.get(way, "not measured"), rates["ram"]) for way in block.WAYS]
    title = f"Block order: {name}, {shape.nbytes / 1e9:.2f} GB, limit {limit / 1e9:.2f} GB"
    result.tables.append(Table(title, block.COLUMNS, rows))
    what = f"block order, cold, {block.TIMES} times the limit, {name}"
    result.targets.append(target(what, RAM, rates["block"], rates["ram"], 0.8))
    result.targets.append(target(f"{AUTO}, cold, {name}", *against_orders(rates)))


def _cold(context: Context, path: Path, shape: GenericShape, name: str, result: CaseResult) -> None:
    settings, limit = context.settings, int(shape.nbytes / block.TIMES)
    runs = {batch: _Cold() for batch in settings.batches}
    options = {"use_mmap": True, "order": "global", "memory_limit": limit}
    for repeat in range(settings.repeats):
        for batch, state in runs.items():
            disk = context.disk_random(largest_file(path), repeat)
            with context.cap(max(limit, LEAST_CAP), result) as cap:
                found = context.try_call(
                    "cold, global order",
                    "tools.bench.measure_loader:rate",
                    way="create_loader",
                    dataset=str(path),
                    kind=shape.kind,
                    batch=batch,
                    seconds=settings.seconds,
                    options=options,
                    cap=cap,
                    cold=True,
                )
            if isinstance(found, str):
                state.failed = found
                continue
            state.results.append(found)
            state.limits.append(disk)
            context.say(f"  cold, global order, batch {batch}: {found.value['samples_per_s']:,.0f} samples/s")
    per_sample = shape.embeddings_per_sample
    rows = [_cold_row(batch, state, per_sample) for batch, state in runs.items()]
    result.tables.append(Table(f"Cold, global order: {name}, limit {limit / 1e9:.2f} GB", COLD_COLUMNS, rows))
    for batch, state in runs.items():
        what = f"cold rows, global order, batch {batch}, {name}"
        result.targets.append(target(what, DISK, state.of_disk(per_sample), 1.0, 0.9))


def _cold_row(batch: int, state: _Cold, per_sample: int) -> dict[str, Any]:
    rates = state.values("samples_per_s")
    if not rates:
        return {"batch": batch, "why": state.failed}
    reads, nbytes = state.values("disk_reads_per_sample"), state.values("disk_bytes_per_sample")
    return {
        "batch": batch,
        "samples_per_s": median(rates),
        "all": rates,
        "spread": spread(rates),
        "rows_per_s": median(rates) * per_sample,
        "of_disk": state.of_disk(per_sample),
        "limits": state.limits,
        "disk_reads_per_row": median(reads) / per_sample if reads else None,
        "disk_bytes_per_row": median(nbytes) / per_sample if nbytes else None,
        "anonymous": max(one.peak.anonymous for one in state.results),
    }


def _beside(context: Context, item: Target) -> dict[str, Any]:
    """A target's ratio, and that of the JASPER row of this document; nothing where it was not measured."""
    beside = [
        found["ratio"]
        for case in ("loader", "block", "cold")
        for found in context.measured.get(case, {}).get("targets", ())
        if found["against"] == item.against and _is_like(found["what"], item.what)
    ]
    return {
        "what": item.what,
        "against": item.against,
        "ratio": item.ratio,
        "jasper": next((ratio for ratio in beside if ratio is not None), None),
    }


def _is_like(jasper: str, mine: str) -> bool:
    """Whether a target of another case asks of JASPER's data what mine asks of any."""
    if mine.startswith("block order"):
        return jasper.startswith("block order") and jasper.endswith(OWN_ROWS)
    if mine.startswith("cold rows"):
        return jasper.startswith(",".join(mine.split(",")[:3]) + ",")
    return jasper.startswith("generated") and jasper.partition(": ")[2] == mine.partition(": ")[2]
