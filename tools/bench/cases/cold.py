"""Random rows of a file three times the memory: this library, its peers, and the disk itself."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tools.bench import disk, spawn
from tools.bench.readers.registry import MAIN as OURS, READERS, chosen
from tools.bench.results import CaseResult, Column, Table, Target, target
from tools.bench.stats import median, spread

if TYPE_CHECKING:
    from pathlib import Path

    from tools.bench.context import Context
    from tools.bench.readers.base import Reader

__all__ = ["COLUMNS", "NAME", "TITLE", "Run", "measure_group", "row", "run"]

NAME = "cold"
TITLE = "Random rows, cold, memory capped at a third of the data"
OWN, FIO = "own probe, random 4 KiB, depth 32", "fio, random 4 KiB, depth 32"
MAPS = ("torch", "numpy", "safetensors")
COLUMNS = (
    Column("label", "reader"),
    Column("read_ahead", "read-ahead"),
    Column("batch", "batch", "int"),
    Column("rows_per_s", "rows/s", "rate"),
    Column("spread", "±", "percent"),
    Column("of_disk", "of the disk's limit", "ratio"),
    Column("disk_reads_per_row", "disk reads a row", "ratio"),
    Column("disk_bytes_per_row", "bytes read a row", "bytes"),
    Column("open_ms", "open", "ms"),
    Column("anonymous", "peak anonymous", "bytes"),
    Column("file", "peak mapped", "bytes"),
)


Probes = dict[str, list[float]]


@dataclass
class Run:
    """What one combination of reader, read-ahead and batch size has shown so far."""

    results: list[spawn.Result] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    failed: str = ""

    @property
    def rates(self) -> list[float]:
        """Rows a second of each run."""
        return [float(result.value["rows_per_s"]) for result in self.results]

    def of_disk(self) -> float | None:
        """Median of each run's rate over what the disk gave just before it, so that a drifting disk cancels out."""
        return (
            median([rate / limit for rate, limit in zip(self.rates, self.limits, strict=True)]) if self.rates else None
        )

    def rate_beside(self, other: Run) -> float | None:
        """Median of the runs in the groups that the other ran in."""
        rates = [rate for rate, group in zip(self.rates, self.groups, strict=True) if group in other.groups]
        return median(rates) if rates else None

    def median_of(self, key: str) -> float | None:
        """Median of something that each run found out."""
        values = [float(result.value[key]) for result in self.results if key in result.value]
        return median(values) if values else None


def run(context: Context) -> CaseResult:
    """Measure group by group: as many files as the disk budget holds, the readers of a group taking turns."""
    result = CaseResult(NAME, TITLE)
    readers = chosen(context.settings.readers)
    runs: dict[tuple[str, int, int], Run] = defaultdict(Run)
    probes: Probes = defaultdict(list)
    settings = context.read_ahead_settings(result)
    for number, group in enumerate(_groups(context, readers)):
        keep = [reader.asset for reader in group]
        paths = {name: context.assets.ensure(name, keep) for name in sorted(keep, key=lambda name: name != "rows.pt")}
        for kib in settings:
            with context.read_ahead(kib):
                measure_group(context, number, group, paths, kib or 0, runs, probes, result)
    probe_table = _limits(context, probes)
    rows = [row(key, found) for key, found in sorted(runs.items(), key=_order)]
    rows += [
        {"label": reader.label, "key": reader.key, "why": reader.missing()}
        for reader in READERS.values()
        if reader.missing()
    ]
    result.tables = [probe_table, Table("Readers", COLUMNS, rows)]
    result.targets = _targets(context, runs, [kib or 0 for kib in settings])
    result.notes += _notes(context)
    return result


def _order(item: tuple[tuple[str, int, int], Run]) -> tuple[int, int, int]:
    key, kib, batch = item[0]
    return -kib, batch, list(READERS).index(key)


