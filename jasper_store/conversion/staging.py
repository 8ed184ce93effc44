"""The hidden directory that a dataset is written into; publishing renames it to the target."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from jasper_store.conversion.generations import PART_DIRECTORY
from jasper_store.errors import ConversionError
from jasper_store.files.atomic import (
    clean_stale,
    make_directory,
    map_os_errors,
    recover_directory,
    remove,
    swap_directory,
    temporary_name,
)
from jasper_store.files.lock import LOCK_NAME, exclusive, lock_beside
from jasper_store.formats.generation import SHARDS
from jasper_store.formats.registry import FORMATS, format_for

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["check_target", "make_staging", "publish"]


def make_staging(stack: contextlib.ExitStack, target: Path, *, overwrite: bool) -> Path:
    """Lock the target, check that it may be written, and make the hidden directory; the stack undoes it.

    Raises:
        ConversionError: the target is there and may not be replaced, cannot be written, or has another writer.
    """
    parent = target.parent
    with map_os_errors(target):
        make_directory(parent)
    stack.enter_context(exclusive(lock_beside(target), f"writing {target}"))
    with map_os_errors(target):
        recover_directory(target)
        clean_stale(parent, target.name)
        check_target(target, overwrite=overwrite)
        staging = temporary_name(target, "staging")
        # A callback and no generator: a forked child that ends would run a generator's "finally".
        stack.callback(remove, staging)
        # What replaces a directory gets its permissions in the end; until then only the owner reads it.
        staging.mkdir(0o700 if target.exists() else 0o777)
    return staging


def publish(staging: Path, target: Path, *, overwrite: bool) -> None:
    """Give the finished directory the target's name, and remove the directory that had it.

    Raises:
        ConversionError: the target changed meanwhile and may not be replaced, or is being converted into.
        OSError: the system refused; the old directory is where it was.
    """
    with contextlib.ExitStack() as stack:
        if target.is_dir():
            # A conversion into the old directory must not lose it while it writes.
            stack.enter_context(exclusive(target / LOCK_NAME, f"replacing {target}"))
        check_target(target, overwrite=overwrite)
        if sys.platform == "win32":
            stack.close()  # a directory that holds an open file cannot be renamed there; the lock beside it stays
        swap_directory(staging, target)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse to replace what must not be lost.

    Raises:
        ConversionError: the target is there and may not be replaced.
    """
    if not target.exists():
        return
    if not target.is_dir():
        msg = f"{target}: expected a directory or nothing at this name, found a file; name another directory"
        raise ConversionError(msg, path=target)
    there = sorted(path for path in target.iterdir() if path.name != LOCK_NAME)
    if there and not overwrite:
        msg = (
            f"{target}: expected no directory of this name, or an empty one, found {len(there)} entries "
            f"({there[0].name}, ...); pass overwrite=True to replace all of it, or name another directory"
        )
        raise ConversionError(msg, path=target)
    foreign = [path.name for path in there if not _replaceable(path)]
    if foreign:
        msg = (
            f"{target}: expected nothing but data and JSON files in the directory that is replaced, found "
            f"{', '.join(foreign[:5])}; move them away, or name another directory"
        )
        raise ConversionError(msg, path=target)


def _replaceable(path: Path) -> bool:
    """Whether a file in a directory that is replaced is part of a dataset, and not another file of the user's."""
    if path.is_dir() and not path.is_symlink():
        return path.name == SHARDS or PART_DIRECTORY.fullmatch(path.name) is not None
    fmt = format_for(path)
    written = fmt is not None and fmt.name in FORMATS
    return path.is_file() and (written or path.suffix == ".json" or path.name.startswith("."))
