"""Run a program and write down what its loaders hand out; one rank may wait at a batch until it is killed.

watched.py PROGRAM ARGUMENTS...; WATCH_DIR is where to write, WATCH_STALL="RANK:BATCH" is who waits in its first life.
"""

from __future__ import annotations

import itertools
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from jasper_store.loading.epoch_iterator import EpochIterator

DIRECTORY = Path(os.environ["WATCH_DIR"])
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LIFE = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
STALL = tuple(map(int, os.environ.get("WATCH_STALL", "-1:-1").split(":")))

handed_out = EpochIterator.__next__
numbers = itertools.count()


def watch(batches: Any) -> Any:
    if LIFE == 0 and (RANK, next(numbers)) == STALL:
        (DIRECTORY / "stalled").write_text(str(os.getpid()))
        time.sleep(600)
    batch = handed_out(batches)
    line = {"epoch": batches._progress.epoch, "world": WORLD, "seen": batch["relevance"].tolist()}
    with (DIRECTORY / f"seen-{LIFE}-{RANK}-{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return batch


EpochIterator.__next__ = watch  # type: ignore[assignment,method-assign]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")

# A thread that joins is listed a moment longer. Linux only; elsewhere nothing is listed.
for _ in range(100):
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    outlive = sorted(name for name in names if "gloo" in name)
    if not outlive:
        break
    time.sleep(0.01)
else:
    sys.stdout.write(f"gloo outlives the program: {outlive}\n")
