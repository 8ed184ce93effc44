"""Making files cold, and proving that they are. Own code on purpose: the judge does not use the judged."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["COLD", "NotColdError", "evict", "files_under", "resident_fraction", "warm"]

_POPULATE_READ = 22  # Python does not name it
COLD = 0.01
PAGE = mmap.PAGESIZE
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class NotColdError(RuntimeError):
    """Pages of a file stayed in the page cache, so a cold measurement of it would be a lie."""


def files_under(path: Path) -> list[Path]:
    """The file itself, or every file below a directory."""
    return [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())


def resident_fraction(paths: Iterable[Path]) -> float:
    """Share of the files' pages that are in the page cache, by mincore(2)."""
    resident = pages = 0
    for path in paths:
        found, count = _resident_pages(path)
        resident += found
        pages += count
    return resident / pages if pages else 0.0


def _resident_pages(path: Path) -> tuple[int, int]:
    size = path.stat().st_size
    if not size:
        return 0, 0
    count = -(-size // PAGE)
    answer = np.empty(count, dtype=np.uint8)
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as pages:
        view = np.frombuffer(pages, dtype=np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), answer.ctypes.data_as(ctypes.c_void_p)
        )
        del view
        if failed:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
    return int((answer & 1).sum()), count


def evict(paths: Iterable[Path]) -> str:
    """Put the files out of the page cache and verify that they are; returns how it was done.

    ``posix_fadvise`` comes first: it leaves the pages of Python and the libraries where they are, so that what
    is measured is the data. The machine-wide switch is the second try.

    Raises:
        NotColdError: more than :data:`COLD` of the pages stayed.
    """
    files = list(paths)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = resident_fraction(files)
    if left < COLD:
        return "posix_fadvise"
    if os.access(DROP_CACHES, os.W_OK):
        os.sync()
        DROP_CACHES.write_text("1\n", encoding="ascii")
        left = resident_fraction(files)
    if left < COLD:
        return "drop_caches"
    raise NotColdError(
        f"{left:.1%} of the pages of {len(files)} files stayed in the page cache, expected under {COLD:.0%}; "
        "is another program reading them, or is the directory on a tmpfs? Choose another --data-dir."
    )


def warm(paths: Iterable[Path]) -> None:
    """Read the files from beginning to end, so that their pages are in the page cache, in huge pages where that is possible.

    They are evicted first: the kernel keeps what was just written, or read from a large file, in larger pages than what is read
    from a small one, and how a file came to be in memory must not decide how fast it is.

    Raises:
        NotColdError: they stayed in the page cache.
    """
    files = list(paths)
    evict(files)
    buffer = bytearray(8 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            if not _populated(file.fileno(), path.stat().st_size):
                while file.readinto(buffer):
                    pass


def _populated(fd: int, size: int) -> bool:
    """Read a file through a map that asks for huge pages; False where the system does not."""
    if not size:
        return True
    with mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as pages:
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
            pages.madvise(_POPULATE_READ)
        except OSError:
            return False
    return True
