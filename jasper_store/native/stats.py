"""What the system says of many files of a directory, in one call (``stats.c``) where it was built."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import numpy as np

from jasper_store.native.library import library

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["stat_files"]


# Names are looked up in a directory that may not be listed, too.
_DIRECTORY: Final = getattr(os, "O_PATH", os.O_RDONLY)


def stat_files(directory: Path, names: Sequence[str]) -> NDArray[np.int64] | None:
    """Size, modification time in nanoseconds, inode and device of each file; links are followed.

    Args:
        directory: where the names are looked up.
        names: without a zero byte.

    Returns:
        int64 [4, len(names)]; ``None`` if one of them is not there, or cannot be reached.
    """
    found = np.empty((4, len(names)), np.int64)
    compiled = library()
    if compiled is None:
        return _one_by_one(directory, names, found)
    text = os.fsencode("\0".join(names)) + b"\0"
    opened = os.open(directory, _DIRECTORY)
    try:
        seen = compiled.jasper_stat_files(opened, text, len(names), found.ctypes.data)
    finally:
        os.close(opened)
    return found if seen == len(names) else None


def _one_by_one(directory: Path, names: Sequence[str], found: NDArray[np.int64]) -> NDArray[np.int64] | None:
    try:
        for number, name in enumerate(names):
            facts = os.stat(directory / name)  # noqa: PTH116 - ten thousand of them: twice as fast as Path.stat
            found[:, number] = facts.st_size, facts.st_mtime_ns, facts.st_ino, facts.st_dev
    except OSError:
        return None
    return found
