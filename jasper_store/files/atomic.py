"""How a file or directory is replaced: whole or not at all, with room checked first.

Everything that jasper_store writes goes through here. A file is written under a hidden temporary name beside its
target, flushed to the disk, renamed over the target and the directory flushed; any failure, also
KeyboardInterrupt, removes the temporary. A process that is killed leaves its temporary behind: its name carries
the process id, and the next run removes it (:func:`clean_stale`). Readers that have the old file open or mapped
keep the old bytes: a rename never touches them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import threading
from typing import TYPE_CHECKING, Any

import psutil

from jasper_store.errors import ConversionError, JasperStoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = [
    "atomic_file",
    "clean_stale",
    "exchange_directories",
    "keep_access",
    "make_directory",
    "map_os_errors",
    "publish",
    "recover_directory",
    "remove",
    "require_space",
    "stale_temporaries",
    "swap_directory",
    "sync_directory",
    "sync_file",
    "temporary_name",
    "untrack",
    "write_bytes",
]

# The random part is missing from manifests that a release before this one left behind.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)(-[0-9a-f]{8})?\.(?P<kind>tmp|staging|old)")
_SPARE = 0.01  # of the bytes to be written, for headers, directories and the file system's own blocks
_MINE: set[str] = set()  # temporaries of this process that are in use, so that a reused pid cannot claim them
_MINE_LOCK = threading.Lock()


def temporary_name(target: Path, kind: str = "tmp") -> Path:
    """A hidden name beside ``target`` that no other process or thread will choose; nothing is created."""
    path = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.{kind}")
    with _MINE_LOCK:
        _MINE.add(path.name)
    return path


def remove(path: Path) -> None:
    """Remove a temporary file or directory, if it is there, and forget its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    untrack(path)


def untrack(path: Path) -> None:
    """Forget a temporary's name without removing it, so that a later run of this process may finish or clean it."""
    with _MINE_LOCK:
        _MINE.discard(path.name)


def clean_stale(directory: Path, name: str | None = None) -> list[Path]:
    """Remove temporaries whose process has ended; of one target if ``name`` is given. Those removed are returned.

    A temporary is left alone while its process lives. A process that started after the temporary was last written
    has only inherited the number (in a container every run may be process 1).
    """
    removed = []
    for target, path in list(stale_temporaries(directory)):
        if name in {None, target}:
            remove(path)
            removed.append(path)
    return removed


def stale_temporaries(directory: Path) -> Iterator[tuple[str, Path]]:
    """Temporaries in a directory whose process has ended, each with the name of its target."""
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or not _is_stale(path, match):
            continue
        if match["kind"] == "old" and not directory.joinpath(match["name"]).exists():
            continue  # the only copy of a directory whose swap was cut; recover_directory gives it back
        yield match["name"], path


def _is_stale(path: Path, match: re.Match[str]) -> bool:
    pid = int(match["pid"])
    if pid == os.getpid():
        with _MINE_LOCK:
            return path.name not in _MINE
    try:
        # A second of grace: file times and process times come from clocks of different grain. A directory moved
        # aside kept the time of its last change, which says nothing about the process that moved it.
        started = psutil.Process(pid).create_time()
        return match["kind"] != "old" and started > path.stat().st_mtime + 1
    except psutil.NoSuchProcess:
        return True
    except (psutil.AccessDenied, FileNotFoundError):
        return False


@contextlib.contextmanager
def atomic_file(target: Path, *, needed: int | None = None) -> Iterator[Path]:
    """Yield a temporary name beside ``target`` to be written; publish it when the block ends without an exception.

    The block creates the file and closes it. If ``target`` is a symbolic link, the link is replaced, never the
    file that it points to.

    Args:
        target: the file to create or replace.
        needed: bytes that will be written, for the message when the disk fills up.

    Raises:
        ConversionError: the disk is full, the directory is read-only, or another failure of the system.
    """
    temporary = temporary_name(target)
    try:
        with map_os_errors(target, temporary, needed):
            yield temporary
            publish(temporary, target)
    finally:
        # Gone if it was published; the handler runs for KeyboardInterrupt too.
        remove(temporary)


def publish(temporary: Path, target: Path) -> None:
    """Flush a finished temporary file to the disk and give it its name.

    Raises:
        ConversionError: the target is a directory.
    """
    if target.is_dir() and not target.is_symlink():
        msg = f"{target}: expected a file or nothing at this name, found a directory; move it away"
        raise ConversionError(msg, path=target)
    keep_access(target, temporary)
    sync_file(temporary)
    temporary.replace(target)
    sync_directory(target.parent)


def keep_access(old: Path, new: Path) -> None:
    """Give a file or directory the permissions of the one that it will replace, and its owner and group where that can be.

    Nothing is done where there is no old one, or it is a link; the new one then has what the umask leaves. Access control lists
    are not kept. A group that cannot be kept (only a member may give a file to it) gets no more than all others have.
    """
    try:
        facts = old.lstat()
    except FileNotFoundError:
        return
    if sys.platform == "win32" or stat.S_ISLNK(facts.st_mode):
        return
    mode = stat.S_IMODE(facts.st_mode)
    for owner in (facts.st_uid, -1):
        with contextlib.suppress(OSError):
            os.chown(new, owner, facts.st_gid, follow_symlinks=False)
            break
    if new.lstat().st_gid != facts.st_gid:
        mode &= ~stat.S_IRWXG | (mode & stat.S_IRWXO) << 3
    # Some file systems have no permissions, and so none to keep.
    with contextlib.suppress(PermissionError):
        new.chmod(mode)


