"""A memory cgroup of a test's own, where one can be made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jasper_store.memory.mounts import read_mountinfo

__all__ = ["limited"]


@contextlib.contextmanager
def limited(nbytes: int) -> Iterator[Path]:
    """An empty cgroup with a limit; the test is skipped where there can be none. What joins it must leave before the end."""
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
    yield folder
    folder.rmdir()


def _controllers(point: str) -> list[str]:
    enabled = Path(point) / "cgroup.subtree_control"
    return enabled.read_text().split() if enabled.exists() else []
