"""Other libraries that read packed samples: the same content as records, written once, read by their own loaders."""

from __future__ import annotations

import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.bench import block_device, pagecache
from tools.bench.cgroup import Cap

__all__ = ["PEERS", "Peer", "rate", "write"]

STEERING = ("steering_centroid", "steering_keyword_weighted", "steering_residual")
STEP = 512
CHUNK_NBYTES = 64 << 20
"""Bytes of a shard or chunk: near what both libraries choose by themselves."""

Record = dict[str, Any]


def _records(source: str) -> Iterator[Record]:
    """Samples of the training split, each with all steering rows, as packed samples have them."""
    import jasper_store as js

    dataset = js.JASPERSteeringDataset(source, "train")
    dataset.force_steering("none")
    for start in range(0, len(dataset), STEP):
        batch = dataset[list(range(start, min(start + STEP, len(dataset))))]
        rows = dataset.split_indices[start : start + STEP].long()
        batch |= {name: dataset.store[name].take(rows) for name in STEERING}
        del batch["steering"], batch["steering_variant"]
        for place in range(len(rows)):
            yield {name: values[place] for name, values in batch.items()}


# --- Mosaic Streaming -------------------------------------------------------------------------------------------------


def _write_mosaic(source: str, path: str) -> None:
    from streaming import MDSWriter

    records = _records(source)
    first = next(records)
    columns = {name: _mds_type(values) for name, values in first.items()}
    with MDSWriter(out=path, columns=columns, size_limit=CHUNK_NBYTES) as out:
        for record in itertools.chain([first], records):
            out.write({name: values.numpy() if values.ndim else values.item() for name, values in record.items()})


def _mds_type(values: torch.Tensor) -> str:
    dtype = str(values.dtype).removeprefix("torch.")
    if values.ndim == 0:
        return dtype
    return f"ndarray:{dtype}:{','.join(map(str, values.shape))}"


def _open_mosaic(path: str, batch: int, workers: int) -> Any:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=path, shuffle=True, batch_size=batch)
    return torch.utils.data.DataLoader(dataset, batch_size=batch, num_workers=workers, drop_last=True)


# --- LitData ----------------------------------------------------------------------------------------------------------


def _write_litdata(source: str, path: str) -> None:
    from litdata.streaming import Cache  # what its optimize() writes with, without processes of its own

    cache = Cache(path, chunk_bytes=CHUNK_NBYTES)
    for number, record in enumerate(_records(source)):
        cache[number] = record
    cache.done()
    cache.merge(1)


def _open_litdata(path: str, batch: int, workers: int) -> Any:
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(path, shuffle=True, drop_last=True)
    return StreamingDataLoader(dataset, batch_size=batch, num_workers=workers)


@dataclass(frozen=True)
class Peer:
    """A library.

    Attributes:
        label: what tables call it.
        module: imported by it.
        dist: its package.
        write: writes records, of (source, path).
        open: its loader, of (path, samples per batch, workers).
    """

    label: str
    module: str
    dist: str
    write: Callable[[str, str], None]
    open: Callable[[str, int, int], Any]

    @property
    def missing(self) -> bool:
        """Whether it is not installed."""
        return importlib.util.find_spec(self.module) is None


PEERS = {
    "mosaic": Peer("Mosaic Streaming", "streaming", "mosaicml-streaming", _write_mosaic, _open_mosaic),
    "litdata": Peer("LitData", "litdata", "litdata", _write_litdata, _open_litdata),
}


def write(peer: str, source: str, path: str) -> dict[str, Any]:
    """Write the records of a dataset; runs in a child."""
    PEERS[peer].write(source, path)
    return {"nbytes": sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())}


def rate(
    peer: str,
    path: str,
    batch: int,
    seconds: float,
    *,
    workers: int = 0,
    cap: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Samples a second, from the first batch on, of files that are in no cache."""
    location = Path(path)
    __import__(PEERS[peer].module)
    pagecache.evict(pagecache.files_under(location))
    if cap:
        Cap.from_dict(cap).join()
    device = block_device.device_of(location)
    begin = time.perf_counter()
    batches = _epochs(PEERS[peer].open(path, batch, workers))
    first = next(batches)
    opened = time.perf_counter() - begin
    before = device.counters() if device else None
    began, begin, count, touched = time.monotonic(), time.perf_counter(), 0, 0.0
    while count < 3 or time.perf_counter() - begin < seconds:
        touched += sum(float(value.reshape(len(value), -1)[:, 0].sum()) for value in next(batches).values())
        count += 1
    elapsed = time.perf_counter() - begin
    facts: dict[str, Any] = {"samples_per_s": count * batch / elapsed, "open_s": opened, "keys": sorted(first)}
    facts |= {"window": (began, time.monotonic()), "checksum": touched, "process": os.getpid()}
    if device and before:
        facts["disk_bytes_per_sample"] = device.counters().since(before).nbytes / (count * batch)
    return facts


def _epochs(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader
