"""Run the documentation's Ray program on a small local Ray: ray_small.py PROGRAM DATASET OUTPUT WATCH RANK BATCH.

What the workers' loaders hand out is written to WATCH; worker RANK is killed before its batch number BATCH, once.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import ray
import ray.train.torch

script, data, output, watch, dies, before = sys.argv[1:]
program = runpy.run_path(script)
train = program["train"]


def watched(config: dict[str, Any]) -> None:
    """The program's function, in a worker."""
    from jasper_store.loading.epoch_iterator import EpochIterator

    rank = ray.train.get_context().get_world_rank()
    handed_out = EpochIterator.__next__
    count = 0

    def watching(batches: Any) -> Any:
        nonlocal count
        killed = Path(watch, "killed")
        if (rank, count) == (int(dies), int(before)) and not killed.exists():
            killed.touch()
            time.sleep(5)  # Ray's controller asks for reports once in a while; what it has not seen is lost
            os.kill(os.getpid(), signal.SIGKILL)
        batch = handed_out(batches)
        count += 1
        facts = batches._progress
        line = {"epoch": facts.epoch, "start": facts.start, "seen": batch["relevance"].tolist()}
        with Path(watch, f"{rank}-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return batch

    EpochIterator.__next__ = watching  # type: ignore[assignment,method-assign]
    train(config)


ray.init(num_cpus=2, object_store_memory=80_000_000, include_dashboard=False, _temp_dir=os.environ.get("RAY_SMALL_TMP"))
# The program takes its function from its own globals, where it now finds the watched one.
program["main"].__globals__["train"] = watched
program["main"](data, output)
ray.shutdown()
