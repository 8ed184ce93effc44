"""A gather that a helper thread begins gives what the gather gives, whatever happens before its results are asked for."""

from __future__ import annotations

import array
import gc
import os
import time
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings, strategies as st

from jasper_store.native import gather
from jasper_store.native.gather import BegunGather, source_of
from jasper_store.native.library import library
from jasper_store.store.compiled_gather import INPUT, CompiledGather, IndexRef, Step

pytestmark = pytest.mark.skipif(gather.kernel() is None, reason="the kernel was not built: no C compiler here")

N, WIDTH = 3000, 384  # 4.6 MB of values: ten parts


@pytest.fixture(autouse=True, scope="module")
def no_trials() -> Iterator[None]:
    """A gather whose way of copying is on trial is not begun."""
    library().jasper_use_way(0)
    yield
    library().jasper_use_way(-1)


def compiled(n: int = N, width: int = WIDTH) -> tuple[CompiledGather, torch.Tensor, torch.Tensor]:
    """Values named by an index tensor, and the index itself."""
    numbers = torch.randint(0, n, (n,), dtype=torch.int32)
    values = torch.randn(n, width)
    steps = [
        Step("numbers", source_of(numbers), INPUT, torch.int64, result=False),
        Step("values", source_of(values), IndexRef(0), torch.float32),
        Step("numbers", source_of(numbers), INPUT, torch.int64),
    ]
    return CompiledGather(steps), numbers, values


def assert_gathered(found: list[torch.Tensor], rows: torch.Tensor, numbers: torch.Tensor, values: torch.Tensor) -> None:
    named = numbers.long()[rows]
    assert torch.equal(found[0], values[named])
    assert torch.equal(found[1], named)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, N), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_it_gives_what_the_gather_gives(counts: list[int], random: object) -> None:
    """Several at a time, of which one has the helper, asked for in any order."""
    made, numbers, values = compiled()
    batches = [torch.randint(0, N, (count,)) for count in counts]
    begun = [(rows, made.begin(rows)) for rows in batches]
    random.shuffle(begun)  # type: ignore[attr-defined]
    for rows, finish in begun:
        assert_gathered(finish(), rows, numbers, values)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_with_any_number_of_threads_and_after_any_time(threads: int) -> None:
    before = torch.get_num_threads()
    made, numbers, values = compiled()
    torch.set_num_threads(threads)
    try:
        for pause in [0, 1e-5, 1e-4, 1e-3, 5e-3] * 8:
            rows = torch.randint(0, N, (N,))
            finish = made.begin(rows)
            other = values[:100].sum()  # torch's threads and the helper share the cores
            time.sleep(pause)
            assert_gathered(finish(), rows, numbers, values)
            assert other == values[:100].sum()
    finally:
        torch.set_num_threads(before)


def test_other_gathers_run_meanwhile() -> None:
    made, numbers, values = compiled()
    for _ in range(30):
        rows, others = torch.randint(0, N, (2, N))
        finish = made.begin(rows)
        assert_gathered(made.run(others), others, numbers, values)
        assert_gathered(finish(), rows, numbers, values)


@pytest.mark.parametrize("stage", ["first", "last"])
def test_a_row_out_of_range_is_refused_at_once(stage: str) -> None:
    made, numbers, _ = compiled()
    rows = torch.arange(N)
    if stage == "first":
        rows[17] = N
    else:
        numbers[17] = N + 5
    with pytest.raises(IndexError, match="numbers" if stage == "first" else "values"):
        made.begin(rows)
    assert len(made.run(torch.zeros(5, dtype=torch.int64))) == 2


def test_nothing_is_written_after_it_was_dropped() -> None:
    for pause in [0, 0, 1e-5, 1e-4] * 10:
        rows, source = torch.randint(0, N, (N,)), source_of(torch.ones(N, WIDTH))
        out = torch.zeros(N, WIDTH)
        jobs = gather.Jobs()
        jobs.add(source, rows, out)
        begun = BegunGather(array.array("q", jobs._numbers), keep=None)
        time.sleep(pause)
        del begun
        at_once = out.clone()
        time.sleep(2e-3)
        assert torch.equal(out, at_once)


def test_what_it_reads_and_writes_lives_as_long_as_it_works() -> None:
    made, numbers, values = compiled()
    rows = torch.randint(0, N, (N,))
    wanted = [values[numbers.long()[rows]], numbers.long()[rows]]
    alive = weakref.ref(made)
    finish = made.begin(rows)
    del made, numbers, values, rows
    gc.collect()
    junk = [torch.full((N, WIDTH), 7.0) for _ in range(3)]
    assert alive() is not None
    for found, expected in zip(finish(), wanted, strict=True):
        assert torch.equal(found, expected)
    del finish, junk
    assert alive() is None


def test_a_forked_process_finishes_what_was_begun_before_it() -> None:
    """Its helper stayed in the parent, perhaps in the middle of a part."""
    # 46 MB: more than a helper copies while a process is forked.
    made, numbers, values = compiled(n=10 * N)
    for pause in [0, 2e-5, 1e-4, 3e-4] * 3:
        rows = torch.randint(0, 10 * N, (10 * N,))
        finish, dropped = made.begin(rows), made.begin(rows.flip(0))
        time.sleep(pause)
        child = os.fork()
        if not child:
            status = 1
            try:
                del dropped
                torch.set_num_threads(1)  # torch's own threads do not survive a fork
                found = finish()
                status = 0 if torch.equal(found[1], numbers.long()[rows]) else 2
                if not (found[0].numpy() == values.numpy()[numbers.numpy()[rows.numpy()]]).all():
                    status = 3
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        del dropped
        assert_gathered(finish(), rows, numbers, values)
