"""Device-resident batches on a CUDA machine: ``python -m tools.bench.gpu``.

Needs this checkout and torch, numpy, h5py, safetensors, psutil; prints JSON. Without CUDA it
says so and succeeds. A step on device-resident data moves no data and waits for nothing, so it is judged by CUDA
events against the bare gathers of the same rows, and by the clock against per-sample access on the host.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
import zlib
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["main", "measure", "stand_ins"]

BATCH = 256
WARM_UP, STEPS = 50, 300


def main(argv: list[str] | None = None) -> int:
    """Print one JSON object; status 0 also where there is no CUDA."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.gpu", description=__doc__)
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        facts: dict[str, Any] = {"cuda": False, "why": "torch sees no CUDA device here; nothing was measured"}
    else:
        with tempfile.TemporaryDirectory(prefix="jasper-bench-") as folder:
            facts = measure(Path(folder), arguments.pairs, arguments.dim, arguments.batch)
    text = json.dumps(facts, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0


def stand_ins() -> list[str]:
    """Make do without xxhash and isal on a bare machine; the names of those that were missing.

    The library hashes paths and checksums with one and unpacks HDF5 with the other; this program only reads
    safetensors files of its own making, for which the standard library's hash and zlib do.
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


def measure(folder: Path, pairs: int, dim: int, batch: int) -> dict[str, Any]:
    """Write a dataset, load it onto the device, and time steps."""
    missing = stand_ins()
    from tools.bench.jasper_data import write
    from tools.bench.library import library

    js = library()

    path = folder / "dataset"
    nbytes = write("safetensors", str(path), pairs=pairs, pairs_per_row=1, dim=dim, n_neg=5, seed=20)["nbytes"]
    torch.cuda.synchronize()  # the device's own start-up is nobody's preloading
    begin = time.perf_counter()
    loader = js.create_loader(path, "train", batch, device="cuda")
    torch.cuda.synchronize()
    preload_s = time.perf_counter() - begin
    dataset = loader.dataset_obj
    batches = _endless(loader)
    first = next(batches)
    facts: dict[str, Any] = {
        "cuda": True,
        "device": torch.cuda.get_device_name(),
        "stood_in_for": missing,
        "torch": torch.__version__,
        "pairs": pairs,
        "dim": dim,
        "batch": batch,
        "nbytes": nbytes,
        "preload_s": preload_s,
        "preload_bytes_per_s": nbytes / preload_s,
        "on_device": all(value.is_cuda for value in first.values()),
    }
    bare = _bare_gathers(dataset.store, len(dataset), batch)
    step_ms, bare_ms = _events(lambda: next(batches)), _events(bare)
    steps = [_events(lambda: next(batches)), _events(bare), _events(lambda: next(batches)), _events(bare)]
    step_ms, bare_ms = statistics.median([step_ms, *steps[::2]]), statistics.median([bare_ms, *steps[1::2]])
    wall_ms = _wall(lambda: next(batches))
    per_sample_s = _per_sample(path, batch)
    facts |= {
        "step_ms_events": step_ms,
        "bare_gathers_ms_events": bare_ms,
        "step_ms_wall": wall_ms,
        "per_sample_ms": per_sample_s * 1e3,
        "targets": [
            {"what": "step over bare gathers, CUDA events", "ratio": step_ms / bare_ms, "at_most": 1.5},
            {"what": "per-sample way over step, wall", "ratio": per_sample_s * 1e3 / wall_ms, "at_least": 50},
        ],
        "syncs": _syncs(batches),
    }
    return facts


def _endless(loader: Any) -> Iterator[dict[str, torch.Tensor]]:
    import jasper_store as js

    epoch = 0
    while True:
        yield from loader
        epoch = (epoch + 1) % 10
        js.set_epoch(loader, epoch)


def _bare_gathers(store: Any, length: int, batch: int) -> Callable[[], object]:
    """What any device-resident batch must do: one gather for each tensor of a batch, rows known beforehand."""
    data = {name: store[name].tensor() for name in store if not name.startswith("pair_keyword_ids")}
    positions = torch.randint(length, (batch,), device="cuda")
    pairs = data["train_idx"][positions]
    questions, sources = data["pair_index"][pairs].unbind(1)
    negatives = data["hard_negatives"][pairs].reshape(-1)
    names = (
        "pair_cluster_id",
        "pair_relevance",
        "centroid_distances",
        "negative_tiers",
        "hard_negatives",
        "pair_index",
    )

    def gathers() -> object:
        return [
            data["train_idx"].index_select(0, positions),
            data["question_embs"].index_select(0, questions),
            data["source_embs"].index_select(0, sources),
            data["source_embs"].index_select(0, negatives),
            data["steering_centroid"].index_select(0, pairs),
            *(data[name].index_select(0, pairs) for name in names),
        ]

    return gathers


def _events(step: Callable[[], object]) -> float:
    """Milliseconds a step by CUDA events, many steps between two of them."""
    for _ in range(WARM_UP):
        step()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    for _ in range(STEPS):
        step()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / STEPS


def _wall(step: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / STEPS * 1e3


def _per_sample(path: Path, batch: int) -> float:
    """Seconds a batch of the way without batched access: a sample at a time, default collation, then the copy."""
    from torch.utils.data import DataLoader

    from tools.bench.plain_dataset import PlainDataset

    loader = iter(DataLoader(PlainDataset(path), batch_size=batch, shuffle=True, drop_last=True))
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        {key: value.to("cuda") for key, value in next(loader).items()}
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _syncs(batches: Iterator[dict[str, torch.Tensor]]) -> str:
    """Whether a step waits for the device: torch can be told to complain."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            next(batches)
    except RuntimeError as exc:
        return f"a step waits for the device: {str(exc).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


if __name__ == "__main__":
    sys.exit(main())
