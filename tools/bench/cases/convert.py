"""Conversion: against ``cp`` of the same bytes, against h5py's own gzip, and the memory that it takes at any size."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tools.bench.assets import ReopenSpec
from tools.bench.jasper_data import Shape
from tools.bench.results import CaseResult, Column, Table, target
from tools.bench.timings import COLUMNS, Timings, Way

if TYPE_CHECKING:
    from pathlib import Path

    from tools.bench.context import Context

__all__ = ["NAME", "TITLE", "run"]

NAME = "convert"
TITLE = "Conversion"
CALL = "tools.bench.measure_files"
OUT = "converted"
OWN_MEMORY = 256 << 20
GZIP_PAIRS = 20_000
LARGEST_WRITTEN_GB = 8
SIZED = (*COLUMNS, Column("written", "size written", "bytes"))


def run(context: Context) -> CaseResult:
    """Three questions, one table each."""
    result = CaseResult(NAME, TITLE)
    try:
        _against_cp(context, result)
        _against_h5py(context, result)
        _memory(context, result)
    finally:
        context.assets.remove(OUT)
    result.notes.append(
        "Every way ends with its bytes on the disk: the conversion by its own fsync, `cp` and h5py by one after them. "
        "The conversion also reads back what it wrote and compares checksums."
    )
    return result


def _against_cp(context: Context, result: CaseResult) -> None:
    src, dst = str(context.assets.ensure("jasper.pt")), str(context.assets.path(OUT))
    for cold in (False, True):
        state = "cold" if cold else "warm"
        same = {"src": src, "dst": dst, "cold": cold}
        ways = {
            "cp": Way("`cp -r` and fsync", f"{CALL}:copy", same),
            "safetensors": Way("PT → safetensors", f"{CALL}:convert", same | {"layout": "safetensors"}),
            "npy": Way("PT → npy", f"{CALL}:convert", same | {"layout": "npy"}),
            "hdf5": Way("PT → HDF5, uncompressed", f"{CALL}:convert", same | {"layout": "hdf5"}),
        }
        timings = Timings(ways).measure(context)
        result.tables.append(Table(f"Against `cp`, source {state}", SIZED, timings.rows()))
        what = f"PT → safetensors, source {state}"
        result.targets.append(
            target(what, "`cp` of the same bytes", timings.rate("safetensors"), timings.rate("cp"), 0.8)
        )


def _against_h5py(context: Context, result: CaseResult) -> None:
    settings = context.settings
    sources: dict[str, Path] = {}
    if settings.real_dir:
        sources[settings.real_dir.name] = settings.real_dir
    pairs = min(GZIP_PAIRS, settings.pairs)
    recipe = context.assets.dataset("pt", Shape(pairs, 1, settings.dim, settings.n_neg, settings.seed))
    sources[f"generated, {pairs:,} pairs"] = context.assets.ensure("jasper-small.pt", recipe=recipe)
    for name, src in sources.items():
        same = {"src": str(src), "dst": str(context.assets.path(OUT))}
        ways = {
            "h5py": Way('`create_dataset(compression="gzip")`', f"{CALL}:h5py_gzip", same),
            "ours": Way("PT → HDF5 gzip", f"{CALL}:convert", same | {"layout": "hdf5", "compression": "gzip"}),
        }
        timings = Timings(ways).measure(context)
        result.tables.append(Table(f"HDF5 with gzip: {name}", SIZED, timings.rows()))
        what = f"PT → HDF5 gzip, {name}"
        against = '`create_dataset(compression="gzip")`'
        result.targets.append(target(what, against, timings.rate("ours"), timings.rate("h5py"), 5.0))
        sizes = [float(size) if (size := timings.value(key, "written")) else None for key in ways]
        result.targets.append(target(f"{what}: size", against, sizes[1], sizes[0], 1.0, at_most=True))


def _memory(context: Context, result: CaseResult) -> None:
    """A single tensor in one file, the hardest shape for a bounded conversion, at several sizes."""
    settings = context.settings
    columns = (
        Column("label", "source"),
        Column("seconds", "time", "s"),
        Column("bytes_per_s", "bytes/s", "bytes_per_s"),
        Column("anonymous", "peak anonymous added", "bytes"),
    )
    rows = []
    for size in settings.convert_gb:
        count = int(size * 1e9 / settings.row_nbytes)
        name = f"convert-{size:g}.pt"
        # Twice a size as this need not lie on the disk to know what memory the way from one to the other takes.
        hole = size > LARGEST_WRITTEN_GB
        layout = "zeros.pt" if hole else "rows.pt"
        arguments = {"layout": layout, "rows": count, "dim": settings.dim, "seed": settings.seed}
        recipe = ReopenSpec("tools.bench.row_files:write", arguments, int(size * (1e9 if hole else 2e9)))
        src = context.assets.ensure(name, recipe=recipe)
        way = Way(
            f"{size:g} GB, zeros in a hole" if hole else f"{size:g} GB",
            f"{CALL}:convert",
            {"src": str(src), "dst": str(context.assets.path(OUT))},
        )
        way = replace(way, arguments=way.arguments | {"layout": "safetensors", "cold": True})
        timings = Timings({"ours": way}).measure(context, repeats=1)
        rows += timings.rows()
        context.assets.remove(OUT)
        context.assets.remove(name)
        grown = [found.grown for found in timings.found["ours"]]
        what = f"memory of PT → safetensors, one tensor of {size:g} GB"
        base = float(OWN_MEMORY)
        result.targets.append(target(what, "256 MiB", float(grown[0]) if grown else None, base, 1.0, at_most=True))
    result.tables.append(Table("Memory of a conversion, beyond the imported libraries", columns, rows))
