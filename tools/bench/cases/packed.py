"""Packed samples, cold, against the same dataset as it is, other libraries' records, and the disk itself."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench import machine
from tools.bench.assets import ReopenSpec
from tools.bench.auto_order import AUTO, against_orders
from tools.bench.jasper_data import Shape
from tools.bench.packed_peers import PEERS
from tools.bench.results import CaseResult, Column, Table, target
from tools.bench.settings import LEAST_CAP
from tools.bench.stats import median, spread

if TYPE_CHECKING:
    from tools.bench import spawn
    from tools.bench.context import Context

__all__ = ["BATCHES", "COLUMNS", "NAME", "TIMES", "TITLE", "run", "shape_for"]

NAME = "packed"
TITLE = "Packed samples, cold, a dataset 2.9 times the memory limit"
BATCHES = (256, 2048)
TIMES = 2.9
EPOCH = 40
WORKERS = (0, 2)
_SOURCE, _PACKED = "packed-source.safetensors", "packed"
COPIED = 1 << 30
"""Bytes of the copy that packing is compared with: all of them would need the disk a third time."""
_COPYING = "copying of its files"
_ROOM = 3.4
"""Bytes of disk that source and packed samples take, over those of the source, with some to spare."""
COLUMNS = (
    Column("label", "way"),
    Column("batch", "batch", "int"),
    Column("samples_per_s", "samples/s", "rate"),
    Column("spread", "±", "percent"),
    Column("disk_bytes", "bytes read a sample", "bytes"),
    Column("anonymous", "peak anonymous", "bytes"),
)
_PACKING = (
    Column("label", "way"),
    Column("bytes_per_s", "written", "bytes_per_s"),
    Column("spread", "±", "percent"),
    Column("anonymous", "peak anonymous", "bytes"),
)


def shape_for(context: Context) -> Shape:
    """Every pair with its own rows; as many pairs as fit the disk budget beside their packed samples."""
    settings = context.settings
    shape = Shape.named("jasper", settings.packed_pairs, settings.dim, settings.n_neg, settings.seed)
    most = int(settings.packed_pairs * settings.disk_budget / (_ROOM * shape.nbytes))
    return Shape.named("jasper", min(settings.packed_pairs, most), settings.dim, settings.n_neg, settings.seed)


def run(context: Context) -> CaseResult:
    """Pack beside a copy, then serve in turn: packed, block and global order; last the peers, each from its records."""
    result = CaseResult(NAME, TITLE)
    shape = shape_for(context)
    source = context.assets.ensure(_SOURCE, recipe=context.assets.dataset("safetensors", shape))
    packed = context.assets.path(_PACKED)
    limit = max(int(shape.nbytes / TIMES), LEAST_CAP)
    try:
        _pack(context, result, source, packed)
        ours = _serve(context, result, source, packed, limit)
    finally:
        shutil.rmtree(packed, ignore_errors=True)
    peers = _peers(context, result, source, limit)
    rows = [_row(label, batch, found) for (label, batch), found in {**ours, **peers}.items()]
    title = f"{shape.pairs:,} pairs of {shape.nbytes / 1e9:.2f} GB, limit {limit / 1e9:.2f} GB, epoch {EPOCH}"
    result.tables.append(Table(title, COLUMNS, rows))
    for batch in BATCHES:
        rate = _rate(ours.get(("packed", batch)))
        what = f"packed, cold, batch {batch}"
        result.targets.append(
            target(what, "block order of the source", rate, _rate(ours.get(("block order", batch))), 5.0)
        )
        rates = {order: _rate(ours.get((f"{order} order", batch))) or 0.0 for order in ("block", "global")}
        rates["auto"] = _rate(ours.get((AUTO, batch))) or 0.0
        result.targets.append(
            target(f"{AUTO}, cold, the source of packed samples, batch {batch}", *against_orders(rates))
        )
        for peer in PEERS.values():
            best = [
                _rate(found) or 0
                for (label, size), found in peers.items()
                if size == batch and label.startswith(peer.label)
            ]
            result.targets.append(target(what, peer.label, rate, max(best) if best else None, 10.0))
    result.notes.append(
        "Every batch is gathered whole. The target against the disk compares bytes that the device read for the packed "
        "samples with its own sequential rate, measured before and after each run. Mosaic Streaming and LitData read "
        "records of the same values, each with its own shuffle, without workers and with two; the better one counts."
    )
    facts = machine.describe(context.settings.data_dir, [peer.dist for peer in PEERS.values()])
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    result.notes.append(f"Machine: {facts['processor']}, {facts['cores']} cores, {facts['system']}; {versions}.")
    return result


def _pack(context: Context, result: CaseResult, source: Path, packed: Path) -> None:
    """Packing against a copy of a part of what it wrote, both capped at 1 GiB or the case's limit, whichever is more."""
    limit = max(1 << 30, int(shape_for(context).nbytes / TIMES))
    found: dict[str, list[spawn.Result]] = defaultdict(list)
    for _ in range(context.settings.repeats):
        shutil.rmtree(packed, ignore_errors=True)
        with context.cap(limit, result) as cap:
            one = context.try_call(
                "packing", "tools.bench.measure_pack:pack", source=str(source), target=str(packed), cap=cap
            )
        other = packed.with_name("packed-copy")
        with context.cap(limit, result) as cap:
            two = context.try_call(
                "copying",
                "tools.bench.measure_pack:copy",
                source=str(packed),
                target=str(other),
                nbytes=COPIED,
                cap=cap,
            )
        shutil.rmtree(other, ignore_errors=True)
        for name, each in (("packing", one), (_COPYING, two)):
            if isinstance(each, str):
                result.notes.append(f"{name}: {each}")
            else:
                found[name].append(each)
                context.say(f"  {name}: {each.value['bytes_per_s'] / 1e6:,.0f} MB/s")
    rates = {name: [float(one.value["bytes_per_s"]) for one in runs] for name, runs in found.items()}
    rows = [
        {
            "key": name,
            "label": name,
            "bytes_per_s": median(each),
            "all": each,
            "spread": spread(each),
            "anonymous": max(one.peak.anonymous for one in found[name]),
        }
        for name, each in rates.items()
    ]
    result.tables.append(Table(f"packing, memory limit {limit / 1e9:.2f} GB, until all is on the disk", _PACKING, rows))
    values = {name: median(each) for name, each in rates.items()}
    result.targets.append(target("packing", _COPYING, values.get("packing"), values.get(_COPYING), 0.5))


