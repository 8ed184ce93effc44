"""Parts that were found in a directory, remembered: ten thousand headers need not be read at each opening.

Unlike a generation, which says what the dataset is, this only says what its files said when they were last verified. It
counts while the directory holds just these files, as they were; else the headers are read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from jasper_store.formats.base import Extent, Parts
from jasper_store.formats.files import read_file
from jasper_store.formats.generation import MANIFEST_NAME, Generation, parse_json
from jasper_store.formats.numbered import INDEX_SUFFIX
from jasper_store.formats.part_columns import PartedTensor, PartFiles
from jasper_store.native.stats import stat_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jasper_store.formats.base import FileFacts, FormatName, TensorSpec

__all__ = ["FOUND", "MANY", "FoundParts", "parse_found", "read_found"]

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

    def current_facts(self, root: Path, suffixes: tuple[str, ...]) -> list[FileFacts] | None:
        """What the system says of each file, if a directory holds just these, unchanged; else ``None``.

        Args:
            root: the directory.
            suffixes: endings of the names that count.
        """
        files = self.layout.files
        for name in set(os.listdir(root)).difference(files.names):  # noqa: PTH208 - not by paths: it takes a third of the time
            if name[0] not in "._" and name.lower().endswith((*suffixes, INDEX_SUFFIX)):
                return None
        found = stat_files(root, files.names)
        if found is None or not (np.array_equal(found[0], files.sizes) and np.array_equal(found[1], files.mtimes)):
            return None
        # Plain tuples: objects by the ten thousand make the garbage collector run.
        return list(zip(*found.tolist(), strict=True))

    def paths(self, root: Path) -> list[str]:
        """The files in a directory, in order, as texts."""
        prefix = str(root / "_")[:-1]
        return [prefix + name for name in self.layout.files.names]

    def locate(self, root: Path, paths: Sequence[str]) -> list[TensorSpec]:
        """The tensors, given :meth:`paths`."""
        return self.layout.specs_at(root, dict(enumerate(paths)), 1)

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
        return parse_found(text, path) if f'"{FOUND}"'.encode() in text else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError):
        return None  # a manifest that cannot be understood is refused where it is read as a whole


@lru_cache(maxsize=1)
def parse_found(text: bytes, path: Path) -> FoundParts | None:
    """What a manifest remembers. An opening asks for it twice: where to look, and whether files are as they were.

    Raises:
        ValueError, TypeError, KeyError, CorruptFileError: it makes no sense.
    """
    raw = parse_json(text)
    return FoundParts.from_json(raw[FOUND], path) if FOUND in raw else None