def _groups(context: Context, readers: list[type[Reader]]) -> list[list[type[Reader]]]:
    """Readers whose files fit the disk together, this library's among them every time, as the yardstick."""
    settings = context.settings
    held = max(int(settings.disk_budget // settings.rows_nbytes), 2)
    ours = READERS[OURS]
    files = list(dict.fromkeys(reader.asset for reader in readers if reader.asset != ours.asset))
    # A .pt file needs room twice while it is made, so it is made first, beside the fewest others.
    files.sort(key=lambda name: name != "rows.pt")
    groups = []
    for start in range(0, len(files), held - 1):
        here = {ours.asset, *files[start : start + held - 1]}
        fresh = here if start == 0 else here - {ours.asset}
        groups.append([reader for reader in readers if reader.asset in fresh or reader is ours])
    return groups or [[ours]]


def measure_group(
    context: Context,
    number: int,
    group: list[type[Reader]],
    paths: dict[str, Path],
    kib: int,
    runs: dict[tuple[str, int, int], Run],
    probes: Probes,
    result: CaseResult,
) -> None:
    """Readers of files that fit the disk together, taking turns; this library's main reader's file is among them."""
    settings = context.settings
    for batch in settings.batches:
        wanted = _expected(context, batch)
        for repeat in range(settings.repeats):
            limit = _probe(context, paths[READERS[OURS].asset], repeat, probes)
            for reader in group:
                state = runs[reader.key, kib, batch]
                slower = runs.get((reader.key, kib, settings.batches[0]))
                if state.failed or _too_slow(state, slower, batch, settings.seconds):
                    continue
                if _measure(context, reader, str(paths[reader.asset]), kib, batch, state, wanted, result):
                    state.limits.append(limit)
                    state.groups.append(number)


def _too_slow(state: Run, first: Run | None, batch: int, seconds: float) -> bool:
    """Whether a single batch would take longer than the bound: that is said instead of waited for."""
    if first is None or first is state or not first.rates or median(first.rates) * seconds > batch:
        return False
    state.failed = "one batch takes longer than the bound on a run"
    return True


def _expected(context: Context, batch: int) -> list[int]:
    s = context.settings
    count = min(s.max_rows, s.rows // 2)
    facts = {"rows": s.rows, "dim": s.dim, "seed": s.seed, "batch": batch, "count": count}
    return list(spawn.call("tools.bench.measure_rows:sums", **facts).value["sums"])


def _measure(
    context: Context,
    reader: type[Reader],
    path: str,
    kib: int,
    batch: int,
    state: Run,
    wanted: list[int],
    result: CaseResult,
) -> bool:
    """One run in a child; whether it gave a figure."""
    s = context.settings
    with context.cap(s.cap, result) as cap:
        found = context.try_call(
            reader.label,
            "tools.bench.measure_rows:cold",
            reader=reader.key,
            path=path,
            rows=s.rows,
            dim=s.dim,
            batch=batch,
            count=min(s.max_rows, s.rows // 2),
            seconds=s.seconds,
            seed=s.seed,
            lookahead=s.lookahead,
            cap=cap,
        )
    if isinstance(found, str):
        state.failed = found
        return False
    if found.value["sums"] != wanted[: len(found.value["sums"])]:
        state.failed = "wrong values: its sums are not those of the rows asked for"
        return False
    state.results.append(found)
    context.say(f"  {reader.label}, read-ahead {kib}, batch {batch}: {found.value['rows_per_s']:,.0f} rows/s")
    return True


def _probe(context: Context, path: Path, repeat: int, probes: Probes) -> float:
    """The disk itself takes its turn among the readers: its rate drifts like theirs. The better of both probes."""
    probes[OWN].append(context.disk_random(path, repeat))
    if context.settings.fio and (rate := disk.fio_rate(path, min(context.settings.seconds, 2.0), random=True)):
        probes[FIO].append(rate.reads_per_s)
    context.say("  " + ", ".join(f"{name}: {rates[-1]:,.0f} reads/s" for name, rates in probes.items()))
    return max(rates[-1] for rates in probes.values())


def _limits(context: Context, probes: Probes) -> Table:
    path = context.assets.ensure(READERS[OURS].asset)
    rows: list[dict[str, Any]] = [
        {"what": name, "reads_per_s": median(rates), "bytes_per_s": median(rates) * 4096, "all": rates}
        for name, rates in probes.items()
    ]
    alone = disk.random_rate(path, 1.0, depth=1)[0]
    rows += [
        {
            "what": "own probe, random 4 KiB, depth 1",
            "reads_per_s": alone.reads_per_s,
            "bytes_per_s": alone.bytes_per_s,
        },
        {"what": "own probe, sequential 1 MiB", "bytes_per_s": context.disk_sequential(path)},
    ]
    fio = disk.fio_rate(path, context.settings.seconds, random=False) if context.settings.fio else None
    rows.append({"what": "fio, sequential 1 MiB", **({"bytes_per_s": fio.bytes_per_s} if fio else {"why": "no fio"})})
    columns = (
        Column("what", "the disk itself"),
        Column("reads_per_s", "reads/s", "rate"),
        Column("bytes_per_s", "bytes/s", "bytes_per_s"),
    )
    return Table("The disk's own limit", columns, rows)


def row(key: tuple[str, int, int], state: Run) -> dict[str, Any]:
    """A row of the table, from a reader, a read-ahead and a batch size."""
    name, kib, batch = key
    reader = READERS[name]
    facts: dict[str, Any] = {
        "key": name,
        "label": reader.label,
        "how": reader.how,
        "version": reader.version(),
        "read_ahead": f"{kib} KiB" if kib else "as it is",
        "read_ahead_kib": kib,
        "batch": batch,
    }
    if not state.results:
        return facts | {"why": state.failed or "not measured"}
    rate = median(state.rates)
    return facts | {
        "rows_per_s": rate,
        "all": state.rates,
        "spread": spread(state.rates),
        "of_disk": state.of_disk(),
        "limits": state.limits,
        "disk_reads_per_row": state.median_of("disk_reads_per_row"),
        "disk_bytes_per_row": state.median_of("disk_bytes_per_row"),
        "open_ms": (state.median_of("open_s") or 0.0) * 1e3,
        "rows": [result.value["rows"] for result in state.results],
        "evicted_by": state.results[0].value["evicted_by"],
        "anonymous": max(result.grown for result in state.results),
        "file": max(result.peak.file for result in state.results),
    }


def _targets(context: Context, runs: dict[tuple[str, int, int], Run], settings: list[int]) -> list[Target]:
    def against(peer: str, kib: int, batch: int, wanted: float) -> Target:
        ours, theirs = (runs.get((key, kib, batch), Run()) for key in (OURS, peer))
        what = f"cold rows, global order, batch {batch}, read-ahead {kib} KiB"
        theirs_rate = median(theirs.rates) if theirs.rates else None
        return target(what, READERS[peer].label, ours.rate_beside(theirs), theirs_rate, wanted)

    targets = []
    for batch in context.settings.batches:
        for kib in settings:
            what = f"cold rows, global order, batch {batch}, read-ahead {kib} KiB"
            of_disk = runs.get((OURS, kib, batch), Run()).of_disk()
            targets.append(target(what, "the disk's 4 KiB reads at depth 32", of_disk, 1.0, 0.9))
            targets.append(against("lance", kib, batch, 2.0))
    batch = context.settings.batches[0]
    return targets + [against(peer, kib, batch, 10.0) for kib in reversed(settings) for peer in MAPS]


def _notes(context: Context) -> list[str]:
    s = context.settings
    return [
        (
            f"{s.rows:,} float32 rows of {s.dim} ({s.rows_nbytes / 1e9:.2f} GB); memory limit {s.cap / 1e9:.2f} GB; each "
            "reader in a process of its own, evicted and verified cold before; equal batches of a global shuffle, "
            "every batch summed inside the timed part and the sums compared with the generator's; median of "
            f"{s.repeats} interleaved repeats of at most {s.seconds:g} s."
        ),
        (
            "The disk's limit is what the better of the own probe and fio saw just before each run; ratios to peers are "
            "taken within the group of runs that they shared. A row of 1 536 bytes lies across two pages "
            "a quarter of the time, and some pages are asked for twice, so disk reads a row may be above or below 1."
        ),
    ]
