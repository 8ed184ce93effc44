"""The disk's own rates, on the very files of a dataset, past the page cache; and making those files cold.

Reads are made by threads of ``preadv`` with O_DIRECT where the file system has it. Python threads reach the rate of
most disks but not of the fastest, so what is reported is a rate that the disk has at least.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jasper_store.paging.residency import cached_bytes, drop_cache

__all__ = ["COLD", "DiskRate", "cached_share", "make_cold", "probe"]

COLD = 0.01
"""Largest share of cached bytes at which files count as cold."""

_RANDOM_BLOCK, _RANDOM_DEPTH = 4096, 32
_SEQUENTIAL_BLOCK, _SEQUENTIAL_DEPTH = 1 << 20, 8


@dataclass(frozen=True, slots=True)
class DiskRate:
    """What a probe saw.

    Attributes:
        access: ``"sequential"`` or ``"random"``.
        block: bytes per read.
        depth: reads in flight.
        direct: whether the page cache was bypassed by O_DIRECT; otherwise pages were dropped behind the reads.
        reads_per_second: of that many bytes each.
    """

    access: str
    block: int
    depth: int
    direct: bool
    reads_per_second: float

    @property
    def bytes_per_second(self) -> float:
        """Reads per second times their size."""
        return self.reads_per_second * self.block


def cached_share(files: Iterable[Path]) -> float | None:
    """Share of the files' bytes that are in the page cache; ``None`` where the system cannot say."""
    cached = total = 0
    for file in files:
        size = file.stat().st_size
        found = cached_bytes(file, 0, size)
        if found is None:
            return None
        cached, total = cached + found, total + size
    return cached / total if total else 0.0


def make_cold(files: Iterable[Path]) -> float | None:
    """Drop files from the page cache; the share that stayed, or ``None`` where the system cannot say.

    Files that others have mapped, or that lie in memory themselves (tmpfs), stay: compare with :data:`COLD`.
    """
    files = list(files)
    for file in files:
        _write_back(file)
        if not drop_cache(file, 0, file.stat().st_size):
            return None
    return cached_share(files)


def _write_back(file: Path) -> None:
    """Dirty pages cannot be dropped."""
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def probe(file: Path, *, random: bool, seconds: float, seed: int = 0) -> DiskRate | None:
    """Read one file past the page cache for some seconds; ``None`` where that cannot be done.

    Random reads are 4 KiB, 32 in flight; sequential ones 1 MiB, 8 in flight, from the start again at the end.
    """
    block, depth = (_RANDOM_BLOCK, _RANDOM_DEPTH) if random else (_SEQUENTIAL_BLOCK, _SEQUENTIAL_DEPTH)
    blocks = file.stat().st_size // block
    if not blocks or not hasattr(os, "preadv"):
        return None
    fd, direct = _open(file)
    try:
        depth = min(depth, blocks)
        rate = _Probe(fd, block, blocks, random=random, direct=direct, seed=seed).run(depth, seconds)
    except OSError:  # this file system takes O_DIRECT and then refuses the reads
        return None
    finally:
        os.close(fd)
    return DiskRate("random" if random else "sequential", block, depth, direct, rate)


def _open(file: Path) -> tuple[int, bool]:
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(file, os.O_RDONLY | os.O_DIRECT), True
        except OSError:  # tmpfs and some network file systems
            pass
    return os.open(file, os.O_RDONLY), False


class _Probe:
    """One run of reads by several threads."""

    def __init__(self, fd: int, block: int, blocks: int, *, random: bool, direct: bool, seed: int) -> None:
        self.fd, self.block, self.blocks = fd, block, blocks
        self.random, self.direct, self.seed = random, direct, seed
        self.failure: OSError | None = None

    def run(self, depth: int, seconds: float) -> float:
        """Reads per second."""
        counts = [0] * depth
        began = time.perf_counter()

        def work(slot: int) -> None:
            try:
                counts[slot] = self._read(slot, depth, began + seconds)
            except OSError as exc:
                self.failure = exc

        threads = [threading.Thread(target=work, args=(slot,), name=f"disk-probe-{slot}") for slot in range(depth)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        return sum(counts) / (time.perf_counter() - began)

    def _read(self, slot: int, depth: int, deadline: float) -> int:
        order = np.random.default_rng([self.seed, slot]).integers(0, self.blocks, size=1 << 14).tolist()
        count = 0
        # Direct reads need an aligned buffer, and anonymous maps are.
        with mmap.mmap(-1, self.block) as buffer:
            while time.perf_counter() < deadline:
                index = order[count % len(order)] if self.random else (count * depth + slot) % self.blocks
                os.preadv(self.fd, [buffer], index * self.block)
                if not self.direct:
                    drop_cache(self.fd, index * self.block, self.block)
                count += 1
        return count
