"""Data on a CUDA device, or on its way there: ``python -m tools.bench.gpu``.

Needs this checkout and torch, numpy, h5py, safetensors, psutil; prints JSON that ``python -m tools.bench render``
takes beside the other cases. Without CUDA it says so and succeeds. A step on device-resident data moves no data and
waits for nothing, so it is judged by CUDA events against the bare gathers of the same rows, and by the clock against
per-sample access on the host.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import zlib
from datetime import datetime, timezone
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from tools.bench import results
from tools.bench.machine import describe
from tools.bench.results import CaseResult, Column, Table, target

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main", "measure", "stand_ins"]

NAME, TITLE = "gpu", "On a GPU"
BATCHES = (32, 256, 2048)
JUDGED = 256
REPEATS = 5

LABELS = {
    "bare": "the bare gathers, rows known beforehand",
    "resident": '`create_loader(device="cuda")`',
    "to_device": "`js.to_device(create_loader(...))`, data in host memory",
    "per_sample": "a plain dataset on the host, per sample, then the copy",
}
STEP_COLUMNS = (
    Column("label", "way"),
    Column("batch", "batch", "int"),
    Column("events", "a batch, CUDA events", "ms"),
    Column("wall", "a batch, clock", "ms"),
    Column("samples_per_s", "samples/s", "rate"),
    Column("times_per_sample", "times per sample", "ratio"),
)
TRAINING = {
    "alone": "the model alone",
    "resident": 'batches of `create_loader(device="cuda")`',
    "to_device": "batches of `js.to_device(create_loader(...))`",
    "copied": "batches of `create_loader`, `.to(device)` in the step",
}
TRAINING_COLUMNS = (
    Column("label", "way"),
    Column("batch", "batch", "int"),
    Column("ms", "a step", "ms"),
    Column("added", "added to the model", "ms"),
)
LOAD_COLUMNS = (
    Column("label", "way"),
    Column("state", "files"),
    Column("seconds", "time", "s"),
    Column("bytes_per_s", "bytes/s", "bytes_per_s"),
    Column("host", "host memory added", "bytes"),
)


def main(argv: list[str] | None = None) -> int:
    """Print one JSON document; status 0 also where there is no CUDA."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.gpu", description=__doc__)
    parser.add_argument("--pairs", type=int, default=200_000, help="of the generated dataset")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=BATCHES)
    parser.add_argument("--real-dir", type=Path, help="a real JASPER dataset in .pt files, measured beside it")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        result = CaseResult(NAME, TITLE, "skipped", "torch sees no CUDA device here; nothing was measured")
    else:
        with tempfile.TemporaryDirectory(prefix="jasper-bench-") as folder:
            result = measure(
                Path(folder),
                pairs=arguments.pairs,
                dim=arguments.dim,
                batches=arguments.batches,
                real=arguments.real_dir,
                repeats=arguments.repeats,
            )
    document = {
        "schema": results.SCHEMA,
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe(Path(tempfile.gettempdir())),
        "settings": {key: getattr(arguments, key) for key in ("pairs", "dim", "batches", "repeats")},
        "cases": {NAME: result.to_dict()},
    }
    print(json.dumps(results.plain(document), indent=1))
    if arguments.out:
        results.save(document, arguments.out)
    return 0


def stand_ins() -> list[str]:
    """Make do without xxhash and isal on a bare machine; the names of those that were missing.

    The library hashes paths and checksums with one and unpacks HDF5 with the other; this program only reads
    files of its own making, for which the standard library's hash and zlib do.
    """
    missing = []
    if not find_spec("xxhash"):
        hashes = ModuleType("xxhash")
        for name, size in (("xxh3_64", 8), ("xxh3_128", 16)):
            setattr(hashes, name, partial(hashlib.blake2b, digest_size=size))
        sys.modules["xxhash"] = hashes
        missing.append("xxhash")
    if not find_spec("isal"):
        package = ModuleType("isal")
        package.isal_zlib = zlib  # type: ignore[attr-defined]
        sys.modules |= {"isal": package, "isal.isal_zlib": zlib}
        missing.append("isal")
    return missing


