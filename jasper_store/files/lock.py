"""One writer at a time: a lock file that the system releases when its holder dies."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import warnings
from typing import TYPE_CHECKING

from jasper_store.errors import ConversionError, JasperStoreWarning
from jasper_store.files.atomic import translated

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["LOCK_NAME", "exclusive"]

LOCK_NAME = ".jasper_store.lock"


@contextlib.contextmanager
def exclusive(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock file, so that two writers do not meet; the system releases it when the process dies.

    The file carries the holder's process id and is removed on release.

    Args:
        lock: the lock file, in an existing directory.
        what: what is being written, for the message.

    Raises:
        ConversionError: another process or thread holds it; the message names the process.
    """
    with translated(lock.parent):
        fd = _take(lock, what)
    try:
        with translated(lock):
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        # Removed while it is held: whoever opened it meanwhile finds the name gone and takes a new one.
        if sys.platform != "win32":
            lock.unlink(missing_ok=True)
        os.close(fd)


def _take(lock: Path, what: str) -> int:
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            held = _try_lock(fd)
            named = held and _still_named(fd, lock)
            refusal = None if held else _held(fd, lock, what)
        except BaseException:
            os.close(fd)
            raise
        if named:
            return fd
        os.close(fd)
        if refusal is not None:
            raise refusal


def _held(fd: int, lock: Path, what: str) -> ConversionError:
    # Windows lets nobody read a locked byte; there the name of the holder stays unknown.
    holder = os.pread(fd, 200, 0).decode(errors="replace").strip() if hasattr(os, "pread") else ""
    msg = (
        f"{what}: expected to be the only writer, found {lock} held by process {holder or 'unknown'}; "
        "wait until it has finished, or end it, and run again"
    )
    return ConversionError(msg, path=lock)


def _still_named(fd: int, lock: Path) -> bool:
    """Whether the file that was locked still has its name, and was not removed by its last holder meanwhile."""
    try:
        return os.path.samestat(os.fstat(fd), lock.stat())
    except FileNotFoundError:
        return False


def _try_lock(fd: int) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        # flock belongs to the open file, so it also keeps out a second thread of this process.
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno in {errno.EWOULDBLOCK, errno.EACCES}:
            return False
        if exc.errno not in {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}:
            raise
        # Temporary names are unique without the lock, so two writers waste work but cannot mix their bytes.
        text = f"this file system cannot lock files ({exc.strerror}); make sure that only one process writes here"
        warnings.warn(text, JasperStoreWarning, stacklevel=5)
    return True
