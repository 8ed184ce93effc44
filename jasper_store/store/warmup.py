"""Reading mapped tensors into the page cache before training does, one bounded window at a time.

Each window of 64 MiB is read in huge pages where the system has them for files, and populated (MADV_POPULATE_READ). Elsewhere
it is prefetched while the one before it is read, or read where there is no such call. Everything that the tensors hold of the page cache, pages that were there before included,
counts against the budget, so that the end of a warm-up never evicts its beginning; what no longer fits is not read,
and the report names it.

Ranks of one node share the page cache, so one rank at a time holds a lock file and warms. The first one reads; the
others find the pages there and only enter them in their own page tables.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from jasper_store.errors import UnknownNameError
from jasper_store.files.fingerprint import FileIdentity
from jasper_store.files.lock import exclusive
from jasper_store.memory.budget import format_bytes, measure
from jasper_store.memory.sizes import nbytes_of
from jasper_store.paging import preload, residency
from jasper_store.paging.huge_files import HugeReader
from jasper_store.store.chunked import ChunkedTensor
from jasper_store.store.paged import PagedTensor
from jasper_store.store.tensors import ByteRun, byte_runs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from jasper_store.store.build import Progress
    from jasper_store.store.store import TensorStore
    from jasper_store.store.tensors import StoredTensor

__all__ = ["WINDOW", "WarmedTensor", "WarmupReport", "warm"]

WINDOW = 64 << 20
_REMEASURE = 16  # windows


@dataclass(frozen=True, slots=True)
class WarmedTensor:
    """What a warm-up did for one tensor.

    Attributes:
        name: the tensor's name.
        nbytes: bytes of its values in the file; of the whole file where it is chunked.
        before: how many of them were in the page cache before.
        after: and after.
        skipped: why not all of it was warmed; ``""`` if it was.
    """

    name: str
    nbytes: int
    before: int
    after: int
    skipped: str = ""

    @property
    def note(self) -> str:
        """:attr:`skipped`, and that nothing was missing where another process had brought the pages in before."""
        if self.skipped and self.nbytes and self.before == self.nbytes:
            return f"{self.skipped}, but all of it was there before"
        return self.skipped


@dataclass(frozen=True, slots=True)
class WarmupReport:
    """What a warm-up did. ``str(report)`` is a table for people.

    Attributes:
        tensors: one entry per tensor asked for.
        seconds: wall time, waiting for other ranks included.
        waited: of these, seconds spent waiting for another process that was warming the same dataset.
        bytes_read: bytes that were not in the page cache and were read.
        budget: bytes of the page cache that the tensors were allowed.
    """

    tensors: tuple[WarmedTensor, ...]
    seconds: float
    waited: float
    bytes_read: int
    budget: int

    @property
    def before(self) -> int:
        """Bytes that were in the page cache before."""
        return sum(entry.before for entry in self.tensors)

    @property
    def after(self) -> int:
        """Bytes that are in the page cache after."""
        return sum(entry.after for entry in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors asked for."""
        return sum(entry.nbytes for entry in self.tensors)

    def __str__(self) -> str:
        width = max([6, *(len(entry.name) for entry in self.tensors)])
        lines = [f"{'tensor':<{width}}  {'size':>10}  {'before':>7}  {'after':>7}"]
        for entry in self.tensors:
            note = f"  {entry.note}" if entry.note else ""
            lines.append(
                f"{entry.name:<{width}}  {format_bytes(entry.nbytes):>10}  {_percent(entry.before, entry.nbytes):>7}  "
                f"{_percent(entry.after, entry.nbytes):>7}{note}"
            )
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """What was read in all, in one line; ``str(report)`` has a table of the tensors above it."""
        busy = max(self.seconds - self.waited, 1e-9)
        rate = f" ({format_bytes(int(self.bytes_read / busy))}/s)" if self.bytes_read else ""
        waited = f", {self.waited:.1f} s of them waiting for another process" if self.waited >= 0.1 else ""
        return (
            f"read {format_bytes(self.bytes_read)} in {self.seconds:.2f} s{rate}{waited}; "
            f"{format_bytes(self.after)} of {format_bytes(self.nbytes)} in the page cache, "
            f"budget {format_bytes(self.budget)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report in plain values, ready for JSON."""
        return {
            "seconds": self.seconds,
            "waited": self.waited,
            "bytes_read": self.bytes_read,
            "budget": self.budget,
            "nbytes": self.nbytes,
            "before": self.before,
            "after": self.after,
            "tensors": [
                {name: getattr(entry, name) for name in ("name", "nbytes", "before", "after", "skipped")}
                for entry in self.tensors
            ],
        }


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def warm(
    store: TensorStore,
    *,
    tensors: Collection[str] | None = None,
    budget: int | str | None = None,
    progress: Progress | None = None,
) -> WarmupReport:
    """Bring tensors into the page cache.

    Args:
        store: an open store.
        tensors: names, in the order to warm them; by default all that are mapped or chunked, those that a sample
            reads most of per byte first.
        budget: bytes of the page cache that they may take altogether, or a text such as ``"8GiB"``; by default 0.8 of what this process may use,
            measured again after every GiB.
        progress: called with (bytes done, bytes in all).

    Returns:
        What was done, with residency before and after. Tensors in memory are skipped.

    Raises:
        UnknownNameError: the store has no such tensor.
        IncompatibleOptionsError: ``budget`` is not a size.
        ClosedError: the store was closed.
    """
    begin = time.perf_counter()
    targets = _targets(store, tensors)
    limit = _Limit(None if budget is None else nbytes_of(budget, "budget"))
    jobs = [_Job(tensor) for tensor in targets]
    seen: set[Path] = set()
    for job in jobs:
        job.prepare(seen)
    total = min(sum(job.nbytes for job in jobs if not job.skipped), limit.nbytes)
    done = 0
    with _turn(store.path) as waited:
        before = [job.resident() for job in jobs]
        for job in jobs:
            for size in job.run(limit):
                done += size
                if progress is not None:
                    progress(min(done, total), total)
        entries = tuple(
            WarmedTensor(job.tensor.name, job.nbytes, was, job.resident(), job.skipped)
            for job, was in zip(jobs, before, strict=True)
        )
    return WarmupReport(
        entries, time.perf_counter() - begin, waited.seconds, sum(job.read for job in jobs), limit.nbytes
    )


def _targets(store: TensorStore, names: Collection[str] | None) -> list[StoredTensor]:
    if names is not None:
        for name in names:
            if name not in store:
                near = difflib.get_close_matches(name, store, n=3, cutoff=0.5) or list(store)
                msg = f"no tensor {name!r} to warm in {store.path}; there are {', '.join(near)}"
                raise UnknownNameError(msg, path=store.path, tensor=name)
        return [store[name] for name in dict.fromkeys(names)]
    reads = {entry.name: entry.reads_per_sample for entry in store.plan.entries}
    found = [tensor for tensor in store.values() if isinstance(tensor, (PagedTensor, ChunkedTensor))]
    return sorted(found, key=lambda tensor: (-reads[tensor.name] / max(tensor.n_rows, 1), tensor.nbytes))


class _Limit:
    """How many bytes of the page cache may be taken, all tensors together."""

    def __init__(self, budget: int | None) -> None:
        self._fixed = budget is not None
        # The page cache is shared by all ranks of a node, so theirs is not a part each.
        self.nbytes = self._measured() if budget is None else budget
        self._taken = 0
        self._windows = 0

    @staticmethod
    def _measured() -> int:
        found = measure()
        return int(found.winner.nbytes * found.fraction)

    def take(self, nbytes: int) -> bool:
        """Count a window; False if it no longer fits."""
        self._windows += 1
        if not self._fixed and self._windows % _REMEASURE == 0:
            # Pages read so far count as available; what is missing is used by another process.
            self.nbytes = min(self.nbytes, self._measured())
        if self._taken + nbytes > self.nbytes:
            return False
        self._taken += nbytes
        return True


class _Window(NamedTuple):
    """Bytes that are warmed at once."""

    start: int  # counted from the tensor's first
    file: ByteRun
    missing: int  # bytes that are not in the page cache
    run_start: int  # counted from the first of the run that it is in


@dataclass(slots=True)
class _Job:
    """One tensor to warm."""

    tensor: StoredTensor
    nbytes: int = 0
    read: int = 0
    skipped: str = ""
    _runs: tuple[ByteRun, ...] = ()
    _scratch: torch.Tensor | None = None
    _huge: HugeReader = field(default_factory=HugeReader)

    def prepare(self, seen: set[Path]) -> None:
        """Find its bytes; a file of chunked data is warmed once, whole, for the first tensor that needs it."""
        tensor = self.tensor
        if isinstance(tensor, ChunkedTensor):
            self._runs = (ByteRun(tensor.path, 0, tensor.path.stat().st_size),)
            if tensor.path in seen:
                self.skipped = "its file was warmed as a whole already"
            seen.add(tensor.path)
        elif isinstance(tensor, PagedTensor):
            self._runs = tuple(byte_runs(tensor.spec))
        else:
            self.skipped = f"in memory already ({tensor.placement})"
        self.nbytes = sum(run.nbytes for run in self._runs)

    def resident(self) -> int:
        """Bytes of it in the page cache."""
        return self.tensor.residency() if self.nbytes else 0

    def run(self, limit: _Limit) -> Iterator[int]:
        """Warm it; yields the size of each window done."""
        if self.skipped:
            return
        windows = self._windows(limit)
        current = next(windows, None)
        while current is not None:
            # The next window is looked at before it is asked for, else it would seem to have been there.
            following = next(windows, None)
            self._fill(current, following)
            self.read += current.missing
            yield current.file.nbytes
            current = following

    def _windows(self, limit: _Limit) -> Iterator[_Window]:
        """Windows within the budget."""
        done = 0
        for run in self._runs:
            for start in range(0, run.nbytes, WINDOW):
                file = ByteRun(run.path, run.offset + start, min(WINDOW, run.nbytes - start))
                if not limit.take(file.nbytes):
                    self.skipped = f"stopped at {_percent(done, self.nbytes)}: the budget is spent"
                    return
                yield _Window(done, file, file.nbytes - (residency.cached_bytes(*file) or 0), start)
                done += file.nbytes

    def _fill(self, window: _Window, following: _Window | None) -> None:
        start, nbytes = window.start, window.file.nbytes
        stop = ahead = start + nbytes
        # Huge pages are read as they are asked for, and prefetching the next window would take small ones.
        huge = window.missing > nbytes // 2 and self._huge.read(*window.file)
        if not huge and following is not None and following.run_start:  # the same run goes on
            ahead += following.file.nbytes
        if isinstance(self.tensor, PagedTensor) and self.tensor.populate(start, stop, ahead):
            return
        if window.missing:
            if self._scratch is None:
                self._scratch = torch.empty(min(WINDOW, self.nbytes), dtype=torch.uint8, device="cpu")
            preload.read_into(window.file.path, window.file.offset, self._scratch[:nbytes])


@dataclass(slots=True)
class _Waited:
    seconds: float = 0.0


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[_Waited]:
    """Wait until no other process or thread of this node is warming the same files."""
    identity = FileIdentity.of(path)
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        try:
            lock = Path(tempfile.gettempdir()) / f"jasper_store-warm-{_user()}-{identity.device}-{identity.inode}.lock"
            stack.enter_context(exclusive(lock, f"warming {path}", wait=math.inf, warn=False))
        except OSError:
            pass  # no place for a lock file: warming twice is slower, not wrong
        yield _Waited(time.perf_counter() - begin)


def _user() -> int:
    """Number of the user, so that users who share a temporary directory do not lock each other out."""
    return os.getuid() if hasattr(os, "getuid") else 0
