"""The machine in words that identify no host: processor, memory, kernel, disk, versions."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tools.bench import disk
from tools.bench.block_device import device_of

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["describe"]

LIBRARIES = ("torch", "numpy", "h5py", "safetensors", "psutil", "isal", "xxhash")


def describe(data_dir: Path, more: Iterable[str] = ()) -> dict[str, Any]:
    """Facts that a reader of the figures needs."""
    device = device_of(data_dir)
    names = sorted({*LIBRARIES, *more})
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        "disk": device.name if device else None,
        "file_system": _file_system(data_dir),
        "read_ahead_kib": device.read_ahead_kib if device else None,
        "load_before": os.getloadavg()[0],
        "fio": disk.version_of_fio(),
        "versions": {name: version for name in names if (version := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts: dict[str, str] = {}  # of the first processor
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    found = facts.get("model name") or platform.machine()
    # Some virtual machines say "AMD EPYC" of every generation.
    return f"{found}, family {facts['cpu family']}" if "cpu family" in facts else found


def _file_system(path: Path) -> str:
    """Of the longest mount point above the path."""
    real = path.resolve()
    mounts = [(Path(part.mountpoint), part.fstype) for part in psutil.disk_partitions(all=True)]
    fitting = [(len(mount.parts), kind) for mount, kind in mounts if real.is_relative_to(mount)]
    return max(fitting)[1] if fitting else "unknown"
