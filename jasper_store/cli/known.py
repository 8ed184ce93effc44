"""What the manifest beside the files says of them, for commands that look at a dataset without opening it."""

from __future__ import annotations

from pathlib import Path

from jasper_store.errors import CorruptFileError
from jasper_store.formats.registry import Located
from jasper_store.store.manifest_file import read

__all__ = ["manifest_says"]


def manifest_says(path: Path, located: Located) -> list[str]:
    """Where the files are not those that the manifest recorded; opening would warn of it, or refuse."""
    try:
        known = read(path if path.is_dir() else path.parent)
        return known.check(located.specs) if known is not None else []
    except CorruptFileError as exc:
        return [str(exc)]
