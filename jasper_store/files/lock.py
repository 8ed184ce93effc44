"""One writer at a time: a lock file that the system releases when its holder dies.

The package ``filelock`` is not used, although torch brings it: on Unix it leaves its lock files behind (we would have
one in every dataset), and it cannot say which process holds a lock. Both would be written again around it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import sys
import time
import warnings
from typing import TYPE_CHECKING

from jasper_store.errors import ConversionError, JasperStoreWarning
from jasper_store.files.atomic import map_os_errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["LOCK_NAME", "exclusive", "lock_beside", "remove_stale"]

LOCK_NAME = ".jasper_store.lock"
_POLL_SECONDS = 0.01


def lock_beside(directory: Path) -> Path:
    """The lock file of a directory that is made, or replaced as a whole."""
    return directory.parent / f".{directory.name}{LOCK_NAME}"


@contextlib.contextmanager
def exclusive(lock: Path, what: str, *, wait: float = 0.0, warn: bool = True) -> Iterator[None]:
    """Hold a lock file, so that two writers do not meet; the system releases it when the process dies.

    Threads of one process exclude each other as well. The file carries the holder's process id and is removed on
    release.

    Args:
        lock: the lock file, in an existing directory.
        what: what is being written, for the message.
        wait: seconds to wait for another holder; ``math.inf`` waits until it is released.
        warn: whether to warn where the file system has no locks. Without locks the block runs all the same.

    Raises:
        ConversionError: another process or thread still holds it, and the message names the process; or the lock
            file cannot be made.
    """
    with map_os_errors(lock.parent):
        fd = _acquire(lock, what, wait, warn=warn)
    owner = os.getpid()
    try:
        with map_os_errors(lock):
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        # A forked child that ends runs this as well, and must leave its parent's lock alone.
        if os.getpid() == owner:
            _release(fd, lock)


def remove_stale(lock: Path) -> None:
    """Remove a lock file that a killed process left behind; one that is held stays."""
    if lock.exists():
        with contextlib.suppress(ConversionError), exclusive(lock, f"removing {lock}", warn=False):
            pass


def _acquire(lock: Path, what: str, wait: float, *, warn: bool) -> int:
    deadline = time.monotonic() + wait
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            _require_own_file(fd, lock)
            held = _try_lock(fd, warn=warn)
            if held and _is_current(fd, lock):
                return fd
            expired = not held and time.monotonic() >= deadline
            refusal = _held_error(fd, lock, what) if expired else None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if refusal is not None:
            raise refusal
        if not held:
            time.sleep(_POLL_SECONDS)


def _release(fd: int, lock: Path) -> None:
    if sys.platform == "win32":
        # An open file cannot be removed there; if another process has opened it meanwhile, that one removes it.
        os.close(fd)
        with contextlib.suppress(OSError):
            lock.unlink()
        return
    try:
        # Removed while it is held: a process that opened it before finds the name gone and makes a new one.
        if _is_current(fd, lock):
            lock.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _require_own_file(fd: int, lock: Path) -> None:
    """Refuse a planted name: writing the process id must not change a file that has another name as well."""
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1:
        raise OSError(errno.EPERM, "a lock file must be a regular file without other names", os.fspath(lock))


def _held_error(fd: int, lock: Path, what: str) -> ConversionError:
    # Windows does not let others read a locked byte; there the holder stays unknown.
    holder = os.pread(fd, 200, 0).decode(errors="replace").strip() if hasattr(os, "pread") else ""
    msg = (
        f"{what}: expected to be the only writer, found {lock} held by process {holder or 'unknown'}; "
        "wait until it has finished, or end it, and run again"
    )
    return ConversionError(msg, path=lock)


def _is_current(fd: int, lock: Path) -> bool:
    """Whether the open file still has the lock's name, and was not removed by its last holder meanwhile."""
    try:
        return os.path.samestat(os.fstat(fd), lock.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _try_lock(fd: int, *, warn: bool) -> bool:
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
        if warn:
            text = f"this file system cannot lock files ({exc.strerror}); make sure that only one process writes here"
            warnings.warn(text, JasperStoreWarning, stacklevel=5)
    return True
