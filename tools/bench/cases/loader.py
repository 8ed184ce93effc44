"""Whole JASPER batches in RAM: per sample, plain DataLoader, create_loader, workers, and the copy of the same bytes."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from tools.bench.results import CaseResult, Column, Table, Target, target
from tools.bench.stats import median, ratio, spread

if TYPE_CHECKING:
    from pathlib import Path

    from tools.bench import spawn
    from tools.bench.context import Context

__all__ = ["COLUMNS", "FAST_WAYS", "LABELS", "NAME", "TITLE", "Key", "measure", "rows", "run", "targets"]

NAME = "loader"
TITLE = "Whole batches from RAM"
WORKERS = (0, 1, 2)
COPIES = ("ram", "fresh", "kept")
SLOW_WAYS = ("plain-per-sample", "per-sample")
WORKER_WAYS = ("plain-per-sample", "dataloader")
"""Ways that are measured with workers besides create_loader, with the most that it has."""
FAST_WAYS = ("dataloader", "create_loader")
RAM_TARGETS = {("create_loader", 32): 0.75, ("dataloader", 32): 0.5}
"""Least shares of the copy from RAM to RAM, where they are not 0.7."""
LABELS = {
    "plain-per-sample": "a plain dataset, per sample, default collation",
    "per-sample": "this dataset, per sample, default collation",
    "dataloader": "`DataLoader(ds, batch_size, shuffle=True)`",
    "create_loader": "`create_loader`",
}
COLUMNS = (
    Column("label", "way"),
    Column("batch", "batch", "int"),
    Column("workers", "workers", "int"),
    Column("samples_per_s", "samples/s", "rate"),
    Column("spread", "±", "percent"),
    Column("us", "a sample", "us"),
    Column("bytes_per_s", "bytes/s", "bytes_per_s"),
    Column("times_per_sample", "times per sample", "ratio"),
    Column("of_copy_ram", "of `copy_`, RAM to RAM", "ratio"),
    Column("of_copy_fresh", "of `copy_`, RAM to a new batch", "ratio"),
    Column("of_copy_kept", "of `copy_`, RAM to cache", "ratio"),
    Column("anonymous", "peak anonymous", "bytes"),
)

Key = tuple[str, int, int]


def run(context: Context) -> CaseResult:
    """Measure the generated dataset, and the real one where there is one."""
    result = CaseResult(NAME, TITLE)
    datasets: dict[str, Path] = {}
    if context.settings.real_dir:
        datasets[context.settings.real_dir.name] = context.settings.real_dir
    datasets[f"generated, {context.settings.pairs:,} pairs"] = context.assets.ensure("jasper.safetensors")
    for name, path in datasets.items():
        agreement = context.try_call("equality", "tools.bench.measure_loader:equal", dataset=str(path))
        said = agreement if isinstance(agreement, str) else str(agreement.value)
        result.notes.append(f"{name}: batched, one-by-one and plain access bit-equal: {said}.")
        runs = measure(context, path)
        result.tables.append(Table(name, COLUMNS, rows(runs)))
        result.targets += targets(name, context.settings.loader_batches, runs)
    result.notes.append(
        "Samples a second from the first batch on, the gaps between epochs included, everything preloaded. "
        "`copy_` is measured in the same process: from one half of a tensor of 1 GiB to another tensor of that size "
        "(RAM to RAM, the memory's copy bandwidth), and in pieces of a batch's size, whose destination the "
        "processor's cache holds."
    )
    return result


def _ways(batches: tuple[int, ...], workers: tuple[int, ...]) -> list[Key]:
    keys = [(way, batch, 0) for batch in batches for way in LABELS]
    keys += [("create_loader", batch, count) for batch in batches for count in workers]
    most = max(workers, default=0)
    return keys + [(way, batch, most) for batch in batches for way in WORKER_WAYS if most]


def measure(
    context: Context, path: Path, kind: str = "jasper", more_workers: tuple[int, ...] = WORKERS[1:]
) -> dict[Key, list[spawn.Result] | str]:
    """All ways in turn, by (way, batch size, workers); the reason where one failed."""
    ways = _ways(context.settings.loader_batches, more_workers)
    found: dict[Key, list[spawn.Result]] = defaultdict(list)
    failed: dict[Key, str] = {}
    for _ in range(context.settings.repeats):
        for key in ways:
            way, batch, workers = key
            if key in failed:
                continue
            options = {} if way == "plain-per-sample" else {"use_mmap": False}
            one = context.try_call(
                f"{LABELS[way]} {batch} {workers}",
                "tools.bench.measure_loader:rate",
                way=way,
                dataset=str(path),
                kind=kind,
                batch=batch,
                workers=workers,
                copies=way in FAST_WAYS and not workers,
                seconds=min(context.settings.seconds, 2.0),
                options=options,
            )
            if isinstance(one, str):
                failed[key] = one
                continue
            found[key].append(one)
            context.say(f"  {LABELS[way]}, batch {batch}, workers {workers}: {one.value['samples_per_s']:,.0f}/s")
    return {key: found.get(key) or failed[key] for key in ways}


def _rate(runs: dict[Key, list[spawn.Result] | str], key: Key, name: str = "samples_per_s") -> float | None:
    found = runs.get(key)
    if not found or isinstance(found, str) or name not in found[0].value:
        return None
    return median([float(one.value[name]) for one in found])


def _best_per_sample(runs: dict[Key, list[spawn.Result] | str], batch: int) -> float | None:
    """The quicker of the two slow ways, so that no ratio is flattered."""
    rates = [rate for way in SLOW_WAYS if (rate := _rate(runs, (way, batch, 0)))]
    return max(rates) if rates else None


def rows(runs: dict[Key, list[spawn.Result] | str]) -> list[dict[str, Any]]:
    """For a table of :data:`COLUMNS`."""
    made = []
    for key, found in runs.items():
        way, batch, workers = key
        facts: dict[str, Any] = {"key": way, "label": LABELS[way], "batch": batch, "workers": workers}
        if isinstance(found, str):
            made.append(facts | {"why": found})
            continue
        rate = _rate(runs, key) or 0.0
        flow = rate * float(found[0].value["sample_nbytes"])
        rates = [float(one.value["samples_per_s"]) for one in found]
        made.append(
            facts
            | {
                "samples_per_s": rate,
                "all": rates,
                "spread": spread(rates),
                "us": 1e6 / rate,
                "bytes_per_s": flow,
                "times_per_sample": ratio(rate, _best_per_sample(runs, batch)),
                **{f"of_copy_{kind}": ratio(flow, _rate(runs, key, f"copy_{kind}_bytes_per_s")) for kind in COPIES},
                **{f"copy_{kind}_bytes_per_s": _rate(runs, key, f"copy_{kind}_bytes_per_s") for kind in COPIES},
                "anonymous": max(one.peak.anonymous for one in found),
            }
        )
    return made


def targets(name: str, batches: tuple[int, ...], runs: dict[Key, list[spawn.Result] | str]) -> list[Target]:
    """Of the fast ways, against per-sample access and against the copy."""
    made = []
    for batch in batches:
        for way in FAST_WAYS:
            key = (way, batch, 0)
            what = f"{name}: {LABELS[way]}, batch {batch}"
            mine = _rate(runs, key)
            made.append(target(what, "per sample, default collation", mine, _best_per_sample(runs, batch), 25.0))
            found = runs.get(key)
            flow = (
                mine * float(found[0].value["sample_nbytes"]) if mine and found and not isinstance(found, str) else None
            )
            for kind, words in (("ram", "RAM to RAM"), ("fresh", "RAM to a new batch")):
                base = _rate(runs, key, f"copy_{kind}_bytes_per_s")
                least = RAM_TARGETS.get((way, batch), 0.7) if kind == "ram" else 0.7
                made.append(target(what, f"`copy_` of as many bytes, {words}", flow, base, least))
        made += _worker_targets(name, batch, runs)
    return made


def _worker_targets(name: str, batch: int, runs: dict[Key, list[spawn.Result] | str]) -> list[Target]:
    """Of the most workers: against none, and of a plain DataLoader against one over a per-sample dataset."""
    count = max((workers for way, size, workers in runs if way == "create_loader" and size == batch), default=0)
    if not count:
        return []
    ours, plain, slow = (_rate(runs, (way, batch, count)) for way in ("create_loader", *reversed(WORKER_WAYS)))
    made = [
        target(
            f"{name}: {LABELS['dataloader']}, batch {batch}, {count} workers",
            f"{LABELS['plain-per-sample']}, {count} workers",
            plain,
            slow,
            5.0,
        )
    ]
    none = _rate(runs, ("create_loader", batch, 0))
    what = f"{name}: {LABELS['create_loader']}, batch {batch}, {count} workers"
    return [target(what, "the same without workers", ours, none, 0.5), *made]