def _serve(
    context: Context, result: CaseResult, source: Path, packed: Path, limit: int
) -> dict[tuple[str, int], list[spawn.Result]]:
    runs: dict[tuple[str, int], list[spawn.Result]] = defaultdict(list)
    shares: list[float] = []
    largest = max(packed.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    ways = {"packed": (packed, "auto")}
    ways |= {"block order": (source, "block"), "global order": (source, "global"), AUTO: (source, "auto")}
    for _ in range(context.settings.repeats):
        for batch in BATCHES:
            for label, (path, order) in ways.items():
                before = context.disk_sequential(largest) if label == "packed" else 0.0
                with context.cap(limit, result) as cap:
                    found = context.try_call(
                        label,
                        "tools.bench.measure_loader:rate",
                        way="create_loader",
                        dataset=str(path),
                        batch=batch,
                        seconds=context.settings.seconds,
                        epoch=EPOCH,
                        options={"order": order, "memory_limit": limit},
                        cap=cap,
                        cold=True,
                    )
                if isinstance(found, str):
                    result.notes.append(f"{label}, batch {batch}: {found}")
                    continue
                runs[label, batch].append(found)
                context.say(f"  {label}, batch {batch}: {found.value['samples_per_s']:,.0f} samples/s")
                if label == "packed" and "disk_bytes_per_sample" in found.value:
                    read = found.value["samples_per_s"] * found.value["disk_bytes_per_sample"]
                    shares.append(read / ((before + context.disk_sequential(largest)) / 2))
    value = median(shares) if shares else None
    result.targets.append(target("packed, cold, bytes read a second", "the disk read in order", value, 1.0, 0.8))
    return runs


def _peers(context: Context, result: CaseResult, source: Path, limit: int) -> dict[tuple[str, int], list[spawn.Result]]:
    runs: dict[tuple[str, int], list[spawn.Result]] = defaultdict(list)
    for key, peer in PEERS.items():
        if peer.missing:
            result.notes.append(
                f"{peer.label} is not installed here (pip install {peer.dist}), so it was not measured."
            )
            continue
        nbytes = 2 * shape_for(context).nbytes
        recipe = ReopenSpec("tools.bench.packed_peers:write", {"peer": key, "source": str(source)}, nbytes)
        try:
            path = context.assets.ensure(f"packed-{key}", (_SOURCE,), recipe)
        except RuntimeError as exc:
            result.notes.append(f"{peer.label}: {exc}")
            continue
        for _ in range(context.settings.repeats):
            for batch in BATCHES:
                for workers in WORKERS:
                    label = f"{peer.label}, {workers or 'no'} workers"
                    with context.cap(max(limit, 1 << 30), result) as cap:
                        found = context.try_call(
                            label,
                            "tools.bench.packed_peers:rate",
                            peer=key,
                            path=str(path),
                            batch=batch,
                            seconds=context.settings.seconds,
                            workers=workers,
                            cap=cap,
                        )
                    if isinstance(found, str):
                        result.notes.append(f"{label}, batch {batch}: {found}")
                        continue
                    runs[label, batch].append(found)
                    context.say(f"  {label}, batch {batch}: {found.value['samples_per_s']:,.0f} samples/s")
        context.assets.remove(f"packed-{key}")
    return runs


def _rate(found: list[spawn.Result] | None) -> float | None:
    return median([float(one.value["samples_per_s"]) for one in found]) if found else None


def _row(label: str, batch: int, found: list[spawn.Result]) -> dict[str, Any]:
    rates = [float(one.value["samples_per_s"]) for one in found]
    read = [one.value["disk_bytes_per_sample"] for one in found if "disk_bytes_per_sample" in one.value]
    return {
        "key": f"{label} {batch}",
        "label": label,
        "batch": batch,
        "samples_per_s": median(rates),
        "all": rates,
        "spread": spread(rates),
        "disk_bytes": median(read) if read else None,
        "anonymous": max(one.peak.anonymous for one in found),
    }
