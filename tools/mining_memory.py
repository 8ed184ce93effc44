"""What mining holds in memory, at rising numbers of sources in a mapped file, against its budget.

    python tools/mining_memory.py DIRECTORY [--sources 10000 100000 1000000] [--limits 64MiB 256MiB] [--out docs/bench/mining-memory.json]

Each run is a fresh process, which opens the dataset as a user does and mines for it. A thread reads the process's anonymous
memory (RssAnon) every five milliseconds; pages of files are not counted, since the system takes these back. What the process
held before it mined is subtracted. DIRECTORY is on a disk with room for the embeddings, 1.5 KB a source.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

import jasper_store as js
from jasper_store.errors import InsufficientMemoryError
from jasper_store.memory.sizes import parse_size

_DIM = 384
_CLUSTERS = 200
_BLOCK = 50_000


def write(path: Path, n_questions: int, n_sources: int) -> None:
    """A dataset of clustered embeddings, block by block."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(_CLUSTERS, _DIM, generator=generator)
    pairs = torch.randint(0, n_sources, (n_questions,), generator=generator)
    cluster = torch.randint(0, _CLUSTERS, (n_questions,), generator=generator)
    with js.DatasetWriter(path) as writer:
        for start in range(0, n_sources, _BLOCK):
            count = min(_BLOCK, n_sources - start)
            own = torch.randint(0, _CLUSTERS, (count,), generator=generator)
            writer.append("source_embs", centres[own] + torch.randn(count, _DIM, generator=generator))
        writer.append("question_embs", centres[cluster] + torch.randn(n_questions, _DIM, generator=generator))
        writer.append("pair_index", torch.stack((torch.arange(n_questions), pairs), dim=1))
        writer.append("pair_cluster_id", cluster)


def anonymous_nbytes() -> int:
    """Anonymous memory of this process."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def measure(path: Path, limit: int) -> dict[str, Any]:
    """Mine once in this process; what it held at most, and how long it took."""
    # Libraries are loaded, and threads started, before it counts.
    with tempfile.TemporaryDirectory() as small:
        write(Path(small, "small"), 20, 100)
        js.mine_negatives(Path(small, "small"))
    highest, done = 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.005):
            highest = max(highest, anonymous_nbytes())

    before = anonymous_nbytes()
    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        js.mine_negatives(path, n_neg=12, memory_limit=limit, force=True)
    except InsufficientMemoryError as exc:
        return {"needed": exc.needed}
    finally:
        done.set()
        watcher.join()
    return {"peak": max(highest - before, 0), "seconds": time.perf_counter() - began}


def main() -> None:
    """Write the datasets, and mine for each of them under each limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--questions", type=int, default=2_000)
    parser.add_argument("--sources", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--limits", nargs="+", default=["64MiB", "256MiB", "1GiB"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.directory, options.measure)))
        return
    runs = []
    for n_sources in options.sources:
        path = options.directory / f"sources-{n_sources}"
        write(path, options.questions, n_sources)
        for limit in options.limits:
            command = [sys.executable, __file__, str(path), "--measure", str(parse_size(limit))]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.append({"sources": n_sources, "limit": parse_size(limit), **json.loads(said)})
            print(json.dumps(runs[-1]), flush=True)
        shutil.rmtree(path)
    if options.out:
        facts = {"questions": options.questions, "dim": _DIM, "n_neg": 12, "runs": runs}
        options.out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
