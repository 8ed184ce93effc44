"""What runs inside the child for the row readers: equal batches, every row touched, equal sums or no figure."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tools.bench import block_device, pagecache
from tools.bench.cgroup import Cap
from tools.bench.readers.registry import READERS
from tools.bench.row_files import RowSource, orders

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

__all__ = ["cold", "index_select", "sums", "warm"]

CHECKED = 8
FIRST_ROWS = 16


def digest(batch: torch.Tensor) -> int:
    """An exact sum of a batch's bits: it touches every value, and is equal for equal values on every reader."""
    return int(batch.contiguous().view(torch.int32).sum(dtype=torch.int64))


def sums(rows: int, dim: int, seed: int, batch: int, count: int) -> dict[str, Any]:
    """The digests that every reader must find, from the generator itself."""
    source, blocks = RowSource(rows, dim, seed), {}
    found = []
    for picked in orders(rows, count, seed, batch)[:CHECKED]:
        block_rows = len(source.block(0))
        out = np.empty((len(picked), dim), dtype=np.float32)
        for place, row in enumerate(picked.tolist()):
            index = row // block_rows
            if index not in blocks:
                blocks[index] = source.block(index)
            out[place] = blocks[index][row % block_rows]
        found.append(digest(torch.from_numpy(out)))
    return {"sums": found}


def cold(
    reader: str,
    path: str,
    rows: int,
    dim: int,
    batch: int,
    count: int,
    seconds: float,
    seed: int,
    lookahead: int,
    cap: dict[str, Any] | None,
) -> dict[str, Any]:
    """Read random rows of an evicted file under a memory limit; summing each batch is part of the time, for all."""
    mine = READERS[reader](rows, dim, lookahead)
    mine.prepare()
    batches = orders(rows, count, seed, batch)
    location = Path(path)
    device = block_device.device_of(location)
    how = pagecache.evict(pagecache.files_under(location))
    if cap:
        Cap.from_dict(cap).join()
    begin = time.perf_counter()
    mine.open(location)
    opened = time.perf_counter() - begin
    # Rows that no batch asks for: what the first call of a library sets up is nobody's reading speed.
    mine.take(orders(rows, rows, seed, FIRST_ROWS)[-1])
    before = device.counters() if device else None
    began = time.monotonic()
    found, done, elapsed = _bounded(mine.batches(batches), seconds, batch)
    ended = time.monotonic()
    facts = {"rows_per_s": done / elapsed, "rows": done, "seconds": elapsed, "open_s": opened, "evicted_by": how}
    facts |= {"sums": found[:CHECKED], "window": (began, ended)}
    if device and before:
        disk = device.counters().since(before)
        facts |= {"disk_reads_per_row": disk.reads / done, "disk_bytes_per_row": disk.nbytes / done}
    return facts


def _bounded(batches: Iterator[torch.Tensor], seconds: float, batch: int) -> tuple[list[int], int, float]:
    found: list[int] = []
    begin = time.perf_counter()
    for tensor in batches:
        found.append(digest(tensor))
        if time.perf_counter() - begin > seconds:
            break
    return found, len(found) * batch, time.perf_counter() - begin


def warm(
    reader: str, path: str, rows: int, dim: int, batch: int, count: int, seconds: float, seed: int, lookahead: int
) -> dict[str, Any]:
    """Read random rows of a resident file: first with fresh page tables, then the same batches again and again."""
    mine = READERS[reader](rows, dim, lookahead)
    mine.prepare()
    location = Path(path)
    pagecache.warm(pagecache.files_under(location))
    mine.open(location)
    mine.take(orders(rows, rows, seed, FIRST_ROWS)[-1])
    return _passes(mine, orders(rows, count, seed, batch), seconds)


def index_select(path: str, rows: int, dim: int, batch: int, count: int, seconds: float, seed: int) -> dict[str, Any]:
    """The measure of the warm case: ``torch.index_select`` on a tensor in RAM, made from the raw row file."""
    data = torch.empty((rows, dim))
    with Path(path).open("rb") as file:
        file.seek(file.seek(0, 2) - data.nbytes)
        file.readinto(data.view(torch.uint8).view(-1).numpy().data)

    class InRam:
        def batches(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[torch.Tensor]:
            for picked in batches:
                yield torch.index_select(data, 0, torch.from_numpy(picked))

    return _passes(InRam(), orders(rows, count, seed, batch), seconds)


def _passes(reader: Any, batches: list[NDArray[np.int64]], seconds: float) -> dict[str, Any]:
    """Passes over the same batches until the time is up; nothing but reading is timed, the sums come after."""
    rates: list[float] = []
    began = time.monotonic()
    deadline = time.perf_counter() + seconds
    while len(rates) < 2 or time.perf_counter() < deadline:
        begin, done = time.perf_counter(), 0
        for tensor in reader.batches(batches):
            done += len(tensor)
            if len(rates) < 2 and time.perf_counter() - begin > seconds:
                break
        rates.append(done / (time.perf_counter() - begin))
    ended = time.monotonic()
    later = sorted(rates[1:])
    found = [digest(tensor) for tensor in reader.batches(batches[:CHECKED])]
    return {
        "first_rows_per_s": rates[0],
        "rows_per_s": later[len(later) // 2],
        "passes": len(rates),
        "sums": found,
        "window": (began, ended),
    }
