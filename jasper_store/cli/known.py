"""What stands beside the files, for commands that look at a dataset without opening it: manifest and declaration."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from jasper_store.errors import CorruptFileError, JasperStoreError
from jasper_store.formats.base import TensorSpec
from jasper_store.formats.registry import Located
from jasper_store.jasper.recognise import known_at
from jasper_store.report.sample import SampleView, look_at_samples
from jasper_store.samples.opened import packed_at
from jasper_store.store.manifest_file import read

__all__ = ["manifest_says", "packed_changes", "samples_of"]


def manifest_says(path: Path, located: Located) -> list[str]:
    """Where the files are not those that the manifest recorded; opening would warn of it, or refuse."""
    try:
        known = read(path if path.is_dir() else path.parent)
        return known.check(located.specs) if known is not None else []
    except CorruptFileError as exc:
        return [str(exc)]


def packed_changes(path: Path) -> list[str]:
    """Where a packed dataset's source has changed since it was packed."""
    try:
        packed = packed_at(path)
    except JasperStoreError as exc:
        return [str(exc)]
    return [] if packed is None else packed.changes(path)


def samples_of(path: Path, specs: Iterable[TensorSpec]) -> tuple[SampleView | None, JasperStoreError | None]:
    """What a sample of a directory reads, and what is wrong with it.

    Nothing is wrong with tensors of which nothing is declared, and nothing is expected of a single file.
    """
    if not path.is_dir():
        return None, None
    try:
        return look_at_samples(path, specs), None
    except JasperStoreError as exc:
        return None, None if known_at(path).declaration is None else exc
