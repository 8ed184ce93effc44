"""``jasper-store bench``: how fast a dataset is served on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from jasper_store.cli.console import print_json, progress, results, table
from jasper_store.cli.options import Directory, FormatOption, Json, MemoryLimit
from jasper_store.memory.sizes import format_bytes

if TYPE_CHECKING:
    from jasper_store.bench.disk import DiskRate
    from jasper_store.bench.run import BenchReport

__all__ = ["bench"]


def bench(
    path: Directory,
    storage_format: FormatOption = "auto",
    batch_sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--batch-size", min=1, help="Batch size of the loader; may be repeated. By default 32, 256, 1024."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="About how long all of it may take.")] = 25.0,
    *,
    cold: Annotated[
        bool,
        typer.Option("--cold/--no-cold", help="Also measure from the disk: the page cache drops this dataset's files."),
    ] = True,
    memory_limit: MemoryLimit = None,
    json: Json = False,
) -> None:
    """Measure how fast this dataset is served on this machine, cold and warm, against torch.load and the disk.

    Takes about half a minute. Nothing is written; with --cold the dataset's files leave the page cache.
    With --memory-limit it also shows the speed where only part of the data may be preloaded.

    Examples:
      jasper-store bench data/
      jasper-store bench data/ --memory-limit 8GiB
      jasper-store bench data/ --no-cold --seconds 5 --batch-size 256 --json
    """
    from jasper_store.bench.run import bench as measure

    with progress() as bars:
        task = bars.add_task("measuring", total=None)
        report = measure(
            path,
            storage_format=storage_format,
            batch_sizes=tuple(batch_sizes or (32, 256, 1024)),
            seconds=seconds,
            cold=cold,
            memory_limit=memory_limit,
            step=lambda what: bars.update(task, description=f"measuring {what}"),
        )
    if json:
        print_json(report.to_dict())
    else:
        _show(report, results())


def _show(report: BenchReport, out: Console) -> None:
    cached = "" if report.cached_before is None else f"; {report.cached_before:.0%} was in the page cache"
    out.print(f"{report.path}: {report.format}, {format_bytes(report.nbytes)}{cached}", markup=False, soft_wrap=True)
    out.print(f"opened in {report.open_seconds * 1e3:.1f} ms, mapped\n")
    columns = ("tensor", "read by", "row", "rows/s warm", "rows/s cold")
    cells = [
        (escape(rate.name), rate.placement, format_bytes(rate.row_nbytes), _number(rate.warm), _number(rate.cold))
        for rate in report.tensors
    ]
    out.print(table("Random rows, 256 at a time", columns, cells, right=columns[2:]))
    if report.loader:
        _show_loader(report, out)
    _show_peers(report, out)
    for note in report.notes:
        out.print(f"note: {note}", markup=False, soft_wrap=True)


def _show_loader(report: BenchReport, out: Console) -> None:
    sizes = list(dict.fromkeys(rate.batch_size for rate in report.loader))
    ways = list(dict.fromkeys((rate.placement, rate.state) for rate in report.loader))
    found = {(rate.placement, rate.state, rate.batch_size): rate for rate in report.loader}
    shares = ", ".join(f"{format_bytes(size)} {place}" for place, size in report.planned.items() if size)
    names = {"planned": f"as planned ({shares})"}
    cells = [
        (
            f"{names.get(placement, placement)}, {state}",
            *(_samples(found.get((placement, state, size))) for size in sizes),
        )
        for placement, state in ways
    ]
    columns = ("data", *(f"batch {size}" for size in sizes))
    out.print(table("Samples per second of create_loader, in this process", columns, cells, right=columns[1:]))


def _samples(rate: object) -> str:
    return _number(getattr(rate, "samples_per_second", None))


def _show_peers(report: BenchReport, out: Console) -> None:
    cells = [(f"torch.load of all files, {state}", f"{spent:.2f} s") for state, spent in report.torch_load.items()]
    cells += [(_disk(rate), _speed(rate)) for rate in report.disk]
    if cells:
        out.print(table("For comparison", ("what", "found"), cells, right=("found",)))


def _disk(rate: DiskRate) -> str:
    how = "past the page cache" if rate.direct else "dropped behind"
    return f"the disk, {rate.access} reads of {format_bytes(rate.block)}, {rate.depth} in flight, {how}"


def _speed(rate: DiskRate) -> str:
    return f"{_number(rate.reads_per_second)} reads/s, {format_bytes(int(rate.bytes_per_second))}/s"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
