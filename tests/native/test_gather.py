"""The kernel gathers what torch gathers, and refuses what torch refuses, before it writes anything."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings, strategies as st

from jasper_store.native import gather
from jasper_store.native.gather import Jobs, source_of, widening
from jasper_store.native.library import library

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
INTEGERS = [torch.int32, torch.int16, torch.int8, torch.uint8]
# Rows of no line, of less than one, of one, of some and a rest.
WIDTHS = [(), (1,), (2,), (3, 5), (16,), (64,), (384,), (401,)]

needs_kernel = pytest.mark.skipif(gather.kernel() is None, reason="the kernel was not built: no C compiler here")


def test_it_was_built_where_it_can_be() -> None:
    if sys.platform != "linux" or not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("there is no C compiler here")
    assert gather.kernel() is not None


def values(n: int, width: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    bits = torch.randint(-128, 128, (n * math.prod(width) * dtype.itemsize,), dtype=torch.int8)
    return bits.view(dtype).view(n, *width)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(
        first.reshape(-1).view(torch.int8), second.reshape(-1).view(torch.int8)
    )


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    """The loops for one set of instructions; a wheel has all of them, and takes the best that the processor has."""
    native, level = library(), ["baseline", "avx2", "avx512"].index(request.param)
    if native is None:
        pytest.skip("the kernel was not built: no C compiler here")
    found = native.jasper_use_instructions(level)
    if found == level:
        yield
    native.jasper_use_instructions(2)
    if found < level:
        pytest.skip(f"this processor has no {request.param}")


def rows_that_are_large_together(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tables with rows to take: some MB, so that threads share them and stores pass by the cache where they can."""
    widths = [(384,), (16,), (401,), (7,), (), (1,), (3,)]
    return [(values(n, width, torch.float32), torch.randint(0, n, (5000,))) for width in widths]


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("way", range(4))
@pytest.mark.parametrize("threads", [1, 2])
def test_every_set_of_instructions_and_every_way_gives_the_same_bits(threads: int, way: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    library().jasper_use_way(way)
    try:
        for table, rows in rows_that_are_large_together(700):
            out = values(len(rows), tuple(table.shape[1:]), torch.float32)
            jobs = Jobs()
            jobs.add(source_of(table), rows, out)
            assert jobs.run() is None
            assert same_bits(out, table[rows])
    finally:
        library().jasper_use_way(-1)
        torch.set_num_threads(before)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 1000])
def test_every_width_and_dtype(width: tuple[int, ...], dtype: torch.dtype, count: int) -> None:
    table = values(77, width, dtype)
    rows = torch.randint(0, 77, (count,))
    out = values(count, width, dtype)
    jobs = Jobs()
    jobs.add(source_of(table), rows, out)
    assert jobs.run() is None
    assert same_bits(out, table[rows])


@needs_kernel
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("width", [(), (5,), (2, 3)])
def test_integers_become_int64(dtype: torch.dtype, width: tuple[int, ...]) -> None:
    table = values(50, width, dtype)
    rows = torch.randint(0, 50, (300,))
    out = torch.empty(300, *width, dtype=torch.int64)
    widen = widening(dtype, torch.int64)
    assert widen is not None
    jobs = Jobs()
    jobs.add(source_of(table), rows, out, widen)
    assert jobs.run() is None
    assert torch.equal(out, table[rows].to(torch.int64))


def test_what_can_be_widened() -> None:
    assert widening(torch.float32, torch.float32) == 0
    assert widening(torch.float32, torch.int64) is None
    assert widening(torch.int32, torch.int16) is None
    assert widening(torch.int64, torch.int64) == 0


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_gathers_are_shared_by_threads(threads: int) -> None:
    before = torch.get_num_threads()
    tables = [values(3000, width, torch.float32) for width in ((384,), (7,), ())]
    rows = [torch.randint(0, 3000, (count,)) for count in (5000, 1, 9999)]
    outs = [torch.empty(len(named), *table.shape[1:]) for named, table in zip(rows, tables, strict=True)]
    torch.set_num_threads(threads)
    try:
        jobs = Jobs()
        for table, named, out in zip(tables, rows, outs, strict=True):
            jobs.add(source_of(table), named, out)
        assert jobs.run() is None
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(out, table[named]) for table, named, out in zip(tables, rows, outs, strict=True))


@needs_kernel
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_rows_and_sources_of_any_stride(data: st.DataObject) -> None:
    n, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 30))
    step, skip = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 5))
    wide = values(n, (width + skip,), torch.float32)
    table = wide[:, :width] if skip else wide
    rows = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), max_size=60)), dtype=torch.int64)
    spread = torch.full((max(len(rows), 1) * step,), -(2**62), dtype=torch.int64)
    spread[: len(rows) * step : step] = rows
    named = spread[: len(rows) * step : step]
    out = torch.empty(len(rows), width)
    jobs = Jobs()
    jobs.add(source_of(table), named, out)
    assert jobs.run() is None
    assert same_bits(out, table[rows])


@needs_kernel
@pytest.mark.parametrize("bad", [-1, 10, 2**62, -(2**63)])
@pytest.mark.parametrize("place", [0, 1, 500, 999])
def test_a_row_out_of_range_is_refused_before_anything_is_written(bad: int, place: int) -> None:
    table = values(10, (384,), torch.float32)
    good, rows = torch.zeros(1000, dtype=torch.int64), torch.zeros(1000, dtype=torch.int64)
    rows[place] = bad
    outs = [torch.full((1000, 384), 5.0) for _ in range(2)]
    jobs = Jobs()
    jobs.add(source_of(table), good, outs[0])
    jobs.add(source_of(table), rows, outs[1])
    assert jobs.run() == 1
    assert all(bool((out == 5).all()) for out in outs)


@needs_kernel
def test_no_rows_and_no_jobs() -> None:
    out = torch.empty(0, 3)
    jobs = Jobs()
    jobs.add(source_of(torch.ones(4, 3)), torch.empty(0, dtype=torch.int64), out)
    assert jobs.run() is None
    assert Jobs().run() is None


@needs_kernel
def test_it_writes_past_no_end() -> None:
    # The rows before and after the target, which large gathers write to past the cache.
    table = values(100, (384,), torch.float32)
    rows = torch.randint(0, 100, (4000,))
    around = torch.full((4002, 384), 7.0)
    jobs = Jobs()
    jobs.add(source_of(table), rows, around[1:-1])
    assert jobs.run() is None
    assert same_bits(around[1:-1], table[rows])
    assert bool((around[0] == 7).all() and (around[-1] == 7).all())


@pytest.mark.parametrize(
    "tensor",
    [torch.empty(0, 4), torch.empty(5, 0), torch.ones(4, 6).t(), torch.ones(3, 4, device="meta")],
    ids=["no rows", "no columns", "rows with gaps", "no memory"],
)
def test_what_the_kernel_cannot_reach(tensor: torch.Tensor) -> None:
    assert source_of(tensor).numbers == ()


def test_without_a_kernel_nothing_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "kernel", lambda: None)
    assert source_of(torch.ones(4, 3)).numbers == ()
