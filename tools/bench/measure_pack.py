"""What runs inside the child for packing: packing itself, and the copy of as many bytes that bounds it."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from tools.bench import pagecache
from tools.bench.cgroup import Cap
from tools.bench.library import library

__all__ = ["copy", "pack"]


def pack(source: str, target: str, *, cap: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Pack a dataset whose files are in no cache; bytes written a second, until they are on the disk."""
    js = library()

    pagecache.evict(pagecache.files_under(Path(source)))
    if cap:
        Cap.from_dict(cap).join()
    began, begin = time.monotonic(), time.perf_counter()
    report = js.pack(source, target, **options)
    elapsed = time.perf_counter() - begin
    return {
        "nbytes": report.nbytes,
        "nbytes_read": report.nbytes_read,
        "seconds": elapsed,
        "bytes_per_s": report.nbytes / elapsed,
        "window": (began, time.monotonic()),
    }


def copy(source: str, target: str, *, cap: dict[str, Any] | None = None) -> dict[str, Any]:
    """Copy a directory whose files are in no cache, as ``cp`` does; bytes a second, until they are on the disk."""
    files = pagecache.files_under(Path(source))
    pagecache.evict(files)
    if cap:
        Cap.from_dict(cap).join()
    nbytes = sum(path.stat().st_size for path in files)
    begin = time.perf_counter()
    shutil.copytree(source, target)
    for path in pagecache.files_under(Path(target)):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    elapsed = time.perf_counter() - begin
    return {"nbytes": nbytes, "seconds": elapsed, "bytes_per_s": nbytes / elapsed}
