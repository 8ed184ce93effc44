"""What ``jasper_store.json`` says, as values: what a dataset's files were when they were written or checked.

It saves two things: a file that is not the one that was written is refused before a model is trained on it, and a
check that passed once is not repeated. :mod:`jasper_store.store.manifest_file` reads and writes it.

How a file is recognised. A *fingerprint* is its size, its modification time in nanoseconds, and a hash of a 1 MiB
sample: 16 windows of 64 KiB spread over the file. Size and time are compared first, which costs a microsecond.

* The size differs: the file was truncated or replaced. ``CorruptFileError``.
* Only the time differs: the dataset was copied (``cp`` without ``-p``, a download, an unpacked archive), which is
  legitimate, or a file was replaced by one of the same shape, which is not. The sample tells them apart in a few
  milliseconds at any size: equal means a copy, and what was recorded still holds; different is refused with
  ``CorruptFileError``. Damage that the sample misses is what ``verify`` finds, by the checksums of all values.
* The file has no entry: nothing is recorded of it; it is opened and validated as if there were no manifest.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jasper_store.errors import CorruptFileError
from jasper_store.files.fingerprint import FileFingerprint
from jasper_store.formats.base import Parts
from jasper_store.formats.files import dtype_name
from jasper_store.formats.found import FOUND, FoundParts
from jasper_store.formats.generation import MANIFEST_NAME, Generation
from jasper_store.formats.registry import format_for

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from jasper_store.formats.base import TensorSpec

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "PARTS_VERSION",
    "FileEntry",
    "Manifest",
    "SourceFile",
    "TensorEntry",
    "key_of",
]

FORMAT_VERSION = 1
PARTS_VERSION = 2  # of a manifest that names parts: a release that does not know them refuses it


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file, as it was written.

    Attributes:
        dtype: torch's name without the prefix, e.g. ``"bfloat16"``.
        shape: sizes.
        xxh3_128: hex of the hash of its values, C order, little-endian; ``None`` where it was not computed.
    """

    dtype: str
    shape: tuple[int, ...]
    xxh3_128: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"dtype": self.dtype, "shape": list(self.shape), "xxh3_128": self.xxh3_128}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that another was made from.

    Attributes:
        path: relative to the dataset's directory, with forward slashes; absolute where it lies on another drive.
        fingerprint: what it was when it was read.
    """

    path: str
    fingerprint: FileFingerprint

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"path": self.path, **self.fingerprint.to_json()}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the dataset.

    Attributes:
        fingerprint: what it was when it was written.
        tensors: the tensors in it by name.
        made_from: the files that it was converted from; empty if it was written from memory.
    """

    fingerprint: FileFingerprint
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    made_from: tuple[SourceFile, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **self.fingerprint.to_json(),
            "tensors": {name: entry.to_json() for name, entry in self.tensors.items()},
            "made_from": [source.to_json() for source in self.made_from],
        }


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of one directory, as values. Immutable; it is changed through ``manifest_file.update``.

    Attributes:
        directory: where it lies.
        files: file name (relative, forward slashes) to what was written there.
        verified: name of a check to the files that passed it together, with their fingerprints then.
        generation: the parts that make the dataset, where it has grown; their files have no entry in ``files``.
        verified_parts: name of a check to the digest of the generation that passed it.
        found: parts that were found in the directory's files when they were last verified.
        pending: files that are still to be written before the directory is a dataset.
    """

    directory: Path
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    verified: Mapping[str, Mapping[str, FileFingerprint]] = field(default_factory=dict)
    generation: Generation | None = None
    verified_parts: Mapping[str, str] = field(default_factory=dict)
    found: FoundParts | None = None
    pending: tuple[str, ...] = ()

    def check(self, specs: Sequence[TensorSpec]) -> list[str]:
        """Compare files with their entries; milliseconds, whatever their size.

        Args:
            specs: the tensors that are about to be opened.

        Returns:
            Texts for StaleDataWarning: files whose source has changed since they were made.

        Raises:
            CorruptFileError: a file is not the one that was written, or files are still to be written.
        """
        if self.pending:
            names = ", ".join(self.pending[:5]) + (", ..." if len(self.pending) > 5 else "")
            msg = (
                f"{self.directory}: expected a whole dataset, found a conversion that was not finished ({names}); wait for "
                "it, or run it again"
            )
            raise CorruptFileError(msg, path=self.directory)
        if not self.files and self.generation is None:
            return []
        stale: list[str] = []
        by_path: dict[str, list[TensorSpec]] = {}
        parts = self._part_numbers()
        seen: set[int] = set()
        for spec in specs:
            for text in spec.path_texts:
                number = parts.get(text)
                if number is None:
                    by_path.setdefault(text, []).append(spec)
                elif number not in seen:
                    seen.add(number)
                    self._check_part(text, number)
        for text, held in by_path.items() if self.files else ():
            path = Path(text)
            entry = self.files.get(key_of(self.directory, path) or "")
            if entry is None:
                continue
            if not entry.fingerprint.matches(path):
                raise _replaced(path, entry.fingerprint)
            stale += [found for source in entry.made_from if (found := self._stale(path, source))]
            for spec in held:
                if not isinstance(spec.location, Parts):  # an entry says what its file holds, not the whole
                    _compare(spec, entry.tensors.get(spec.name))
        return stale

    def _part_numbers(self) -> dict[str, int]:
        """Number in the generation of each of its files, by its path as text."""
        if self.generation is None:
            return {}
        prefix = str(self.directory / "_")[:-1]  # as a path writes itself: nothing for "."
        return {prefix + name: number for number, name in enumerate(self.generation.files.names)}

    def _check_part(self, path: str, number: int) -> None:
        assert self.generation is not None
        files = self.generation.files
        facts = os.stat(path)  # noqa: PTH116 - ten thousand of them: twice as fast as Path.stat
        if facts.st_mtime_ns == files.mtimes[number] and facts.st_size == files.sizes[number]:
            return
        known = FileFingerprint(int(files.sizes[number]), int(files.mtimes[number]), files.samples[number])
        if not known.matches(path):
            raise _replaced(Path(path), known)

    def _stale(self, path: Path, source: SourceFile) -> str:
        origin = self.directory / source.path
        # A manifest from elsewhere may name any path of this machine. Sources are data files, so nothing else is read.
        if format_for(origin) is None:
            return ""
        try:
            if source.fingerprint.matches(origin):
                return ""
        except OSError:
            return ""  # the source may be gone: that is what conversion is for
        return (
            f"{path.name} was made from {origin}, which has changed since; convert it again (jasper-store convert), "
            "or choose the source's format"
        )

    def made_from_is_known(self, path: Path) -> bool:
        """Whether the manifest knows what a file was made from, so that file times need not be guessed from."""
        entry = self.files.get(key_of(self.directory, path) or "")
        return entry is not None and bool(entry.made_from)

    def checksum(self, spec: TensorSpec) -> str | None:
        """xxh3-128 of a tensor's values as they were written, in hex; ``None`` where the manifest has none.

        A tensor in parts has one checksum per part, and none as a whole.
        """
        if isinstance(spec.location, Parts):
            return None
        entry = self.files.get(key_of(self.directory, spec.path) or "")
        tensor = entry.tensors.get(spec.name) if entry else None
        return tensor.xxh3_128 if tensor else None

    def is_verified(self, specs: Sequence[TensorSpec], check: str) -> bool:
        """Whether all files of these tensors passed ``check`` together and have not changed since.

        Of a generation it is enough that it is the same one: opening has compared its files, which never change.
        """
        paths = dict.fromkeys(path for spec in specs for path in spec.path_texts)
        if self.holds_generation(paths):
            assert self.generation is not None
            return self.verified_parts.get(check) == self.generation.digest()
        if self.found is not None and check in self.found.passed:
            return self.found.passed[check] == self.found.layout.digest() and self._are_as_found(paths)
        marks = self.verified.get(check, {})
        for path in paths:
            fingerprint = marks.get(key_of(self.directory, Path(path)) or "")
            try:
                if fingerprint is None or not fingerprint.matches(path):
                    return False
            except OSError:
                return False
        return True

    def holds_generation(self, paths: Collection[str]) -> bool:
        """Whether these files, by their paths as texts, are those of the newest generation: none less, none more."""
        if self.generation is None:
            return False
        parts = self._part_numbers()
        found = {parts.get(path, -1) for path in paths}
        return found == set(self.generation.files_of(self.generation.number).tolist())

    def _are_as_found(self, paths: Collection[str]) -> bool:
        """Whether these are the files that were found, unchanged."""
        assert self.found is not None
        files = self.found.layout.files
        names = self.found.paths(self.directory)
        expected = dict(zip(names, zip(files.sizes.tolist(), files.mtimes.tolist(), strict=True), strict=True))
        try:
            for path in paths:
                facts = os.stat(path)  # noqa: PTH116 - as in _check_part
                if expected.pop(path, None) != (facts.st_size, facts.st_mtime_ns):
                    return False
        except OSError:
            return False
        return not expected

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the format version."""
        parts: dict[str, Any] = {}
        if self.found is not None:
            parts[FOUND] = self.found.to_json()
        if self.generation is not None:
            parts |= {"generation": self.generation.to_json(), "verified_parts": dict(self.verified_parts)}
        return {
            "format_version": FORMAT_VERSION if self.generation is None else PARTS_VERSION,
            **parts,
            **({"pending": list(self.pending)} if self.pending else {}),
            "files": {name: entry.to_json() for name, entry in sorted(self.files.items())},
            "verified": {
                check: {name: fingerprint.to_json() for name, fingerprint in sorted(marks.items())}
                for check, marks in sorted(self.verified.items())
            },
        }


