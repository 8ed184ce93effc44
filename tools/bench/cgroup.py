"""A memory limit for the cold cases: cgroup v1 or v2, as root; elsewhere the run says that it could not cap."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["CannotCapError", "Cap", "Mounted", "create", "find"]

MOUNTINFO = Path("/proc/self/mountinfo")
PATIENCE_S = 5.0


class CannotCapError(RuntimeError):
    """No memory limit could be set here; the text says why."""


@dataclass(frozen=True)
class Mounted:
    """Where a memory controller is mounted, and of which version."""

    version: Literal[1, 2]
    root: Path


@dataclass(frozen=True)
class Cap:
    """A cgroup with a memory limit; a process joins it itself, so that what it read before is not counted."""

    version: Literal[1, 2]
    path: Path
    limit: int

    def join(self, pid: int | None = None) -> None:
        """Move a process (this one by default) into the cgroup; from here on its memory counts."""
        (self.path / "cgroup.procs").write_text(str(os.getpid() if pid is None else pid), encoding="ascii")

    def peak(self) -> int | None:
        """Most bytes that the cgroup held, page cache included; None where the kernel does not say."""
        name = "memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"
        try:
            return int((self.path / name).read_text(encoding="ascii"))
        except OSError:
            return None

    def remove(self) -> None:
        """Remove the cgroup once its last process is gone.

        Raises:
            OSError: processes stayed in it longer than a few seconds.
        """
        if self.version == 1:
            # Only a help: pages that stay charged move to the parent when the directory goes.
            with contextlib.suppress(OSError):
                (self.path / "memory.force_empty").write_text("0", encoding="ascii")
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            if not self.path.exists():
                return
            time.sleep(0.05)
        self.path.rmdir()

    def to_dict(self) -> dict[str, str | int]:
        """For a child process; :meth:`from_dict` is the way back."""
        return {"version": self.version, "path": str(self.path), "limit": self.limit}

    @classmethod
    def from_dict(cls, facts: dict[str, str | int]) -> Cap:
        """The cap of :meth:`to_dict`."""
        return cls(1 if facts["version"] == 1 else 2, Path(str(facts["path"])), int(facts["limit"]))


def find(mountinfo: Path = MOUNTINFO) -> Mounted:
    """The memory controller of this machine, from the mount table; v1 first, since a hybrid has its memory there.

    Raises:
        CannotCapError: there is none.
    """
    try:
        lines = mountinfo.read_text(encoding="utf-8").splitlines()
    except OSError as exc:
        raise CannotCapError(f"no mount table to find a memory cgroup in ({exc.strerror})") from exc
    unified: Mounted | None = None
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        root = Path(fields[4].replace("\\040", " "))
        if kind[0] == "cgroup" and "memory" in kind[2].split(","):
            return Mounted(1, root)
        if kind[0] == "cgroup2" and "memory" in _words(root / "cgroup.controllers"):
            unified = Mounted(2, root)
    if unified is None:
        raise CannotCapError("no memory cgroup (v1 or v2) is mounted here")
    return unified


def create(limit: int, name: str, mounted: Mounted | None = None) -> Cap:
    """Make a cgroup of this name that may hold at most ``limit`` bytes.

    Raises:
        CannotCapError: no controller, no permission, or the kernel refuses; with what it said.
    """
    place = mounted or find()
    path = place.root / name
    try:
        if place.version == 2 and "memory" not in _words(place.root / "cgroup.subtree_control"):
            (place.root / "cgroup.subtree_control").write_text("+memory", encoding="ascii")
        path.mkdir()
    except OSError as exc:
        raise CannotCapError(f"a memory cgroup could not be made ({exc.strerror}); it takes root") from exc
    cap = Cap(place.version, path, limit)
    try:
        _limit(cap)
    except OSError as exc:
        path.rmdir()
        raise CannotCapError(f"the memory limit could not be set ({exc.strerror})") from exc
    return cap


def _limit(cap: Cap) -> None:
    name = "memory.limit_in_bytes" if cap.version == 1 else "memory.max"
    (cap.path / name).write_text(str(cap.limit), encoding="ascii")
    swap = cap.path / "memory.swap.max"
    if cap.version == 2 and swap.exists():
        swap.write_text("0", encoding="ascii")


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []
