"""What the program for CUDA machines times: steps over a dataset on the device or the host, and loading it.

Nothing here runs in a child: a device is started once, and what is timed is on the device or says where it is.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tools.bench import disk, pagecache
from tools.bench.library import library
from tools.bench.measure_loader import epochs
from tools.bench.plain_dataset import PlainDataset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["device_facts", "preloads", "rates", "training", "waits"]

WARM_UP, STEPS = 50, 300
STRANGE_STEPS = 8
MODEL_SIZE, MODEL_PRODUCTS = 4096, 4

Batch = dict[str, torch.Tensor]


class Clocks:
    """Milliseconds a step, by the device's events and by the host's clock, over many steps at a time."""

    def __init__(self, step: Callable[[], object], steps: int = STEPS) -> None:
        self._step = step
        self._steps = steps
        self.events: list[float] = []
        self.wall: list[float] = []
        for _ in range(min(WARM_UP, steps)):
            step()

    def run(self) -> None:
        """Once more."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        began = time.perf_counter()
        begin.record()
        for _ in range(self._steps):
            self._step()
        end.record()
        torch.cuda.synchronize()
        self.wall.append((time.perf_counter() - began) / self._steps * 1e3)
        self.events.append(float(begin.elapsed_time(end)) / self._steps)


def rates(path: Path, batch: int, repeats: int) -> dict[str, Any]:
    """A batch on the device: this library's, the bare gathers, host batches sent over, and per sample."""
    js = library()
    resident = js.create_loader(path, "train", batch, device="cuda")
    batches = _endless(js, resident)
    first = next(batches)
    host = js.create_loader(path, "train", batch, use_mmap=False)
    sent, plain = _endless(js, js.to_device(host, "cuda")), _per_sample(path, batch)
    clocks = {
        "bare": Clocks(_bare_gathers(resident.dataset_obj.store, len(resident.dataset_obj), batch)),
        "resident": Clocks(lambda: next(batches)),
        "to_device": Clocks(lambda: next(sent)),
        "per_sample": Clocks(lambda: next(plain), STRANGE_STEPS),
    }
    for _ in range(repeats):
        for clock in clocks.values():
            clock.run()
    found = {
        name: {"events_ms": clock.events, "wall_ms": clock.wall, "events": statistics.median(clock.events)}
        | {"wall": statistics.median(clock.wall)}
        for name, clock in clocks.items()
    }
    return {
        "ways": found,
        "on_device": all(value.is_cuda for value in first.values()),
        "sample_nbytes": sum(value.nbytes for value in first.values()) / batch,
        "waits": waits(js, resident),
    }


def training(path: Path, batch: int, repeats: int) -> dict[str, float]:
    """Milliseconds a step of a trainer whose model is some matrix products, by how its batches come."""
    js = library()
    weights = torch.randn(MODEL_SIZE, MODEL_SIZE, device="cuda", dtype=torch.bfloat16)

    def model(batch: Batch | None = None) -> torch.Tensor:
        out = weights if batch is None else weights + batch["negative_embs"].sum().to(weights.dtype)
        for _ in range(MODEL_PRODUCTS):
            out = out @ weights
        return out

    resident = _endless(js, js.create_loader(path, "train", batch, device="cuda"))
    host = js.create_loader(path, "train", batch, use_mmap=False)
    again = js.create_loader(path, "train", batch, use_mmap=False, pin_memory=False)
    sent, plain = _endless(js, js.to_device(host, "cuda")), _endless(js, again)
    clocks = {
        "alone": Clocks(model),
        "resident": Clocks(lambda: model(next(resident))),
        "to_device": Clocks(lambda: model(next(sent))),
        "copied": Clocks(lambda: model({key: value.to("cuda") for key, value in next(plain).items()})),
    }
    for _ in range(repeats):
        for clock in clocks.values():
            clock.run()
    return {name: statistics.median(clock.wall) for name, clock in clocks.items()}


