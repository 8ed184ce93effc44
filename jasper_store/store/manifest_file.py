"""``jasper_store.json`` on the disk: read on opening, changed under a lock, replaced in one step.

A manifest that is there and cannot be understood is refused, never ignored: it may be the only sign that something
is wrong. One that is missing, or a directory that cannot be written, is no error.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jasper_store.errors import CorruptFileError, DatasetNotFoundError
from jasper_store.files.atomic import write_bytes
from jasper_store.files.fingerprint import FileFingerprint
from jasper_store.files.lock import exclusive
from jasper_store.formats.files import read_file
from jasper_store.formats.found import MANY, FoundParts, parse_found
from jasper_store.formats.generation import Generation, parse_json
from jasper_store.formats.part_columns import safe_name
from jasper_store.store.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    PARTS_VERSION,
    FileEntry,
    Manifest,
    SourceFile,
    TensorEntry,
    key_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from jasper_store.formats.base import FormatName, TensorSpec
    from jasper_store.formats.registry import Located

__all__ = ["MANIFEST_LOCK", "read", "read_and_check", "record_checks", "remember_parts", "update", "write"]

MANIFEST_LOCK = f".{MANIFEST_NAME}.lock"
_LOCK_SECONDS = 5.0


def read(directory: str | os.PathLike[str]) -> Manifest | None:
    """The manifest of a directory; ``None`` if there is none.

    Raises:
        CorruptFileError: it is there and cannot be understood.
    """
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    try:
        text = read_file(path)
    except DatasetNotFoundError as exc:
        if isinstance(exc.__cause__, (FileNotFoundError, NotADirectoryError)):
            return None
        msg = f"{exc} Make it readable, or delete it and run jasper-store verify."
        raise CorruptFileError(msg, path=path) from exc
    try:
        return _parse(directory, text)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        detail = f"missing {exc}" if isinstance(exc, KeyError) else str(exc)
        # Without a manifest that names parts, the dataset would be the files it began with.
        advice = "restore it" if b'"generation"' in text else "delete it and run jasper-store verify"
        msg = f"{path}: not a manifest that this release understands ({detail}); {advice}"
        raise CorruptFileError(msg, path=path) from exc


def read_and_check(directory: Path, located: Located) -> tuple[Manifest | None, list[str]]:
    """The manifest of a directory, and texts about files that are older than what they were made from.

    Raises:
        CorruptFileError: the manifest cannot be understood, or a file is not the one that it records.
    """
    manifest = read(directory)
    if manifest is None:
        return None, list(located.warnings)
    try:
        stale = manifest.check(located.specs)
    except OSError as exc:
        raise CorruptFileError(f"{exc.filename}: was removed while the dataset was opened; open it again") from exc
    # A manifest that knows what the files were made from judges by content; file times alone are a guess, and
    # copying a directory shuffles them.
    known = all(manifest.made_from_is_known(spec.path) for spec in located.specs)
    return manifest, stale if known else [*stale, *located.warnings]


def _parse(directory: Path, text: bytes) -> Manifest:
    raw = parse_json(text)
    version = raw["format_version"]
    if version != (PARTS_VERSION if "generation" in raw else FORMAT_VERSION):
        msg = f"format_version {version!r}, expected {FORMAT_VERSION}, or {PARTS_VERSION} where it names parts"
        raise ValueError(msg)
    files = {safe_name(name): _parse_file(entry) for name, entry in raw["files"].items()}
    verified = {
        _typed(check, str): {safe_name(name): _parse_fingerprint(mark) for name, mark in marks.items()}
        for check, marks in raw.get("verified", {}).items()
    }
    if version == FORMAT_VERSION:
        pending = tuple(safe_name(name) for name in _typed(raw.get("pending", []), list))
        found = parse_found(text, directory / MANIFEST_NAME)
        return Manifest(directory, files, verified, found=found, pending=pending)
    generation = Generation.from_json(raw["generation"], directory / MANIFEST_NAME)
    passed = {
        _typed(check, str): str(_hex(_typed(mark, str))) for check, mark in _typed(raw["verified_parts"], dict).items()
    }
    return Manifest(directory, files, verified, generation, passed)


def _parse_file(raw: Any) -> FileEntry:
    tensors = {
        _typed(name, str): TensorEntry(
            _typed(entry["dtype"], str),
            tuple(_typed(n, int) for n in _typed(entry["shape"], list)),
            _hex(entry.get("xxh3_128")),
        )
        for name, entry in raw["tensors"].items()
    }
    sources = tuple(
        SourceFile(_source_path(s["path"]), _parse_fingerprint(s)) for s in _typed(raw.get("made_from", []), list)
    )
    return FileEntry(_parse_fingerprint(raw), tensors, sources)


def _source_path(value: Any) -> str:
    path = str(_typed(value, str))
    if "\0" in os.fsdecode(os.fsencode(path)):
        msg = f"a path with a NUL, {path!r:.60}"
        raise ValueError(msg)
    return path


def _parse_fingerprint(raw: Any) -> FileFingerprint:
    size, mtime = _typed(raw["size"], int), _typed(raw["mtime_ns"], int)
    if size < 0:
        msg = f"size {size}"
        raise ValueError(msg)
    return FileFingerprint(size, mtime, _hex(raw.get("sample")))


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        msg = f"expected {kind.__name__}, found {value!r:.60}"
        raise TypeError(msg)
    return value


def _hex(value: Any) -> str | None:
    if value is None:
        return None
    if len(_typed(value, str)) != 32 or not set(value) <= set("0123456789abcdef"):
        msg = f"expected 32 hex digits, found {value!r:.60}"
        raise ValueError(msg)
    return str(value)


def update(
    directory: str | os.PathLike[str], change: Callable[[Manifest], Manifest], *, wait: float = _LOCK_SECONDS
) -> Manifest:
    """Read, change and write a manifest while no other thread or process does.

    Args:
        directory: the dataset's directory, which exists.
        change: takes the manifest (empty if there was none) and returns the new one.
        wait: seconds to wait for another process that is writing it.

    Returns:
        What was written.

    Raises:
        ConversionError: the directory cannot be written, or another process kept the lock.
        CorruptFileError: the manifest that is there cannot be understood.
    """
    directory = Path(directory)
    # A file, and not the directory itself: network file systems lock only what is open for writing. Where there are no
    # locks at all, a lost update costs a check that is run again, which is not worth a warning at each opening.
    with exclusive(directory / MANIFEST_LOCK, f"writing {directory / MANIFEST_NAME}", wait=wait, warn=False):
        changed = change(read(directory) or Manifest(directory))
        write(changed)
    return changed


def write(manifest: Manifest) -> None:
    """Write a manifest beside the data, whole or not at all. Unlike :func:`update` it takes no lock.

    Raises:
        ConversionError: the directory cannot be written; the old manifest, if any, is untouched.
    """
    # With parts in columns: an element a line would be most of the file.
    layout = 1 if manifest.generation is None and manifest.found is None else None
    text = json.dumps(manifest.to_json(), indent=layout)
    write_bytes(manifest.directory / MANIFEST_NAME, f"{text}\n".encode())


def record_checks(
    directory: str | os.PathLike[str],
    specs: Sequence[TensorSpec],
    checks: Sequence[str],
    chosen: FormatName = "safetensors",
) -> bool:
    """Record that all files of these tensors passed some checks together, where the directory can be written.

    Returns:
        False where it could not be written (read-only or vanished directory, files outside of it, a
        lock held by another process).

    Raises:
        CorruptFileError: the manifest that is there cannot be understood.
    """
    directory = Path(directory)
    paths = dict.fromkeys(path for spec in specs for path in spec.path_texts)
    try:
        known = read(directory)
        if known is not None and known.generation is not None:
            return _record_parts(directory, known, paths, checks)
        marks = {}
        for path in paths:
            key = key_of(directory, Path(path))
            if key is None:
                return False
            marks[key] = FileFingerprint.of(path)
        facts = {directory / key: (mark.size, mark.mtime_ns, mark.sample) for key, mark in marks.items()}
        found = FoundParts.of(directory, chosen, specs, facts)
        update(directory, lambda old: _with_checks(old, found, marks, checks))
    except OSError:
        return False
    return True


def remember_parts(located: Located) -> bool:
    """Record where the tensors of a directory of many files lie, so that it opens without reading their headers.

    Returns:
        Whether it was worth it and could be written.
    """
    paths = {path for spec in located.specs for path in spec.path_texts}
    if len(paths) < MANY or located.generation:
        return False
    return record_checks(located.root, located.specs, ["headers"], located.format)


def _with_checks(
    old: Manifest, found: FoundParts | None, marks: Mapping[str, FileFingerprint], checks: Sequence[str]
) -> Manifest:
    """A manifest that says that files passed some checks; of many files, in columns."""
    if found is None:
        return replace(old, verified={**old.verified, **dict.fromkeys(checks, marks)})
    mark = found.layout.digest()
    same = {} if old.found is None else {name: passed for name, passed in old.found.passed.items() if passed == mark}
    return replace(old, found=replace(found, passed={**same, **dict.fromkeys(checks, mark)}))


def _record_parts(directory: Path, known: Manifest, paths: Collection[str], checks: Sequence[str]) -> bool:
    """Record that the newest generation passed some checks; not if the tensors are those of an older one."""
    if known.generation is None or not known.holds_generation(paths):
        return False
    mark = known.generation.digest()
    # A generation that was published meanwhile has another digest, so the mark says nothing of it.
    passed = dict.fromkeys(checks, mark)
    update(directory, lambda old: replace(old, verified_parts={**old.verified_parts, **passed}))
    return True
