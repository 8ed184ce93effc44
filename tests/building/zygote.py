"""Builds in forked children that are killed; imports once, so that a child starts in no time.

Run as a script. Each line of standard input is a build in JSON: ``{"dst", "seed", "overwrite", "stage", "calls",
"seconds"}``. It is killed at that call of ``progress`` of that stage, or after these seconds, or not at all. The answer is
the exit status of the child (negative: the signal).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from typing import Any

import faiss  # noqa: F401 - imported here once, not in every child
import safetensors.torch  # noqa: F401
import torch

import jasper_store as js
from tests.building.raw import raw

SIZES: dict[str, Any] = {"questions": 300, "sources": 400, "pairs": 500, "dim": 32}


def child(dst: str, seed: int, stage: str | None, calls: int, overwrite: bool) -> None:
    seen = 0

    def progress(name: str, done: int, total: int) -> None:
        nonlocal seen
        if name == stage:
            seen += 1
            if seen == calls:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        js.build(dst, **raw(**SIZES), seed=seed, overwrite=overwrite, progress=progress)
    except BaseException:  # noqa: BLE001 - the child must end here, whatever happened
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    # A parallel region of OpenMP in the parent would leave its children waiting for threads that they do not have.
    torch.set_num_threads(1)
    # Imported by being used.
    assert all((js.build, js.DatasetWriter, js.open))
    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        job = json.loads(line)
        seconds = job.pop("seconds")
        pid = os.fork()
        if pid == 0:
            child(**job)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)  # a zombie takes the signal too
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
