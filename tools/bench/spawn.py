"""Running one function in a process of its own, and watching what memory it takes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

__all__ = ["ChildError", "Memory", "Result", "call"]

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_S = 0.05
TICKS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
FIELDS = {"RssAnon:": "anonymous", "RssFile:": "file", "RssShmem:": "shared"}


class ChildError(RuntimeError):
    """The function raised, was killed, or ran past its time; the text is the last line of what it said."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a process and its own children (workers), as the kernel splits them."""

    anonymous: int = 0
    file: int = 0
    shared: int = 0

    def largest(self, other: Memory) -> Memory:
        """The larger of each."""
        return Memory(max(self.anonymous, other.anonymous), max(self.file, other.file), max(self.shared, other.shared))


@dataclass(frozen=True)
class Result:
    """What a child found, and what it took.

    Attributes:
        value: what the function returned.
        peak: largest sizes inside the window that it timed.
        start: sizes when the window began.
        foreign: share of the processors that other programs used meanwhile; near 0 on a quiet machine.
    """

    value: dict[str, Any]
    peak: Memory
    start: Memory
    foreign: float = 0.0

    @property
    def grown(self) -> int:
        """Anonymous bytes that the timed part added: the libraries that were imported before do not count."""
        return max(self.peak.anonymous - self.start.anonymous, 0)


def call(function: str, timeout: float = 600.0, **arguments: Any) -> Result:
    """Call ``"package.module:function"`` with JSON-able arguments in a new interpreter.

    A dictionary that the function returns may hold ``window``: two ``time.monotonic`` moments, between which
    peaks are taken.

    Raises:
        ChildError: it failed; nothing of it is left running.
    """
    with tempfile.TemporaryDirectory(prefix="jasper-bench-") as folder:
        answer, errors = Path(folder) / "answer.json", Path(folder) / "errors.txt"
        command = [sys.executable, "-m", "tools.bench.child", function, str(answer)]
        meter = _Processors()
        with errors.open("wb") as sink:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=sink, stderr=sink, cwd=ROOT, start_new_session=True
            )
        try:
            samples = _watch(child, json.dumps(arguments), time.monotonic() + timeout)
        finally:
            _end(child)
        foreign = meter.foreign()
        said = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if samples is None:
            raise ChildError(f"{function} ran past {timeout:.0f} s")
        if child.returncode or not answer.exists():
            if child.returncode == -signal.SIGKILL:
                raise ChildError("killed: it needs more memory than it was given")
            raise ChildError(said[-1] if said else f"{function} ended with status {child.returncode} and said nothing")
        value = json.loads(answer.read_text(encoding="utf-8"))
    begin, end = value.pop("window", (0.0, float("inf")))
    return Result(value, *_peaks(samples, begin, end), foreign)


class _Processors:
    """How busy others kept the processors since it was made."""

    def __init__(self) -> None:
        self.before = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Processor seconds of the machine, busy ones of them, and this process's children's own."""
        times = psutil.cpu_times()
        total = sum(getattr(times, name, 0.0) for name in TICKS)
        own = os.times()
        return total, total - times.idle - getattr(times, "iowait", 0.0), own.children_user + own.children_system

    def foreign(self) -> float:
        total, busy, own = (now - before for now, before in zip(self._now(), self.before, strict=True))
        return min(max(busy - own, 0.0) / total, 1.0) if total > 0 else 0.0


def _watch(child: subprocess.Popen[bytes], arguments: str, deadline: float) -> list[tuple[float, Memory]] | None:
    """Samples until it ends, or None if it did not in time."""
    if child.stdin is None:
        raise RuntimeError("the child has no standard input")
    # A child that died on the way up: what it said tells why.
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(arguments.encode())
        child.stdin.close()
    samples = []
    while child.poll() is None:
        now = time.monotonic()
        if now > deadline:
            return None
        samples.append((now, _tree(child.pid)))
        time.sleep(SAMPLE_S)
    return samples


def _end(child: subprocess.Popen[bytes]) -> None:
    """Its whole session: a loader's workers must not outlive a child that was stopped."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _peaks(samples: list[tuple[float, Memory]], begin: float, end: float) -> tuple[Memory, Memory]:
    inside = [memory for at, memory in samples if begin <= at <= end]
    before = [memory for at, memory in samples if at < begin]
    start = before[-1] if before else (inside[0] if inside else Memory())
    peak = start
    for memory in inside:
        peak = peak.largest(memory)
    return peak, start


def _tree(pid: int) -> Memory:
    """The process and its workers together; mapped pages that they share count once each."""
    try:
        pids = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return Memory()
    totals = dict.fromkeys(FIELDS.values(), 0)
    for each in pids:
        try:
            status = Path(f"/proc/{each}/status").read_text(encoding="ascii", errors="replace")
        except OSError:
            continue
        for line in status.splitlines():
            key = FIELDS.get(line.split(maxsplit=1)[0]) if line else None
            if key:
                totals[key] += int(line.split()[1]) * 1024
    return Memory(**totals)
