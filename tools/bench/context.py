"""What every case is given, and the helpers that most of them need."""

from __future__ import annotations

import itertools
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tools.bench import block_device, cgroup, disk, spawn
from tools.bench.assets import Assets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from tools.bench.results import CaseResult
    from tools.bench.settings import Settings

__all__ = ["Context"]


class Context:
    """Settings, data and the machine's knobs.

    Attributes:
        settings: sizes and bounds.
        assets: generated data.
        say: prints progress.
        device: the disk under the data, None where it has none of its own.
        measured: cases of this run, and of earlier ones with the same settings, as the document holds them.
        foreign: of each measurement, the share of the processors that other programs used meanwhile.
    """

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self.settings = settings
        self.assets = Assets(settings)
        self.say = say
        self.device = block_device.device_of(settings.data_dir)
        self.measured: Mapping[str, Any] = {}
        self.foreign: list[float] = []
        self._numbers = itertools.count()

    @contextmanager
    def cap(self, limit: int, result: CaseResult) -> Iterator[dict[str, Any] | None]:
        """A memory cgroup for one child, removed afterwards; None, and a note in the result, where it cannot be."""
        try:
            cap = cgroup.create(limit, f"jasper-bench-{os.getpid()}-{next(self._numbers)}")
        except cgroup.CannotCapError as exc:
            note = f"Not capped: {exc}. Reads of the same page may be served from memory."
            if note not in result.notes:
                result.notes.append(note)
            yield None
            return
        try:
            yield cap.to_dict()
        finally:
            cap.remove()

    def read_ahead_settings(self, result: CaseResult) -> list[int | None]:
        """The disk's own read-ahead and 128 KiB, where it can be changed; else only what there is (None)."""
        if self.device is None:
            result.notes.append("The data lies on no disk of its own, so read-ahead was left alone.")
            return [None]
        own = self.device.read_ahead_kib
        if not os.access(self.device.path / "queue" / "read_ahead_kb", os.W_OK):
            result.notes.append(f"Read-ahead could not be changed (it takes root) and was {own} KiB.")
            return [own]
        return [own] if own == 128 else [own, 128]

    @contextmanager
    def read_ahead(self, kib: int | None) -> Iterator[None]:
        """Read-ahead of the disk for a while."""
        if kib is None or self.device is None or self.device.read_ahead_kib == kib:
            yield
            return
        with block_device.read_ahead(self.device, kib, self.settings.data_dir):
            yield

    def disk_random(self, path: Path, seed: int = 0) -> float:
        """Own probe: random 4 KiB reads a second at depth 32."""
        return disk.random_rate(path, min(self.settings.seconds, 2.0), seed)[0].reads_per_s

    def disk_sequential(self, path: Path) -> float:
        """Own probe: bytes a second."""
        return disk.sequential_rate(path, min(self.settings.seconds, 2.0))[0].bytes_per_s

    def try_call(self, what: str, function: str, timeout: float = 600.0, **arguments: Any) -> spawn.Result | str:
        """A measurement in a child, or the reason why there is none."""
        try:
            found = spawn.call(function, timeout, **arguments)
        except spawn.ChildError as exc:
            self.say(f"  {what}: {exc}")
            return str(exc)
        self.foreign.append(found.foreign)
        return found
