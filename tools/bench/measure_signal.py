"""What runs inside the child for the question of when to stop announcing: candidate signals, their price and truth."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.bench import block_device, pagecache
from tools.bench.row_files import orders

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["signals"]

PAGE = mmap.PAGESIZE
CACHESTAT = 451
SAMPLED = 8
RWF_NOWAIT = 8
HEADER = 4096


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Stat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recent"))


class _File:
    """A row file mapped, with every candidate as a method: rows of a batch in, share found resident out."""

    def __init__(self, path: Path, row_nbytes: int) -> None:
        self.row_nbytes = row_nbytes
        self.size = path.stat().st_size
        self.fd = os.open(path, os.O_RDONLY)
        self.map = mmap.mmap(self.fd, self.size, prot=mmap.PROT_READ)
        self.map.madvise(mmap.MADV_RANDOM)
        self.view = np.frombuffer(self.map, dtype=np.uint8)
        self.rows = self.view[HEADER:].view(np.float32).reshape(-1, row_nbytes // 4)
        self.address = int(self.view.ctypes.data)
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.buffer = bytearray(1)

    def gather(self, rows: NDArray[np.int64]) -> float:
        return float(np.take(self.rows, rows, axis=0)[0, 0])

    def faults(self, _rows: NDArray[np.int64]) -> float:
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_majflt)

    def blocks(self, _rows: NDArray[np.int64]) -> float:
        return float(resource.getrusage(resource.RUSAGE_THREAD).ru_inblock)

    def mincore(self, rows: NDArray[np.int64]) -> float:
        answer, found = ctypes.c_ubyte(0), 0
        for row in rows.tolist():
            place = (self.address + HEADER + row * self.row_nbytes) // PAGE * PAGE
            self.libc.mincore(ctypes.c_void_p(place), ctypes.c_size_t(PAGE), ctypes.byref(answer))
            found += answer.value & 1
        return found / len(rows)

    def cachestat(self, rows: NDArray[np.int64]) -> float:
        found = 0
        for row in rows.tolist():
            found += self._cached((HEADER + row * self.row_nbytes) // PAGE * PAGE, PAGE)
        return found / len(rows)

    def cachestat_whole(self, _rows: NDArray[np.int64]) -> float:
        return self._cached(0, self.size) * PAGE / self.size

    def nowait(self, rows: NDArray[np.int64]) -> float:
        return sum(map(self._readable_now, rows.tolist())) / len(rows)

    def _readable_now(self, row: int) -> bool:
        try:
            return bool(os.preadv(self.fd, [self.buffer], HEADER + row * self.row_nbytes, RWF_NOWAIT))
        except BlockingIOError:
            return False

    def _cached(self, offset: int, length: int) -> int:
        asked, answer = _Range(offset, length), _Stat()
        number = ctypes.c_long(CACHESTAT)
        if self.libc.syscall(number, self.fd, ctypes.byref(asked), ctypes.byref(answer), 0):
            raise OSError(ctypes.get_errno(), "cachestat")
        return int(answer.cached)


def signals(path: str, rows: int, dim: int, seed: int, batch: int, batches: int) -> dict[str, Any]:
    """Microseconds a batch of every candidate on resident pages, and what it says, and does, on cold ones."""
    location = Path(path)
    file = _File(location, dim * 4)
    wanted = orders(rows, batch * batches, seed, batch)
    pagecache.warm([location])
    for picked in wanted:
        file.gather(picked)
    facts = {"gather": {"label": "the gather itself (np.take)", "us": _price(file.gather, wanted)}}
    for key, (label, call, sampled) in _candidates(file).items():
        asked = [picked[:: len(picked) // SAMPLED] for picked in wanted] if sampled else wanted
        try:
            facts[key] = {"label": label, "us": _price(call, asked), "says_warm": call(asked[0])}
        except OSError as exc:
            facts[key] = {"label": label, "why": f"not on this kernel ({exc.strerror or exc})"}
    _cold(file, location, wanted, facts)
    return {"facts": facts}


def _candidates(file: _File) -> dict[str, tuple[str, Callable[[NDArray[np.int64]], float], bool]]:
    found: dict[str, tuple[str, Callable[[NDArray[np.int64]], float], bool]] = {
        "announce": ("announcing them (process_madvise)", _announcing(file), False),
        "faults": ("getrusage, major faults of the process", file.faults, False),
        "blocks": ("getrusage, blocks read by this thread", file.blocks, False),
        "mincore": ("mincore, every row", file.mincore, False),
        "mincore-sample": (f"mincore, {SAMPLED} rows", file.mincore, True),
        "cachestat": ("cachestat, every row", file.cachestat, False),
        "cachestat-sample": (f"cachestat, {SAMPLED} rows", file.cachestat, True),
        "cachestat-whole": ("cachestat, the whole file", file.cachestat_whole, False),
        "nowait": ("preadv2(RWF_NOWAIT), every row", file.nowait, False),
        "nowait-sample": (f"preadv2(RWF_NOWAIT), {SAMPLED} rows", file.nowait, True),
    }
    return found


def _announcing(file: _File) -> Callable[[NDArray[np.int64]], float]:
    from jasper_store.paging.madvise import madvise_batcher, row_ranges

    def announce(rows: NDArray[np.int64]) -> float:
        ranges = row_ranges(file.address + HEADER, file.row_nbytes, file.row_nbytes, rows)
        madvise_batcher().prefetch(ranges)
        return float(len(ranges)) / len(rows)

    return announce


def _price(call: Callable[[NDArray[np.int64]], float], batches: list[NDArray[np.int64]]) -> float:
    times = []
    for picked in batches:
        begin = time.perf_counter()
        call(picked)
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2] * 1e6


def _cold(file: _File, path: Path, wanted: list[NDArray[np.int64]], facts: dict[str, Any]) -> None:
    """Each asked about rows that are not there; what it makes the disk read is its side effect."""
    device = block_device.device_of(path)
    for key, (_, call, sampled) in _candidates(file).items():
        if "why" in facts[key]:
            continue
        file.map.madvise(mmap.MADV_DONTNEED)
        pagecache.evict([path])
        asked = wanted[0][:: len(wanted[0]) // SAMPLED] if sampled else wanted[0]
        if key in {"faults", "blocks"}:
            earlier = call(asked)
            file.gather(asked)
            facts[key]["says_cold"] = call(asked) - earlier
            continue
        before = device.counters() if device else None
        facts[key]["says_cold"] = call(asked)
        time.sleep(0.05)
        if device and before:
            facts[key]["disk_bytes"] = device.counters().since(before).nbytes
