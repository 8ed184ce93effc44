"""What processes hold in memory, split so that a full page cache is not taken for a leak.

A process that reads a large mapped dataset shows a resident size as large as the dataset. Nearly all of it is file
pages, which the kernel takes back when memory is needed. What counts against the machine is anonymous memory,
and in forked workers only what they do not share with their parent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from jasper_store.errors import JasperStoreError
from jasper_store.memory.budget import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MemoryReport", "memory_report"]


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Memory of one process, in bytes.

    Attributes:
        pid: the process.
        total_rss: all that is resident: ``anonymous + file + shared``.
        anonymous: its own data, preloaded tensors among it; pages still shared with a parent since a fork included.
        file: pages of mapped files, which the kernel can take back at any time.
        shared: shared memory (``/dev/shm``: what DataLoader workers send batches through).
        private: the part of ``total_rss`` that no other process maps; what ending this process would free.
        proportional: ``total_rss`` with each page divided by the number of processes that map it, so that the
            sum over processes counts every page once.
        swap: what was moved to swap.
        huge: the part of ``anonymous`` in huge pages.
        source: where the figures come from. ``"psutil"`` cannot split: private memory counts as anonymous, the rest
            as file, and ``proportional`` is the private part alone.
    """

    pid: int
    total_rss: int
    anonymous: int
    file: int
    shared: int
    private: int
    proportional: int
    swap: int
    huge: int
    source: str

    def __str__(self) -> str:
        return (
            f"{format_bytes(self.total_rss)} resident: {format_bytes(self.anonymous)} anonymous, "
            f"{format_bytes(self.file)} file, {format_bytes(self.shared)} shared; "
            f"{format_bytes(self.private)} private"
        )


def memory_report(pid: int | None = None, *, proc: Path = Path("/proc")) -> MemoryReport:
    """Measure one process; this one by default.

    Walks its page tables: a few milliseconds for each 10 GiB that is mapped and touched.

    Raises:
        JasperStoreError: there is no such process, or it belongs to another user.
    """
    own = pid is None
    number = psutil.Process().pid if pid is None else pid
    folder = proc / ("self" if own else str(number))
    try:
        rollup = _fields((folder / "smaps_rollup").read_text())
        status = _fields((folder / "status").read_text())
        return _from_proc(number, rollup, status)
    except (OSError, KeyError):  # Not Linux, before 4.14, or not ours to read.
        return _from_psutil(number)


def _fields(text: str) -> dict[str, int]:
    """The ``Name: 12 kB`` lines of a proc file, in bytes."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        parts = value.split()
        if len(parts) == 2 and parts[1] == "kB" and parts[0].isdigit():
            found[name] = int(parts[0]) * 1024
    return found


def _from_proc(pid: int, rollup: Mapping[str, int], status: Mapping[str, int]) -> MemoryReport:
    rss, anonymous = rollup["Rss"], rollup["Anonymous"]
    # Only the status file tells shared memory from file pages; its counters lag a little behind.
    shared = min(status.get("RssShmem", 0), rss - anonymous)
    return MemoryReport(
        pid=pid,
        total_rss=rss,
        anonymous=anonymous,
        file=rss - anonymous - shared,
        shared=shared,
        private=rollup["Private_Clean"] + rollup["Private_Dirty"],
        proportional=rollup["Pss"],
        swap=rollup.get("Swap", 0),
        huge=rollup.get("AnonHugePages", 0),
        source="smaps_rollup",
    )


def _from_psutil(pid: int) -> MemoryReport:
    try:
        process = psutil.Process(pid)
        rss = int(process.memory_info().rss)
        try:
            private = min(int(process.memory_full_info().uss), rss)
        except (psutil.AccessDenied, AttributeError):
            private = rss
    except psutil.Error as exc:
        msg = f"process {pid}: its memory cannot be read ({exc}); give the id of a running process of yours"
        raise JasperStoreError(msg) from exc
    return MemoryReport(
        pid=pid,
        total_rss=rss,
        anonymous=private,
        file=rss - private,
        shared=0,
        private=private,
        proportional=private,
        swap=0,
        huge=0,
        source="psutil",
    )
