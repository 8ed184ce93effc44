"""A worker of a preloaded dataset holds little of its own, and no more at the end of an epoch than at its start.

Measured in a process of its own: a worker forked from one that has run a thousand tests writes, here and there, into
the holes that these left in the heap, and every page of them becomes its own. That is no growth of the worker's.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from jasper_store.jasper.loader import create_loader
from tests.builders import build_pt_dataset

DIM, PAIRS = 256, 12_000


def private() -> int:
    """Bytes that the larger worker wrote and shares with nobody; mapped pages of files are the kernel's."""
    return max(
        sum(region.private_dirty for region in psutil.Process(child.pid).memory_maps(grouped=True))
        for child in multiprocessing.active_children()
    )


def watch(data: str, method: str) -> None:
    """Serve an epoch, and print the bytes of the whole store and of the larger worker, now and then."""
    loader = create_loader(
        data, "train", 64, 2, use_mmap=False, multiprocessing_context=method, persistent_workers=True
    )
    found = [private() for number, _ in enumerate(loader) if number % 30 == 4]
    sys.stdout.write(json.dumps([loader.dataset_obj.store.nbytes, found]))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which pages a process alone has written")
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_private_memory_of_workers_stays_flat(tmp_path: Path, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    data = build_pt_dataset(tmp_path / "data", n_pairs=PAIRS, n_questions=PAIRS, n_sources=PAIRS, dim=DIM)
    code = f"from tests.loading.test_worker_memory import watch; watch({str(data)!r}, {method!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, found = json.loads(done.stdout)
    assert whole > 50 << 20
    assert len(found) > 3
    assert max(found) - found[0] < whole // 6
    if method == "fork":
        assert found[-1] < whole // 2  # a copy of the store would be all of it; the rest is the interpreter's
