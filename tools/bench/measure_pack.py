"""What runs inside the child for packing: packing itself, and the copy of as many bytes that bounds it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tools.bench import pagecache
from tools.bench.cgroup import Cap
from tools.bench.library import library

__all__ = ["copy", "pack"]

CHUNK_NBYTES = 8 << 20


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


def copy(source: str, target: str, nbytes: int, *, cap: dict[str, Any] | None = None) -> dict[str, Any]:
    """Copy files that are in no cache, as ``cp`` does, until they are on the disk; bytes a second.

    ``nbytes``: the last file that is copied is the first that comes to as many in all; of a larger one, the beginning.
    """
    files = sorted(pagecache.files_under(Path(source)))
    pagecache.evict(files)
    if cap:
        Cap.from_dict(cap).join()
    into = Path(target)
    into.mkdir()
    done, begin = 0, time.perf_counter()
    for number, path in enumerate(files):
        if done >= nbytes:
            break
        with path.open("rb") as reading, (into / f"{number}").open("wb") as writing:
            while done < nbytes and (sent := os.sendfile(writing.fileno(), reading.fileno(), None, CHUNK_NBYTES)):
                done += sent
            os.fsync(writing.fileno())
    elapsed = time.perf_counter() - begin
    return {"nbytes": done, "seconds": elapsed, "bytes_per_s": done / elapsed}
