"""Parts that were found in a directory, remembered: ten thousand headers need not be read at each opening.

Unlike a generation, which says what the dataset is, this only says what its files said when they were last verified. It
counts while the directory holds just these files, as they were; else the headers are read.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from jasper_store.formats.base import Extent, Parts
from jasper_store.formats.files import read_file
from jasper_store.formats.generation import MANIFEST_NAME, Generation, PartedTensor, PartFiles
from jasper_store.formats.numbered import INDEX_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jasper_store.formats.base import FormatName, TensorSpec

__all__ = ["FOUND", "MANY", "FoundParts", "read_found"]

MANY: Final = 64
"""Files from which on it is worth remembering what they hold."""
FOUND: Final = "found"
"""Key in the manifest."""


@dataclass(frozen=True)
class FoundParts:
    """What the files of a directory held.

    Attributes:
        layout: the files and the parts, as the first generation of a dataset.
        passed: name of a check to the digest of the layout that passed it.
    """

    layout: Generation
    passed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        root: Path,
        chosen: FormatName,
        specs: Sequence[TensorSpec],
        facts: Mapping[Path, tuple[int, int, str | None]],
    ) -> FoundParts | None:
        """What is worth remembering; ``None`` where it is little, or cannot be said as parts of files.

        Args:
            root: the directory.
            chosen: its format.
            specs: its tensors.
            facts: size, modification time in nanoseconds and hash of a sample of each file.
        """
        if len(facts) < MANY or any(path.parent != root for path in facts):
            return None
        numbers = {path: number for number, path in enumerate(facts)}
        tensors = {}
        for spec in specs:
            place = spec.location
            if isinstance(place, Parts):
                file_of = np.array([numbers[path] for path in place.files], np.int64)[place.file_of]
                offsets, rows = place.offsets, np.diff(place.starts)
            elif isinstance(place, Extent) and spec.contiguous and spec.shape:
                file_of, offsets, rows = (
                    np.array([n], np.int64) for n in (numbers[place.path], place.offset, spec.n_rows)
                )
            else:
                return None
            since, until = np.ones(len(rows), np.int64), np.zeros(len(rows), np.int64)
            unknown = (None,) * len(rows)
            tensors[spec.name] = PartedTensor(spec.dtype, spec.shape[1:], file_of, offsets, rows, since, until, unknown)
        sizes, mtimes, samples = zip(*facts.values(), strict=True)
        files = PartFiles(
            tuple(path.name for path in facts), np.array(sizes, np.int64), np.array(mtimes, np.int64), samples
        )
        return cls(Generation(1, chosen, files, tensors))

    def is_current(self, root: Path, suffixes: tuple[str, ...]) -> bool:
        """Whether a directory holds just these files, of all whose names end like this, unchanged."""
        files = self.layout.files
        expected = dict(zip(files.names, zip(files.sizes.tolist(), files.mtimes.tolist(), strict=True), strict=True))
        with os.scandir(root) as entries:
            for entry in entries:
                name = entry.name
                if name[0] in "._" or not name.lower().endswith((*suffixes, INDEX_SUFFIX)):
                    continue
                facts = entry.stat()
                if expected.pop(name, None) != (facts.st_size, facts.st_mtime_ns):
                    return False
        return not expected

    def locate(self, root: Path) -> list[TensorSpec]:
        """The tensors."""
        return self.layout.specs_at(
            root, {number: root / name for number, name in enumerate(self.layout.files.names)}, 1
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.layout.to_json(), "passed": dict(self.passed)}

    @classmethod
    def from_json(cls, raw: Any, path: Path) -> FoundParts:
        """Check and build; errors as :meth:`Generation.from_json`."""
        passed = raw["passed"]
        if not isinstance(passed, dict) or not all(isinstance(mark, str) for mark in passed.values()):
            raise TypeError(f"passed {passed!r:.60}")
        return cls(Generation.from_json(raw, path), passed)


def read_found(root: Path) -> FoundParts | None:
    """What the manifest of a directory remembers; ``None`` where it remembers nothing, or nothing that makes sense."""
    path = root / MANIFEST_NAME
    try:
        text = read_file(path)
        raw = json.loads(text) if f'"{FOUND}"'.encode() in text else {}
        return FoundParts.from_json(raw[FOUND], path) if FOUND in raw else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError):
        return None  # a manifest that cannot be understood is refused where it is read as a whole