def write_bytes(target: Path, content: bytes) -> None:
    """Create or replace a small file atomically.

    Raises:
        ConversionError: as :func:`atomic_file`.
    """
    # "x" creates the file or fails: a link that was planted at this name is not followed.
    with atomic_file(target, needed=len(content)) as temporary, temporary.open("xb") as file:
        file.write(content)


def sync_file(path: Path) -> None:
    """Flush a file's data and size to the disk."""
    # Windows flushes only through a handle that may write; elsewhere any handle will do.
    fd = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(directory: Path) -> None:
    """Flush a directory's names to the disk, where the system can."""
    if sys.platform == "win32":
        return
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as exc:
        # Some network file systems cannot flush a directory, and say so; their renames are synchronous.
        if exc.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(fd)


def make_directory(directory: Path) -> list[Path]:
    """Make a directory and its parents, and flush their names to the disk; those made are returned, innermost first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_directory(path.parent)
    return missing


def require_space(directory: Path, needed: int, *, what: str) -> None:
    """Check that ``needed`` bytes and 1 % more are free, before the first byte is written.

    Args:
        directory: an existing directory on the file system that is written to.
        needed: bytes that will be written, on top of what is there.
        what: what is to be written, for the message.

    Raises:
        ConversionError: with both numbers.
    """
    with map_os_errors(directory, None, needed):
        free = shutil.disk_usage(directory).free
    total = needed + int(needed * _SPARE)
    if total > free:
        msg = (
            f"{directory}: {what} needs {total:,} bytes ({_SPARE:.0%} of it to spare), found {free:,} bytes free, "
            f"{total - free:,} too few; make room there or choose another destination. Nothing was written"
        )
        raise ConversionError(msg, path=directory)


@contextlib.contextmanager
def map_os_errors(target: Path, temporary: Path | None = None, needed: int | None = None) -> Iterator[None]:
    """Turn the system's refusals to write into :class:`ConversionError`; everything else passes.

    Args:
        target: the file or directory that the message is about.
        temporary: the file being written, whose size the message tells.
        needed: bytes it would have had.
    """
    try:
        yield
    except (OSError, RuntimeError) as exc:
        if isinstance(exc, JasperStoreError) or (isinstance(exc, RuntimeError) and _buried_errno(str(exc)) is None):
            raise
        raise _translate(exc, target, temporary, needed) from exc


def _translate(
    exc: OSError | RuntimeError, target: Path, temporary: Path | None, needed: int | None
) -> ConversionError:
    code = exc.errno if isinstance(exc, OSError) and exc.errno is not None else _buried_errno(str(exc))
    where = target if target.is_dir() else target.parent
    if code in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        written = temporary.stat().st_size if temporary is not None and temporary.is_file() else 0
        of = f" of {needed:,}" if needed is not None else ""
        free = shutil.disk_usage(where).free
        msg = (
            f"{target}: no room to finish it ({os.strerror(code)}): {written:,} bytes{of} were written and "
            f"{free:,} bytes are free; what was written is removed, the old file is as it was. Make room and run again"
        )
    elif code in {errno.EACCES, errno.EPERM, errno.EROFS}:
        msg = (
            f"{target}: expected to be able to write in {where}, found: {os.strerror(code)}; "
            "choose another destination or change the permissions"
        )
    else:
        why = str(exc) if code is None else os.strerror(code)
        if isinstance(exc, OSError) and exc.filename is not None and str(exc.filename) != str(target):
            why = f"{exc.filename}: {why}"
        msg = f"{target}: could not be written: {why}; the old file, if there was one, is as it was"
    return ConversionError(msg, path=target)


def _buried_errno(text: str) -> int | None:
    """The error number in a message of the HDF5 library, which raises OSError without one, or even RuntimeError."""
    match = re.search(r"errno = (\d+)", text)
    return int(match[1]) if match else None


def swap_directory(new: Path, target: Path) -> None:
    """Replace ``target`` by a finished directory, and remove what was there.

    On Linux the two exchange their names in one step, so that there is no moment without a dataset. Elsewhere the
    old one is moved aside first; a kill between the two renames is repaired by :func:`recover_directory`.

    Raises:
        OSError: the system refused; the old directory is where it was.
    """
    if not target.exists():
        new.rename(target)
        sync_directory(target.parent)
        return
    for path in target.iterdir():
        if (new / path.name).exists():
            keep_access(path, new / path.name)
    keep_access(target, new)
    if exchange_directories(new, target):
        remove(new)
        return
    aside = temporary_name(target, "old")
    target.rename(aside)
    try:
        new.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    sync_directory(target.parent)
    remove(aside)


def exchange_directories(one: Path, other: Path) -> bool:
    """Exchange the names of two directories of one parent in one step; False where the system cannot, which changes nothing.

    Raises:
        OSError: the system refused for another reason.
    """
    exchange = _renameat2()
    if exchange is None or not exchange(one, other):
        return False
    sync_directory(other.parent)
    return True


def recover_directory(target: Path) -> None:
    """Undo a swap that was cut between its two renames: the directory moved aside gets its name back."""
    if target.exists() or not target.parent.is_dir():
        return
    for path in target.parent.glob(f".{target.name}.*.old"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and match["name"] == target.name and _is_stale(path, match):
            path.rename(target)
            sync_directory(target.parent)
            return


def _renameat2() -> Callable[[Path, Path], bool] | None:
    """Linux's exchange of two names; None where the C library lacks it. False: the file system cannot."""
    if sys.platform != "linux":
        return None
    function: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return None
    at_fdcwd, rename_exchange = -100, 2

    def exchange(one: Path, other: Path) -> bool:
        if function(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0:
            return True
        code = ctypes.get_errno()
        if code in {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}:
            return False
        raise OSError(code, os.strerror(code), str(other))

    return exchange
