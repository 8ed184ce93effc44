"""What is kept of fuzzing over many runs: how many inputs were read, and those that show a defect."""

from __future__ import annotations

import hashlib
import mmap
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Counts", "keep"]

_COUNTS = struct.Struct("<6q")
_ROOM = 1 << 17
_EACH = 3
"""Inputs that are kept of one defect."""


class Counts:
    """Counts of one target, in a file that outlives the process, and the input that is being read.

    Attributes:
        traced: inputs that were guided by coverage.
        untraced: inputs of the corpus that were changed at random.
        opened: those that were not refused.
        found: inputs that were kept as defects.
        starts: processes.
        guided: which inputs are counted.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.truncate(_COUNTS.size + _ROOM)
            self.shared = mmap.mmap(file.fileno(), _COUNTS.size + _ROOM)
        self.traced, self.untraced, self.opened, self.found, self.starts, self._length = _COUNTS.unpack_from(
            self.shared
        )
        self.guided = True

    def begin(self, data: bytes) -> None:
        """Note an input before it is read."""
        if self.guided:
            self.traced += 1
        else:
            self.untraced += 1
        self._write(len(data))
        self.shared[_COUNTS.size : _COUNTS.size + len(data)] = data

    def current(self) -> bytes:
        """The input that was noted last."""
        return bytes(self.shared[_COUNTS.size : _COUNTS.size + self._length])

    def end(self) -> None:
        """No input is being read any more."""
        self._write(0)

    def _write(self, length: int) -> None:
        _COUNTS.pack_into(self.shared, 0, self.traced, self.untraced, self.opened, self.found, self.starts, length)


def keep(folder: Path, data: bytes, kind: str, why: str) -> bool:
    """Write an input that shows a defect, unless there are enough of its kind; whether it was written."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = hashlib.sha256(kind.encode()).hexdigest()[:8]
    if len(list(folder.glob(f"{mark}-*.bin"))) >= _EACH:
        return False
    path = folder / f"{mark}-{hashlib.sha256(data).hexdigest()[:8]}.bin"
    path.write_bytes(data)
    path.with_suffix(".txt").write_text(f"{kind}\n{why}")
    return True