def key_of(directory: Path, path: Path) -> str | None:
    """Name of a file in the manifest; ``None`` for one outside its directory."""
    try:
        return path.relative_to(directory).as_posix()
    except ValueError:
        return None


def _replaced(path: Path, fingerprint: FileFingerprint) -> CorruptFileError:
    size = path.stat().st_size
    if size < fingerprint.size:
        what = f"it is truncated: expected {fingerprint.size:,} bytes, found {size:,}"
    elif size > fingerprint.size:
        what = f"it was replaced or appended to: expected {fingerprint.size:,} bytes, found {size:,}"
    else:
        what = "it was replaced: its size is as expected, its time and its content are not"
    msg = (
        f"{path}: not the file recorded in {MANIFEST_NAME}; {what}. Copy or convert the dataset again; if the "
        f"change was meant, delete {path.parent / MANIFEST_NAME} and run jasper-store verify"
    )
    return CorruptFileError(msg, path=path)


def _compare(spec: TensorSpec, entry: TensorEntry | None) -> None:
    """Dtype and shape as in the manifest; a tensor that it does not list is not compared."""
    if entry is not None and (entry.dtype != dtype_name(spec.dtype) or entry.shape != spec.shape):
        msg = (
            f"{spec.path}: {spec.name} was written as {entry.dtype} {list(entry.shape)}, its header now says "
            f"{dtype_name(spec.dtype)} {list(spec.shape)}: the file was replaced or damaged; copy or convert it again"
        )
        raise CorruptFileError(msg, path=spec.path, tensor=spec.name)
