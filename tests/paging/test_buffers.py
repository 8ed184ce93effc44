"""Memory is reused, but never while anything refers to it."""

from __future__ import annotations

import gc
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from jasper_store.paging.buffers import BufferPool

ROWS = 1 << 18  # of 4 bytes: a MiB

linux = pytest.mark.skipif(sys.platform != "linux", reason="the C library's memory is used elsewhere")


@linux
def test_memory_is_reused_once_nothing_refers_to_it() -> None:
    pool = BufferPool()
    first = pool.empty((ROWS,), torch.float32)
    address = first.data_ptr()
    view = first[5:10]
    array = first[20:30].numpy()
    del first
    assert pool.empty((ROWS,), torch.float32).data_ptr() != address
    del view
    assert pool.empty((ROWS,), torch.float32).data_ptr() != address
    array[:] = 7
    del array
    found = {pool.empty((ROWS,), torch.float32).data_ptr() for _ in range(3)}
    assert address in found


def test_tensors_that_live_together_never_share() -> None:
    pool = BufferPool()
    for _ in range(3):
        held = [pool.empty((ROWS + number, 2), torch.int32).fill_(number) for number in range(12)]
        assert all(bool((tensor == number).all()) for number, tensor in enumerate(held))


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0, 5), (ROWS,), (ROWS, 3), (1000, 384)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = BufferPool().empty(shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    # Only what was asked for is sent to another process or saved.
    assert tensor.untyped_storage().nbytes() == tensor.nbytes


@linux
def test_free_memory_is_limited() -> None:
    pool = BufferPool(max_free_nbytes=30 << 20)
    for size in range(1, 20):
        held = [pool.empty((ROWS * size,), torch.float32) for _ in range(5)]
        del held
    gc.collect()
    assert 0 < pool.free_nbytes <= 30 << 20
    assert pool._in_use == {}


@linux
def test_blocks_of_sizes_that_come_no_more_are_given_back() -> None:
    # Batches change their size with the number of ranks and at the end of an epoch: each size was kept up to the limit.
    pool = BufferPool(max_idle_nbytes=20 << 20)
    for size in range(2, 9):
        pool.empty((ROWS * size,), torch.float32)
    assert pool.free_nbytes > 20 << 20
    for _ in range(21):
        pool.empty((ROWS,), torch.float32)
    assert pool.free_nbytes == 1 << 20


@linux
def test_what_is_cleared_is_kept_again_afterwards() -> None:
    pool = BufferPool()
    used = pool.empty((ROWS,), torch.float32).fill_(3)
    pool.empty((ROWS * 2,), torch.float32)
    pool.clear()
    assert pool.free_nbytes == 0
    assert bool((used == 3).all())
    del used
    assert pool.free_nbytes == 1 << 20


@linux
def test_the_block_released_last_is_reused_first() -> None:
    pool = BufferPool()
    held = [pool.empty((ROWS,), torch.float32) for _ in range(3)]
    addresses = [tensor.data_ptr() for tensor in held]
    while held:
        held.pop(0)
    again = [pool.empty((ROWS,), torch.float32) for _ in range(3)]
    assert [tensor.data_ptr() for tensor in again] == addresses[::-1]


@linux
def test_batches_that_outlive_the_interpreter_end_quietly() -> None:
    # What `sys` holds goes last of all, when the names of modules are gone.
    code = """
import sys
import torch
from jasper_store.paging.buffers import BufferPool
pool = BufferPool(max_free_nbytes=1 << 20)
sys.kept = [pool, *(pool.empty((1 << 19,), torch.float32) for _ in range(5))]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""


def test_several_threads() -> None:
    pool = BufferPool()

    def work(number: int) -> bool:
        good = True
        for _ in range(30):
            tensor = pool.empty((ROWS // 2,), torch.float32).fill_(number)
            good = good and bool((tensor == number).all())
        return good

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(8)))


@linux
def test_refused_memory_comes_from_the_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(nbytes: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("jasper_store.paging.buffers.anonymous", refuse)
    assert BufferPool().empty((ROWS,), torch.float32).shape == (ROWS,)
