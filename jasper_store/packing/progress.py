"""What of a packed dataset is written already, so that a run that was killed is continued.

A line of JSON per step, appended once the step's bytes are on the disk. The first line says what is written: another
source, or other options, begin anew.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Progress"]

_NAME: Final = "progress.jsonl"


class Progress:
    """The steps of a run that are done.

    Args:
        directory: where it is written; the file there is read.
        identity: what the run writes.

    Attributes:
        steps: result of each step that is done, by its key.
        resumed: whether there are steps of an earlier run.
    """

    def __init__(self, directory: Path, identity: str) -> None:
        self._path = directory / _NAME
        self.steps: dict[str, Any] = {}
        self.resumed = self._read(identity)
        if not self.resumed:
            self._path.unlink(missing_ok=True)
        self._file = self._path.open("a", encoding="utf-8")
        if not self.resumed:
            self._append({"identity": identity})

    def _read(self, identity: str) -> bool:
        """Read the steps of an earlier run; False where there is none, or it wrote something else."""
        try:
            lines = self._path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError):
            return False
        try:
            if len(lines) < 2 or json.loads(lines[0]) != {"identity": identity}:
                return False
        except ValueError:
            return False
        whole = len(lines[0].encode()) + 1
        for line in lines[1:-1]:
            try:
                key, result = json.loads(line)
            except (ValueError, TypeError):
                break
            self.steps[key] = result
            whole += len(line.encode()) + 1
        # What a kill has cut off goes, so that the next line is a line.
        os.truncate(self._path, whole)
        return True

    def done(self, key: str, result: Any) -> None:
        """Write down that a step is on the disk."""
        self.steps[key] = result
        self._append([key, result])

    def _append(self, value: Any) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; it stays."""
        self._file.close()

    def remove(self) -> None:
        """Close and remove the file: what was written is whole."""
        self.close()
        self._path.unlink(missing_ok=True)
