"""One bounded benchmark of a dataset: opening, rows, batches, against ``torch.load`` and against the disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from jasper_store.bench.disk import COLD, DiskRate, cached_share, make_cold, probe
from jasper_store.bench.serving import LoaderRate, loader_rate, quietly, row_rate
from jasper_store.bench.torch_files import torch_load_seconds
from jasper_store.errors import DeclarationError, IncompatibleOptionsError
from jasper_store.files.hub import local_path
from jasper_store.formats.base import Extent, Parts, TensorSpec
from jasper_store.formats.registry import locate
from jasper_store.jasper.api import open as open_dataset, plan
from jasper_store.jasper.recognise import Known, known_at
from jasper_store.memory.budget import measure
from jasper_store.samples.declaration import everything
from jasper_store.samples.integrity import unrecorded
from jasper_store.store.placement import Plan

__all__ = ["BenchReport", "TensorRate", "bench"]

_OPENINGS = 3
# What the parts may take of the time; the rest is for opening, dropping and whatever overruns.
_DISK, _ROWS, _LOADER, _TORCH = 0.10, 0.30, 0.35, 0.10
_PRELOAD_RATE = 500e6  # bytes per second that a cold preload is expected to reach at least

Step = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TensorRate:
    """Random rows per second of one tensor, read through its map (or its chunk reader).

    Attributes:
        name: its name.
        placement: how it was read: ``"mmap"``, ``"chunked"``, or ``"ram"`` where it cannot be read otherwise.
        row_nbytes: bytes per row.
        warm: rows per second from the page cache.
        cold: rows per second from the disk; ``None`` where it could not be made cold.
    """

    name: str
    placement: str
    row_nbytes: int
    warm: float
    cold: float | None


@dataclass(slots=True)
class BenchReport:
    """How fast a dataset is served on this machine.

    Attributes:
        path: the dataset.
        format: its storage format.
        nbytes: bytes of all tensors.
        cached_before: share of its files in the page cache before anything was measured.
        open_seconds: opening it mapped, the fastest of three.
        tensors: rows per second.
        loader: samples per second.
        planned: bytes ``"preloaded"`` and ``"mapped"`` (or read by chunks) of the loader's placement ``"planned"``;
            empty where that was not measured.
        torch_load: seconds of ``torch.load`` of all ``.pt`` files, by ``"warm"`` and ``"cold"``.
        disk: the disk's own rates.
        notes: what was not measured, and why.
        seconds: how long it all took.
    """

    path: Path
    format: str
    nbytes: int
    cached_before: float | None
    open_seconds: float = 0.0
    tensors: list[TensorRate] = field(default_factory=list)
    loader: list[LoaderRate] = field(default_factory=list)
    planned: dict[str, int] = field(default_factory=dict)
    torch_load: dict[str, float] = field(default_factory=dict)
    disk: list[DiskRate] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found = asdict(self)
        found["path"] = str(self.path)
        found["disk"] = [{**asdict(rate), "bytes_per_second": rate.bytes_per_second} for rate in self.disk]
        return found


def bench(
    path: str | PathLike[str],
    *,
    storage_format: str = "auto",
    batch_sizes: tuple[int, ...] = (32, 256, 1024),
    seconds: float = 25.0,
    cold: bool = True,
    memory_limit: int | str | None = None,
    step: Step | None = None,
) -> BenchReport:
    """Measure how fast a dataset is served here, in a bounded time, from files as they are. Writes nothing.

    Args:
        path: a dataset directory, any directory of tensor files, or one file.
        storage_format: format to read.
        batch_sizes: batch sizes of the loader.
        seconds: about how long all of it may take.
        cold: measure the disk too; for this the files are dropped from the page cache.
        memory_limit: upper bound on what may be preloaded where the planner decides: bytes, or such as ``"8GiB"``.
        step: called with a few words as each part begins.

    Raises:
        IncompatibleOptionsError: no time, or a batch size below 1.
        DatasetNotFoundError, CorruptFileError, IntegrityError: the dataset.
    """
    if seconds <= 0 or not batch_sizes or min(batch_sizes) < 1:
        raise IncompatibleOptionsError(
            f"expected a positive time and batch sizes of at least 1, found seconds={seconds}, "
            f"batch_sizes={list(batch_sizes)}"
        )
    began = time.perf_counter()
    with unrecorded():
        run = _Run(
            local_path(path), storage_format, seconds, step or (lambda _: None), cold=cold, memory_limit=memory_limit
        )
        run.opening()
        run.disk()
        run.rows()
        run.torch_load()
        run.loader(batch_sizes)
    run.report.seconds = time.perf_counter() - began
    return run.report


class _Run:
    """The parts of one benchmark."""

    def __init__(
        self,
        path: Path,
        storage_format: str,
        seconds: float,
        step: Step,
        *,
        cold: bool,
        memory_limit: int | str | None,
    ) -> None:
        self.path, self.seconds, self.step, self.memory_limit = path, seconds, step, memory_limit
        with quietly():
            self.known: Known = known_at(path)
            located = locate(path, storage_format, self.known.schema)
        self.format = located.format
        self.specs: tuple[TensorSpec, ...] = located.specs
        self.files = sorted({path for spec in located.specs for path in spec.paths})
        self.report = BenchReport(
            path, located.format, sum(spec.nbytes for spec in located.specs), cached_share(self.files)
        )
        self.cold = cold and self._can_be_cold()

    def _can_be_cold(self) -> bool:
        left = make_cold(self.files)
        if left is not None and left <= COLD:
            return True
        why = "this system cannot say what is cached" if left is None else f"{left:.0%} of the files stayed in memory"
        self.report.notes.append(f"nothing was measured cold: {why} (another program has them mapped, or a tmpfs?)")
        return False

    def _make_cold(self, files: list[Path], what: str) -> bool:
        """Whether these files are cold now; a note where they are not."""
        if not self.cold:
            return False
        left = make_cold(files)
        if left is not None and left <= COLD:
            return True
        self.report.notes.append(f"{what}: not measured cold, the page cache kept its file")
        return False

    def opening(self) -> None:
        """Opening mapped: headers are read and maps are made."""
        self.step("opening")
        times = []
        for _ in range(_OPENINGS):
            began = time.perf_counter()
            with quietly(), open_dataset(self.path, format=self.format, use_mmap=True):
                times.append(time.perf_counter() - began)
        self.report.open_seconds = min(times)

    def disk(self) -> None:
        """What the disk does when nothing stands between, on the largest file."""
        if not self.cold:
            return
        self.step("reading past the page cache")
        largest = max(self.files, key=lambda file: file.stat().st_size)
        for random in (False, True):
            rate = probe(largest, random=random, seconds=self.seconds * _DISK / 2)
            if rate is None:
                self.report.notes.append(f"{largest.name}: too small, or not readable past the page cache")
            else:
                self.report.disk.append(rate)

    def rows(self) -> None:
        """Random rows of every tensor that a sample reads; of every tensor where nothing is known of samples."""
        reads = {entry.name: entry.reads_per_sample for entry in self._plan().entries}
        read_at_all = {name for name, count in reads.items() if count > 0} or set(reads)
        specs = [spec for spec in self.specs if spec.name in read_at_all and spec.n_rows]
        share = self.seconds * _ROWS / max(2 * len(specs), 1)
        for spec in specs:
            self.step(f"rows of {spec.name}")
            is_cold = isinstance(spec.location, (Extent, Parts)) and self._make_cold(list(spec.paths), spec.name)
            # Opened anew each time: pages that a map has touched cannot be dropped.
            with quietly(), open_dataset(self.path, format=self.format, use_mmap=True) as store:
                tensor = store[spec.name]
                cold = row_rate(tensor, seconds=share, cold=True) if is_cold else None
                warm = row_rate(tensor, seconds=share, cold=False)
                self.report.tensors.append(TensorRate(spec.name, tensor.placement, tensor.row_nbytes, warm, cold))

    def torch_load(self) -> None:
        """The same bytes by ``torch.load``, where it can read them and there is time and room for it."""
        files = [file for file in self.files if file.suffix in {".pt", ".pth"}]
        if not files or len(files) < len(self.files):
            self.report.notes.append("torch.load: not measured, the files are not .pt")
            return
        size = sum(file.stat().st_size for file in files)
        largest = max(file.stat().st_size for file in files)
        if size / _PRELOAD_RATE > self.seconds * _TORCH or largest > measure().nbytes // 2:
            self.report.notes.append("torch.load: not measured, the files are too large for the time or the memory")
            return
        self.step("torch.load")
        if self._make_cold(files, "torch.load"):
            self.report.torch_load["cold"] = torch_load_seconds(files)
        else:
            torch_load_seconds(files)
        self.report.torch_load["warm"] = torch_load_seconds(files)

    def loader(self, batch_sizes: tuple[int, ...]) -> None:
        """Batches of the training split, or of the first split there is, by placement and batch size."""
        split = self._split()
        if isinstance(split, DeclarationError):
            self.report.notes.append(f"loader: not measured, {split}")
            return
        ways: list[tuple[bool | None, bool]] = [(True, False)]
        if self.cold:
            ways.insert(0, (True, True))
        made = self._plan()
        if made.preloaded_nbytes and made.preloaded_nbytes / _PRELOAD_RATE < self.seconds * _LOADER:
            ways.append((None, False))
            self.report.planned = {"preloaded": made.preloaded_nbytes, "mapped": made.nbytes - made.preloaded_nbytes}
        else:
            self.report.notes.append(
                "loader: preloading was not measured, the data is too large for the time or memory"
            )
        share = self.seconds * _LOADER / (len(ways) * len(batch_sizes))
        for use_mmap, cold in ways:
            for batch_size in batch_sizes:
                self.step(f"batches of {batch_size}")
                if cold and not self._make_cold(self.files, f"batches of {batch_size}"):
                    continue
                self.report.loader.append(
                    loader_rate(
                        self.path,
                        batch_size,
                        split=split,
                        storage_format=self.format,
                        use_mmap=use_mmap,
                        memory_limit=self.memory_limit,
                        seconds=share,
                        cold=cold,
                    )
                )

    def _split(self) -> str | DeclarationError | None:
        """The first split that is there; ``None`` without splits, the reason where nothing can be served."""
        declaration = self.known.declaration
        try:
            lists = everything(self.specs).splits if declaration is None else declaration.splits
        except DeclarationError as exc:
            return exc
        names = {spec.name for spec in self.specs}
        return next((split for split, name in lists.items() if name in names), None)

    def _plan(self) -> Plan:
        with quietly():
            return plan(self.path, format=self.format, memory_limit=self.memory_limit)
