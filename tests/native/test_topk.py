"""The compiled reservoirs of products: what is kept, what is counted, and what the floor says of the rest."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

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


def test_rows_with_gaps_are_refused() -> None:
    pool = reservoirs(4, 2, 4)
    with pytest.raises(ValueError, match="without gaps"):
        offer(pool, torch.zeros(6, 4).T, np.arange(5), 0, torch.ones(4), torch.zeros(4, dtype=torch.int64))
