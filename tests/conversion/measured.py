"""Converts, and prints how much anonymous memory that took beyond what the process had; run as a script."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import h5py  # noqa: F401 - imported before the measurement begins, as any program that converts has done
import torch  # noqa: F401

from jasper_store.conversion.converter import convert
from jasper_store.conversion.verify import verify_files


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError


def main(src: str, dst: str, fmt: str, compression: str | None) -> None:
    # What is imported and allocated once, whatever the size, is not counted.
    convert(Path(src) / "small.pt", Path(dst) / "first", fmt, compression)
    before = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    report = convert(src, dst, fmt, compression)
    converted = peak - before
    verified = verify_files(dst)
    done.set()
    thread.join()
    (file,) = (row.file for row in report.tensors if row.name == "large")
    facts = {
        "converted": converted,
        "verified": peak - before,
        "ok": verified.ok,
        "file": file,
        "seconds": report.seconds,
    }
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] if len(sys.argv) > 4 else None)