def preloads(folders: dict[str, Path], repeats: int) -> tuple[list[dict[str, Any]], float]:
    """Seconds from files to the device, cold and warm, and the disk's own rate in sequence, bytes a second."""
    from safetensors.torch import load_file

    js = library()
    pt, st = folders["pt"], folders["safetensors"]
    probed = [disk.sequential_rate(st / "steering_residual.safetensors", 2.0)[0].bytes_per_s for _ in range(3)]

    def torch_load() -> object:
        loaded = [torch.load(item, weights_only=True) for item in sorted(pt.glob("*.pt"))]
        return [item.to("cuda") for item in loaded if isinstance(item, torch.Tensor)]

    def safetensors() -> object:
        return [load_file(item, device="cuda") for item in sorted(st.glob("*.safetensors"))]

    ways: dict[str, tuple[Path, Callable[[], object]]] = {
        "`torch.load`, then `.to(device)`, pt": (pt, torch_load),
        '`load_file(device="cuda")`, safetensors': (st, safetensors),
        '`js.open(device="cuda")`, pt': (pt, lambda: js.open(pt, device="cuda")),
        '`js.open(device="cuda")`, safetensors': (st, lambda: js.open(st, device="cuda")),
    }
    rows: list[dict[str, Any]] = []
    for cold in (False, True):
        for label, (path, load) in ways.items():
            nbytes = sum(item.stat().st_size for item in path.iterdir())
            times = [_timed(path, load, cold=cold) for _ in range(repeats)]
            rows.append(
                {
                    "label": label,
                    "state": "cold" if cold else "warm",
                    "seconds": statistics.median(one[0] for one in times),
                    "all": [one[0] for one in times],
                    "bytes_per_s": nbytes / statistics.median(one[0] for one in times),
                    "host": max(one[1] for one in times),
                }
            )
    return rows, statistics.median(probed)


def waits(js: Any, loader: Any) -> str:
    """Whether a step waits for the device, in torch's words; empty if not.

    The first step of an epoch may, once: it computes the order of the next million samples.
    """
    js.set_epoch(loader, 11)
    batches = iter(loader)
    next(batches)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        for _ in islice(batches, 12):
            pass
    except RuntimeError as exc:
        return str(exc).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def _timed(path: Path, load: Callable[[], object], *, cold: bool) -> tuple[float, int]:
    files = pagecache.files_under(path)
    if cold:
        pagecache.evict(files)
    else:
        pagecache.warm(files)
    _forget_peak()
    before = _status("VmRSS")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    kept = load()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    grown = _status("VmHWM") - before
    del kept
    torch.cuda.empty_cache()
    return seconds, grown


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def _endless(js: Any, loader: Any) -> Iterator[Batch]:
    return chain.from_iterable(epochs(js, loader, 0))


def _bare_gathers(store: Any, length: int, batch: int) -> Callable[[], object]:
    """What any device-resident batch must do: one gather for each tensor of a batch, rows known beforehand."""
    data = {name: store[name].tensor() for name in store if not name.startswith("pair_keyword_ids")}
    positions = torch.randint(length, (batch,), device="cuda")
    pairs = data["train_idx"][positions]
    questions, sources = (column.contiguous() for column in data["pair_index"][pairs].unbind(1))
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


def _per_sample(path: Path, batch: int) -> Iterator[Batch]:
    """The way without batched access: a sample at a time, default collation, then the copy."""
    from torch.utils.data import DataLoader

    loader = DataLoader(PlainDataset(path), batch_size=batch, shuffle=True, drop_last=True)
    while True:
        for found in loader:
            yield {key: value.to("cuda") for key, value in found.items()}


def device_facts() -> dict[str, Any]:
    """The device, and how fast it copies within itself: bytes read and written a second."""
    source = torch.rand(1 << 28, device="cuda")
    target = torch.empty_like(source)
    clock = Clocks(lambda: target.copy_(source), 20)
    clock.run()
    return {
        "name": torch.cuda.get_device_name(),
        "memory": torch.cuda.get_device_properties(0).total_memory,
        "copy_bytes_per_s": 2 * source.nbytes / (clock.events[0] / 1e3),
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
    }
