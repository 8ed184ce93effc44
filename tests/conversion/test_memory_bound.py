"""Converting and verifying take at most 256 MiB of memory of their own, whatever the size of the dataset."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

BOUND = 256 << 20
ROW = 384 * 4

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status")


def sparse_source(directory: Path, nbytes: int) -> Path:
    """A ``.pt`` whose one large tensor is a hole in the file: as large as we like, and quick to make."""
    from jasper_store.formats.pt import writer as pt_writer

    directory.mkdir()
    rows = nbytes // ROW
    path = directory / "large.pt"
    writer = pt_writer.PtWriter(path)
    writer.begin("large", torch.float32, (384,), rows)
    # As if so many rows had been appended, and all were zeros; their CRC is nobody's business here.
    tensor, archive = writer._current()
    tensor.done = rows
    archive.end += rows * ROW
    writer.end()
    writer.close()
    torch.save(torch.arange(10), directory / "small.pt")
    return directory


def measure(arguments: list[object], group: Path | None = None) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("measured.py")), *map(str, arguments)]
    if group is not None:
        command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


TARGETS = [
    ["safetensors"],
    ["hdf5", "gzip"],
    *(pytest.param(target, marks=pytest.mark.slow) for target in (["npy"], ["pt"], ["hdf5"], ["hdf5", "lzf"])),
]


@pytest.mark.parametrize("target", TARGETS, ids="-".join)
def test_anonymous_memory_is_bounded(tmp_path, target):
    source = sparse_source(tmp_path / "pt", BOUND + (64 << 20))
    found = measure([source, tmp_path / "out", *target])
    assert found["ok"]
    assert found["converted"] < BOUND
    assert found["verified"] < BOUND
    # A bound that were not much above the blocks in flight would be luck.
    assert found["converted"] < BOUND // 2


@contextmanager
def memory_group(nbytes: int) -> Iterator[Path]:
    """A memory cgroup of its own, v1 or v2, with a limit on everything its processes use, page cache included."""
    for root, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = root / f"jasper-store-test-{os.getpid()}"
        if not root.is_dir():
            continue
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / limit).exists():
                (group / limit).write_text(str(nbytes))
                yield group
                return
        finally:
            group.rmdir()
    pytest.skip("needs a memory cgroup that may be made: neither v1 nor v2 can be used here")


@pytest.mark.root
@pytest.mark.parametrize("target", [["safetensors"], ["hdf5", "gzip"]], ids="-".join)
def test_a_dataset_several_times_the_limit(tmp_path, target):
    limit = 512 << 20  # torch and h5py alone take half of it
    source = sparse_source(tmp_path / "pt", 2 * limit)
    with memory_group(limit) as group:
        found = measure([source, tmp_path / "out", *target], group)
    assert found["ok"]
    assert found["converted"] < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [1, 4, 16])
def test_the_bound_holds_at_any_size(tmp_path, gigabytes):
    source = sparse_source(tmp_path / "pt", gigabytes << 30)
    found = measure([source, tmp_path / "out", "hdf5", "gzip"])
    assert found["ok"]
    assert found["converted"] < BOUND
