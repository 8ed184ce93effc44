"""A memory cgroup of a test's own, where one can be made."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jasper_store.memory.mounts import read_mountinfo

__all__ = ["limited"]


@contextlib.contextmanager
def limited(nbytes: int) -> Iterator[Path]:
    """An empty cgroup with a limit; the test is skipped where there can be none. What is left in it at the end is killed."""
    for mount in read_mountinfo():
        old = mount.fstype == "cgroup" and "memory" in mount.options
        if old or (mount.fstype == "cgroup2" and "memory" in _controllers(mount.point)):
            folder = Path(mount.point) / f"jasper_store_test_{os.getpid()}"
            break
    else:
        pytest.skip("no memory cgroup hierarchy is mounted")
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(nbytes))
    except OSError as exc:
        pytest.skip(f"memory cgroups cannot be made here: {exc}")
    try:
        yield folder
    finally:
        # Workers outlive a process that the limit ended.
        for _ in range(100):
            left = (folder / "cgroup.procs").read_text().split()
            if not left:
                break
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.1)
        folder.rmdir()


def _controllers(point: str) -> list[str]:
    enabled = Path(point) / "cgroup.subtree_control"
    return enabled.read_text().split() if enabled.exists() else []
