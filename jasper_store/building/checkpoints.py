"""Finished blocks of a run, kept in a directory, so that a run that was killed goes on where it was."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from jasper_store.files.atomic import clean_stale, map_os_errors, write_bytes

__all__ = ["Checkpoints"]

_NAME: Final = re.compile(r"block-(?P<start>\d{12})-(?P<stop>\d{12})\.npz")


class Checkpoints:
    """Blocks of one run, each in a file that is written whole or not at all.

    Args:
        workdir: directory that runs are kept in.
        key: hash of everything that decides the result; a run with another key starts anew.

    Raises:
        ConversionError: the directory cannot be made.
    """

    def __init__(self, workdir: Path, key: str) -> None:
        self._directory = workdir / f"mining-{key}"
        with map_os_errors(workdir):
            self._directory.mkdir(parents=True, exist_ok=True)
            clean_stale(self._directory)

    def save(self, start: int, stop: int, **arrays: np.ndarray) -> None:
        """Keep the results of tasks start to stop.

        Raises:
            ConversionError: no room, or the system refused.
        """
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **arrays)
        write_bytes(self._directory / f"block-{start:012d}-{stop:012d}.npz", content.getvalue())

    def saved(self) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
        """The blocks that are there, in order and without overlap."""
        done = 0
        for path in sorted(self._directory.iterdir()):
            match = _NAME.fullmatch(path.name)
            if match is None or int(match["start"]) < done:
                continue
            with np.load(path, allow_pickle=False) as found:
                yield int(match["start"]), int(match["stop"]), dict(found)
            done = int(match["stop"])
