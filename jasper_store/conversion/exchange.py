"""Several files of a directory replaced in one step: by a directory that has the new ones, and links to the others."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jasper_store.files.atomic import exchange_directories, keep_access, remove, sync_directory, temporary_name
from jasper_store.files.lock import LOCK_NAME
from jasper_store.store.manifest import MANIFEST_NAME, Manifest
from jasper_store.store.manifest_file import MANIFEST_LOCK, read, write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jasper_store.store.manifest import FileEntry

__all__ = ["exchanged"]

# A mount point, another file system, no permission in the parent, no hard links here.
_CANNOT = {errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS}


def exchanged(directory: Path, ready: Sequence[tuple[Path, Path, FileEntry | None]]) -> bool:
    """Replace files of a directory in one step, for everything that opens the directory.

    Args:
        directory: the directory, locked by the caller. It becomes another one of the same name.
        ready: of each file its temporary in the directory, its name in the end, and its entry in the manifest.

    Returns:
        False where this cannot be done here, and nothing was changed: the system has no exchange of names, the directory is
        a mount point, the one this process works in, or another user's, or holds directories.

    Raises:
        OSError: the system refused for another reason.
        CorruptFileError: the manifest that is there cannot be understood.
    """
    real = Path(os.path.realpath(directory))
    if not hasattr(os, "geteuid") or real.stat().st_uid != os.geteuid():
        return False
    if _working_in(real) or any(path.is_dir() for path in real.iterdir()):
        return False
    staging = temporary_name(real, "staging")
    try:
        staging.mkdir()
        keep_access(real, staging)
        _fill(real, staging, ready)
        if not exchange_directories(staging, real):
            return False
    except OSError as exc:
        if exc.errno not in _CANNOT:
            raise
        return False
    finally:
        remove(staging)  # after the exchange it is the old directory
    return True


def _working_in(directory: Path) -> bool:
    """Whether this process works in a directory, which it would lose."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return False
    return here == directory or directory in here.parents


def _fill(real: Path, staging: Path, ready: Sequence[tuple[Path, Path, FileEntry | None]]) -> None:
    replaced = {target.name for _, target, _ in ready} | {temporary.name for temporary, _, _ in ready}
    for path in real.iterdir():
        if path.name not in replaced | {MANIFEST_NAME, MANIFEST_LOCK, LOCK_NAME}:
            os.link(path, staging / path.name, follow_symlinks=False)
    for temporary, target, _ in ready:
        os.link(temporary, staging / target.name)
    known = read(real) or Manifest(real)
    new = {target.name: entry for _, target, entry in ready if entry is not None}
    # With these, a conversion that was killed before is finished.
    write(replace(known, directory=staging, files={**known.files, **new}, pending=()))
    keep_access(real / MANIFEST_NAME, staging / MANIFEST_NAME)
    sync_directory(staging)
