"""The disk's own limit: what no reader of this file can beat, by an own probe and by fio where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.bench import aio

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["DEPTH", "fio_rate", "random_rate", "sequential_rate", "version_of_fio"]

DEPTH = 32
RANDOM_BLOCK = 4096
SEQUENTIAL_BLOCK = 1 << 20
SEQUENTIAL_DEPTH = 8


def random_rate(path: Path, seconds: float, seed: int = 0, depth: int = DEPTH) -> tuple[aio.Rate, str]:
    """Random 4 KiB reads at a queue depth, past the page cache, and how they were made."""
    return _rate(path, RANDOM_BLOCK, depth, seconds, random=True, seed=seed)


def sequential_rate(path: Path, seconds: float) -> tuple[aio.Rate, str]:
    """Reads of 1 MiB, one after the other, eight in flight."""
    return _rate(path, SEQUENTIAL_BLOCK, SEQUENTIAL_DEPTH, seconds, random=False, seed=0)


def _rate(path: Path, block: int, depth: int, seconds: float, *, random: bool, seed: int) -> tuple[aio.Rate, str]:
    try:
        return aio.read_rate(path, block=block, depth=depth, seconds=seconds, random=random, seed=seed), "Linux AIO"
    except aio.AioUnavailableError:
        return _threads(path, block, depth, seconds, random=random, seed=seed), f"{depth} threads of preadv"


def _threads(path: Path, block: int, depth: int, seconds: float, *, random: bool, seed: int) -> aio.Rate:
    """The fallback: one thread for each read in flight, through the page cache told to forget at once."""
    blocks = max(path.stat().st_size // block, 1)
    counts = [0] * depth
    deadline = time.perf_counter() + seconds

    def work(slot: int) -> None:
        order = np.random.default_rng([seed, slot]).integers(0, blocks, size=1 << 16)
        buffer = bytearray(block)
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM if random else os.POSIX_FADV_SEQUENTIAL)
            while time.perf_counter() < deadline:
                count = counts[slot]
                index = int(order[count % len(order)]) if random else (count * depth + slot) % blocks
                os.preadv(fd, [buffer], index * block)
                counts[slot] = count + 1
        finally:
            os.close(fd)

    begin = time.perf_counter()
    workers = [threading.Thread(target=work, args=(slot,)) for slot in range(depth)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    elapsed = time.perf_counter() - begin
    return aio.Rate(sum(counts) / elapsed, sum(counts) * block / elapsed)


def fio_rate(path: Path, seconds: float, *, random: bool, depth: int = DEPTH) -> aio.Rate | None:
    """The same two questions put to fio; None where it is not installed or fails."""
    program = shutil.which("fio")
    if program is None:
        return None
    block, pattern = ("4k", "randread") if random else ("1m", "read")
    command = [
        program,
        "--name=probe",
        f"--filename={path}",
        "--readonly",
        "--direct=1",
        "--ioengine=libaio",
        f"--rw={pattern}",
        f"--bs={block}",
        f"--iodepth={depth if random else SEQUENTIAL_DEPTH}",
        f"--runtime={max(seconds, 1):.0f}",
        "--time_based",
        "--norandommap",
        "--output-format=json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 + seconds)
    if done.returncode:
        return None
    read: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]
    return aio.Rate(float(read["iops"]), float(read["bw_bytes"]))


def version_of_fio() -> str | None:
    """For the record."""
    program = shutil.which("fio")
    if program is None:
        return None
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.strip()
