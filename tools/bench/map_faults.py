"""What it costs to copy rows of a mapped file so that a page that is gone is an error: ``python -m tools.bench.map_faults``.

Measured: the gather kernel as it is for memory, which SIGBUS would end; the same with the signal caught, which is what mapped
tensors use; a system call for each row; and one for 1024 rows. One thread, everything in the page cache, the ways in turn.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from jasper_store.native.gather import Jobs, source_of
from jasper_store.paging.mapping import FileMap, view

if TYPE_CHECKING:
    from collections.abc import Callable

OUT: Final = Path("docs/bench/map_faults.json")
_ROW_NBYTES, _FILE_NBYTES, _ROUNDS = 1536, 96 << 20, 400
_BATCHES: Final = (32, 256, 4096)


def _library(directory: Path) -> Any:
    target = directory / "map_faults.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-O3", "-shared", "-fPIC", "-o", target, source], check=True)
    found = ctypes.CDLL(str(target))
    number, address = ctypes.c_int64, ctypes.c_void_p
    found.rows_by_pread.argtypes = [ctypes.c_int, address, number, number, address]
    found.rows_by_process.argtypes = [address, address, number, number, address]
    return found


def _ways(fmap: FileMap, table: torch.Tensor, rows: torch.Tensor, out: torch.Tensor, library: Any) -> dict[str, Any]:
    numbers = (rows.data_ptr(), len(rows), _ROW_NBYTES, out.data_ptr())

    def gather(*, mapped: bool) -> Callable[[], Any]:
        jobs = Jobs()
        jobs.add(source_of(table), rows, out)
        return lambda: jobs.run(mapped=mapped)

    return {
        "kernel": gather(mapped=False),
        "kernel, signal caught": gather(mapped=True),
        "pread for each row": lambda: library.rows_by_pread(fmap.fileno(), *numbers),
        "process_vm_readv for 1024 rows": lambda: library.rows_by_process(table.data_ptr(), *numbers),
    }


def measure() -> list[dict[str, Any]]:
    """Median and quartiles of the microseconds of a call, by way and batch."""
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        path = Path(name, "rows")
        path.write_bytes(np.random.default_rng(0).bytes(_FILE_NBYTES))
        library, fmap = _library(Path(name)), FileMap(path)
        table = view(fmap, 0, torch.int32, (_FILE_NBYTES // _ROW_NBYTES, _ROW_NBYTES // 4))
        for batch in _BATCHES:
            rows = torch.randint(0, len(table), (batch,))
            out = torch.empty(batch, _ROW_NBYTES // 4, dtype=torch.int32)
            ways = _ways(fmap, table, rows, out, library)
            times: dict[str, list[float]] = {way: [] for way in ways}
            for round_ in range(_ROUNDS):
                for way, call in ways.items():
                    # Other rows each time: those of the call before are in the processor's cache.
                    rows.copy_(torch.randint(0, len(table), (batch,)))
                    began = perf_counter()
                    assert call() in {None, 0}
                    times[way].append(1e6 * (perf_counter() - began))
                    assert round_ or torch.equal(out, table[rows])
            for way, each in times.items():
                quarter, middle, three = statistics.quantiles(each, n=4)
                found.append({"way": way, "batch": batch, "us": middle, "quartiles": [quarter, three]})
    return found


def main() -> None:
    """Measure, and write JSON."""
    OUT.write_text(json.dumps({"cpus": os.cpu_count(), "row_nbytes": _ROW_NBYTES, "calls": measure()}, indent=1) + "\n")
    print(OUT.read_text())


if __name__ == "__main__":
    main()
