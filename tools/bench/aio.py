"""Linux asynchronous reads by system call: a queue kept full from one thread, with no compiled helper.

Python threads cannot keep 32 reads in flight at a disk's full rate (the interpreter lock is taken twice a read);
``io_submit``/``io_getevents`` move many at a time.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import Self

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["AioUnavailableError", "Rate", "read_rate"]

# (io_setup, io_destroy, io_getevents, io_submit)
NUMBERS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}

IOCB = np.dtype(
    [
        ("data", "<u8"),
        ("key", "<u4"),
        ("rw_flags", "<u4"),
        ("opcode", "<u2"),
        ("priority", "<i2"),
        ("fd", "<u4"),
        ("buf", "<u8"),
        ("nbytes", "<u8"),
        ("offset", "<i8"),
        ("reserved", "<u8"),
        ("flags", "<u4"),
        ("resfd", "<u4"),
    ]
)
EVENT = np.dtype([("data", "<u8"), ("obj", "<u8"), ("res", "<i8"), ("res2", "<i8")])


class AioUnavailableError(OSError):
    """This kernel, sandbox or processor has no Linux AIO, or the file system refuses O_DIRECT."""


@dataclass(frozen=True)
class Rate:
    """What a probe saw."""

    reads_per_s: float
    bytes_per_s: float


class _Queue:
    """One io context; use as a context manager."""

    def __init__(self, depth: int) -> None:
        numbers = NUMBERS.get(platform.machine())
        if numbers is None or platform.system() != "Linux":
            raise AioUnavailableError(f"no Linux AIO on {platform.system()} {platform.machine()}")
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._setup, self._destroy, self._getevents, self._submit = numbers
        self._context = ctypes.c_ulong(0)
        self.depth = depth
        self.least = max(1, depth // 8)
        self.events = np.zeros(depth, dtype=EVENT)
        self.pointers = np.zeros(depth, dtype=np.uint64)

    def __enter__(self) -> Self:
        self._call(self._setup, ctypes.c_uint(self.depth), ctypes.byref(self._context))
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._destroy, self._context)

    def submit(self, count: int) -> None:
        """Hand over the requests at the first ``count`` pointers."""
        sent = self._call(self._submit, self._context, ctypes.c_long(count), ctypes.c_void_p(self.pointers.ctypes.data))
        if sent != count:
            raise AioUnavailableError(f"the kernel took {sent} of {count} requests")

    def wait(self, in_flight: int) -> int:
        """Wait for some finished requests (a few together, or the interpreter becomes the limit); how many."""
        events = ctypes.c_void_p(self.events.ctypes.data)
        least, most = ctypes.c_long(min(self.least, in_flight)), ctypes.c_long(self.depth)
        return self._call(self._getevents, self._context, least, most, events, None)

    def _call(self, number: int, *arguments: object) -> int:
        answer = int(self._libc.syscall(ctypes.c_long(number), *arguments))
        if answer < 0:
            code = ctypes.get_errno()
            raise AioUnavailableError(code, os.strerror(code))
        return answer


def read_rate(path: Path, *, block: int, depth: int, seconds: float, random: bool, seed: int = 0) -> Rate:
    """Read ``path`` past the page cache (O_DIRECT), ``depth`` blocks always in flight, for some seconds.

    Random reads take blocks at random; the others go from the start to the end and begin again.

    Raises:
        AioUnavailableError: no Linux AIO here, or the file system refuses O_DIRECT.
    """
    blocks = path.stat().st_size // block
    if not blocks:
        raise AioUnavailableError(f"{path.name} is smaller than one block of {block} bytes")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as exc:
        raise AioUnavailableError(exc.errno, exc.strerror) from exc
    try:
        with mmap.mmap(-1, block * depth) as memory, _Queue(depth) as queue:
            return _keep_full(queue, fd, memory, _offsets(blocks, block, random=random, seed=seed), block, seconds)
    finally:
        os.close(fd)


def _offsets(blocks: int, block: int, *, random: bool, seed: int) -> NDArray[np.int64]:
    if random:
        return np.random.default_rng(seed).integers(0, blocks, size=1 << 20) * block
    return np.arange(blocks, dtype=np.int64) * block


def _keep_full(
    queue: _Queue, fd: int, memory: mmap.mmap, offsets: NDArray[np.int64], block: int, seconds: float
) -> Rate:
    depth = queue.depth
    view = np.frombuffer(memory, dtype=np.uint8)
    requests = np.zeros(depth, dtype=IOCB)
    requests["data"] = np.arange(depth)
    requests["fd"] = fd
    requests["nbytes"] = block
    requests["buf"] = view.ctypes.data + np.arange(depth, dtype=np.uint64) * block
    taken, done = depth, 0
    requests["offset"] = np.resize(offsets, depth)
    base = requests.ctypes.data
    queue.pointers[:] = base + np.arange(depth, dtype=np.uint64) * IOCB.itemsize
    begin = time.perf_counter()
    queue.submit(depth)
    while True:
        count = queue.wait(depth)
        finished = queue.events[:count]
        if (finished["res"] != block).any():
            raise AioUnavailableError(f"a read of {block} bytes gave {int(finished['res'].min())}")
        done += count
        now = time.perf_counter()
        if now - begin > seconds:
            break
        slots = finished["data"].astype(np.int64)
        requests["offset"][slots] = np.take(offsets, np.arange(taken, taken + count), mode="wrap")
        taken += count
        queue.pointers[:count] = base + slots.astype(np.uint64) * IOCB.itemsize
        queue.submit(count)
    in_flight = depth - count
    while in_flight > 0:
        in_flight -= queue.wait(in_flight)
    del view
    return Rate(done / (now - begin), done * block / (now - begin))
