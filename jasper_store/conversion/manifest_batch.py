"""A conversion's entries in the manifest: what every file holds and what it was made from."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jasper_store.files.atomic import map_os_errors
from jasper_store.files.fingerprint import FileFingerprint
from jasper_store.formats.files import dtype_name
from jasper_store.store.manifest import MANIFEST_NAME, FileEntry, Manifest, SourceFile, TensorEntry
from jasper_store.store.manifest_file import update

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from jasper_store.conversion.plan import FileTask

__all__ = ["ManifestBatch"]

_SECONDS = 1.0  # between two writes of the manifest: entries that a kill loses are compared again by the next run


class ManifestBatch:
    """Entries of one directory's manifest, collected and written together."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fingerprints: dict[Path, FileFingerprint] = {}
        self._entries: dict[str, FileEntry] = {}
        self._written = time.monotonic()
        self._begun = False

    def entry(self, task: FileTask, path: Path, checksums: Mapping[str, str], wanted: torch.dtype | None) -> FileEntry:
        """Describe a file that was written for a task, wherever it lies for now."""
        paths = dict.fromkeys(path for spec in task.specs for path in spec.paths)
        tensors = {
            spec.name: TensorEntry(dtype_name(dtype), spec.shape, checksums[spec.name])
            for spec, dtype in task.written(wanted)
        }
        return FileEntry(FileFingerprint.of(path), tensors, tuple(self._source(source) for source in paths))

    def _source(self, path: Path) -> SourceFile:
        if path not in self._fingerprints:
            self._fingerprints[path] = FileFingerprint.of(path)
        real = path.resolve()
        try:
            # Of the real places: ".." of a directory that is reached through a link leads elsewhere.
            relative = Path(os.path.relpath(real, self._directory.resolve())).as_posix()
        except ValueError:  # another drive
            relative = real.as_posix()
        return SourceFile(relative, self._fingerprints[path])

    def add(self, target: Path, entry: FileEntry) -> None:
        """Add an entry to the next write."""
        self._entries[target.name] = entry

    def begin(self, names: Sequence[str]) -> None:
        """Write down that these files are to come, so that the directory does not open before :meth:`finish`.

        Raises:
            ConversionError, CorruptFileError: as :meth:`write`.
        """
        with map_os_errors(self._directory / MANIFEST_NAME):
            update(self._directory, lambda old: replace(old, pending=tuple(names)))
        self._begun = True

    def finish(self) -> None:
        """Write what was added; the directory opens from now on.

        Raises:
            ConversionError, CorruptFileError: as :meth:`write`.
        """
        if self._begun:
            entries, self._entries = self._entries, {}
            with map_os_errors(self._directory / MANIFEST_NAME):
                update(self._directory, lambda old: replace(old, files={**old.files, **entries}, pending=()))
            self._begun = False
        self.write()

    def write_if_due(self) -> None:
        """Write what was added if the last time was a while ago."""
        if time.monotonic() - self._written > _SECONDS:
            self.write()

    def write(self) -> None:
        """Write what was added since the last time.

        Raises:
            ConversionError: the directory cannot be written.
            CorruptFileError: the manifest that is there cannot be understood.
        """
        if self._entries:
            entries, self._entries = self._entries, {}
            with map_os_errors(self._directory / MANIFEST_NAME):
                update(self._directory, lambda old: replace(old, files={**old.files, **entries}))
        self._written = time.monotonic()

    def forget(self, target: Path) -> None:
        """Take a file's entry out of the manifest.

        Raises:
            ConversionError, CorruptFileError: as :meth:`write`.
        """

        def without(old: Manifest) -> Manifest:
            return replace(old, files={name: entry for name, entry in old.files.items() if name != target.name})

        with map_os_errors(self._directory / MANIFEST_NAME):
            update(self._directory, without)
