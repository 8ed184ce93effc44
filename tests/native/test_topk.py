"""The compiled reservoirs of products: what is kept, what is counted, and what the floor says of the rest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings as example_settings, strategies as st

from jasper_store.building.quantized import LEFT_OUT, quantize
from jasper_store.native.library import library
from jasper_store.native.topk import offer, offers

pytestmark = pytest.mark.skipif(not offers(torch.device("cpu")), reason="the library was not built")


def reservoirs(tasks: int, keep: int, capacity: int) -> SimpleNamespace:
    return SimpleNamespace(
        keep=keep,
        values=torch.full((tasks, capacity), -torch.inf),
        columns=torch.full((tasks, capacity), -1, dtype=torch.int32),
        fill=torch.zeros(tasks, dtype=torch.int64),
        floor=torch.full((tasks,), -torch.inf),
    )


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    level = ["baseline", "avx2", "avx512"].index(request.param)
    found = library().jasper_use_instructions(level)
    if found == level:
        yield
    library().jasper_use_instructions(2)
    if found < level:
        pytest.skip(f"this processor has no {request.param}")


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("columns", "keep", "capacity"), [(1, 1, 2), (63, 3, 5), (64, 3, 19), (700, 20, 40), (700, 1, 2), (3000, 64, 128)]
)
def test_the_best_are_kept_and_the_floor_bounds_the_rest(threads: int, columns: int, keep: int, capacity: int) -> None:
    rng = np.random.default_rng(columns + keep)
    units = 50
    tasks_of = rng.integers(0, 4, units)
    first_task = np.concatenate([[0], np.cumsum(tasks_of)])
    tasks = int(first_task[-1])
    # Whole numbers, so that many are equal; some are left out, and rows are part of a wider product.
    wide = torch.from_numpy(rng.integers(-9, 10, (units, columns + 3)).astype(np.float32))
    wide[torch.from_numpy(rng.random(wide.shape) < 0.1)] = -torch.inf
    wide[0] = -torch.inf
    product = wide[:, 3:]
    ceiling = torch.from_numpy(rng.integers(2, 12, tasks).astype(np.float32))
    ceiling[::3] = torch.inf
    pool, above = reservoirs(tasks, keep, capacity), torch.zeros(tasks, dtype=torch.int64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # In three blocks, as products arrive.
        edges = [0, columns // 3, columns // 2, columns]
        for start, stop in itertools.pairwise(edges):
            offer(pool, product[:, start:stop], first_task, 1000 + start, ceiling, above)
    finally:
        torch.set_num_threads(before)
    for unit in range(units):
        row = product[unit]
        for task in range(first_task[unit], first_task[unit + 1]):
            good = row[(row <= ceiling[task]) & (row > -torch.inf)].sort(descending=True).values
            fill = int(pool.fill[task])
            found = pool.values[task, :fill]
            assert torch.equal(row[pool.columns[task, :fill].long() - 1000], found)
            assert len(set(pool.columns[task, :fill].tolist())) == fill
            assert torch.equal(found.sort(descending=True).values[:keep], good[:keep])
            assert (pool.values[task, fill:] == -torch.inf).all()
            assert int(above[task]) == int((row > ceiling[task]).sum())
            assert fill < capacity
            if fill < len(good):
                assert good[fill] <= pool.floor[task] <= found.min()


@pytest.mark.usefixtures("instructions")
@given(st.integers(0, 1 << 30), st.integers(1, 9), st.integers(1, 300), st.integers(1, 200), st.integers(1, 70))
@example_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_and_floats_keep_the_same(seed: int, units: int, columns: int, dim: int, keep: int) -> None:
    """Rows of any spread; those that are left out stay out, also of a reservoir that takes everything."""
    rng = np.random.default_rng(seed)
    both = rng.standard_normal((units + columns, dim)) * rng.choice([1.0, 40.0], (1, dim), p=[0.8, 0.2])
    both[units + columns // 2 :] = both[units : units + columns - columns // 2]
    rows = torch.nn.functional.normalize(torch.from_numpy(both).float(), dim=1)
    left, right = quantize(rows[:units].clone()), quantize(rows[units:].clone())
    exact = left.rows.double() @ right.rows.double().T
    of_bytes = (left.numbers.long() @ right.numbers.long().T).to(torch.int32)
    bounds = of_bytes.double() * left.quantum[:, None] * right.quantum
    bounds += left.length[:, None].double() * right.radius + left.radius[:, None]
    assert (exact + 1e-6 <= bounds).all()
    left_out = torch.from_numpy(rng.random((units, columns)) < 0.1)
    of_bytes[left_out] = LEFT_OUT
    exact[left_out] = -torch.inf

    first_task = np.arange(units + 1)
    ceiling = torch.from_numpy(rng.random(units).astype(np.float32)) + 1e-3
    pool, above = reservoirs(units, keep, 2 * keep), torch.zeros(units, dtype=torch.int64)
    for part in (slice(0, columns // 3), slice(columns // 3, columns)):
        offer(pool, of_bytes[:, part], first_task, part.start, ceiling, above, (left, right.part(part)))
    for unit in range(units):
        fill = int(pool.fill[unit])
        found = pool.values[unit, :fill].sort(descending=True).values[:keep]
        good = exact[unit][exact[unit] <= ceiling[unit]].sort(descending=True).values
        good = good[good > -torch.inf]
        near = ((exact[unit] - ceiling[unit]).abs() < 1e-6).sum()
        assert abs(int(above[unit]) - int((exact[unit] > ceiling[unit]).sum())) <= near
        if near == 0:
            assert len(found) == min(keep, len(good))
            assert torch.allclose(found.double(), good[: len(found)], rtol=0, atol=1e-6)
            assert not left_out[unit, pool.columns[unit, :fill].long()].any()


def test_rows_with_gaps_are_refused() -> None:
    pool = reservoirs(4, 2, 4)
    with pytest.raises(ValueError, match="without gaps"):
        offer(pool, torch.zeros(6, 4).T, np.arange(5), 0, torch.ones(4), torch.zeros(4, dtype=torch.int64))