def measure(
    folder: Path, *, pairs: int, dim: int, batches: Sequence[int], real: Path | None = None, repeats: int = REPEATS
) -> CaseResult:
    """Write a dataset, load it onto the device, and time steps."""
    missing = stand_ins()
    from tools.bench import measure_gpu
    from tools.bench.jasper_data import write

    result, written = CaseResult(NAME, TITLE), {}
    for layout in ("pt", "safetensors"):
        written[layout] = folder / layout
        write(layout, str(written[layout]), pairs=pairs, pairs_per_row=1, dim=dim, n_neg=5, seed=20)
    facts = measure_gpu.device_facts()
    result.notes.append(
        f"{facts['name']}, {facts['memory'] / 1e9:.0f} GB, which copies {facts['copy_bytes_per_s'] / 1e12:.2f} TB/s within"
        f" itself (bytes read and written); {facts['cores']} cores, torch {facts['torch']}."
    )
    if missing:
        result.notes.append(f"Not installed there, and stood in for: {', '.join(missing)}.")
    waits: list[str] = []
    datasets = ({real.name: real} if real else {}) | {f"generated, {pairs:,} pairs": written["safetensors"]}
    for name, path in datasets.items():
        waits += _steps(result, name, path, batches, repeats)
    result.notes.append(f"Steps that wait for the device, by PyTorch's own check: {'; '.join(waits) or 'none'}.")
    trained = measure_gpu.training(written["safetensors"], JUDGED, repeats)
    result.tables.append(
        Table(
            "A trainer's step, clock",
            TRAINING_COLUMNS,
            [
                {"label": label, "batch": JUDGED, "ms": trained[key], "added": trained[key] - trained["alone"]}
                for key, label in TRAINING.items()
            ],
        )
    )
    loaded, limit = measure_gpu.preloads(written, repeats)
    result.tables.append(Table("Loading onto the device", LOAD_COLUMNS, loaded))
    result.notes.append(
        f"The disk's sequential rate there, own probe: {limit / 1e9:.2f} GB/s. Host memory is what a load adds to what "
        "the process held before; pinned memory, once taken, stays with PyTorch (for `js.open` a ring of three buffers "
        "of 32 MiB), and is added by the first load alone, which is not shown."
    )
    return result


def _steps(result: CaseResult, name: str, path: Path, batches: Sequence[int], repeats: int) -> list[str]:
    """Measure a dataset; returns which steps wait for the device."""
    from tools.bench import measure_gpu

    rows, waits = [], []
    for batch in batches:
        facts = measure_gpu.rates(path, batch, repeats)
        if not facts["on_device"]:
            raise RuntimeError(f"{name}: a tensor of the batch is not on the device")
        ways = facts["ways"]
        for key, label in LABELS.items():
            wall = ways[key]["wall"]
            rows.append(
                ways[key]
                | {"key": key, "label": label, "batch": batch, "samples_per_s": batch / wall * 1e3}
                | {"times_per_sample": ways["per_sample"]["wall"] / wall, "sample_nbytes": facts["sample_nbytes"]}
            )
        if batch == JUDGED:
            what, step, bare = f"{name}: a batch of {batch} on the device", ways["resident"], ways["bare"]
            result.targets += [
                target(what, "the bare gathers, CUDA events", step["events"], bare["events"], 1.5, at_most=True),
                target(what, "per sample, clock", ways["per_sample"]["wall"], step["wall"], 50.0),
            ]
        if facts["waits"]:
            waits.append(f"{name}, batch {batch}: {facts['waits']}")
    result.tables.append(Table(name, STEP_COLUMNS, rows))
    return waits


if __name__ == "__main__":
    sys.exit(main())
