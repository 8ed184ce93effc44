"""How many pairs and products are held at once, so that mining stays within its memory."""

from __future__ import annotations

from dataclasses import dataclass

from jasper_store.building.problem import Problem
from jasper_store.building.sweep import BlockSizes
from jasper_store.building.topk import Reservoir
from jasper_store.errors import InsufficientMemoryError
from jasper_store.memory.sizes import format_bytes

__all__ = ["MemoryPlan", "plan_memory"]

_MOST_TASKS = 1 << 14
_BLOCKS = (BlockSizes(1024, 2048), BlockSizes(512, 1024), BlockSizes(128, 512), BlockSizes(32, 128))
_PRODUCT_COPIES = 5
"""Of a product: itself, rows of it that are looked through whole, which of them are above, and its maxima."""
_EXACT_NBYTES = 24 << 20
"""Rows whose cosines are computed again, and what a library puts in order for a product."""

_CANDIDATE_NBYTES = 160
"""Of a candidate while it is chosen from: similarity, row, kind, keys, order, and masks."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What fits.

    Attributes:
        tasks: pairs of a block.
        sizes: sizes of the products.
        hold_sources: whether all sources at length 1 are kept.
    """

    tasks: int
    sizes: BlockSizes
    hold_sources: bool


def plan_memory(problem: Problem, keep: int, memory_limit: int) -> MemoryPlan:
    """Share out the memory.

    Args:
        problem: what is mined; what it holds of pairs and sources is counted.
        keep: candidates of each list.
        memory_limit: bytes.

    Raises:
        InsufficientMemoryError: not even the smallest blocks fit.
    """
    dim, n_sources = problem.sources.dim, problem.sources.n_rows
    keep = min(keep, n_sources)
    free = memory_limit - _fixed_nbytes(problem)
    lists = 1 if problem.pair_clusters is None or problem.settings.ranks else 3
    # A row of floats and of bytes; reservoirs, and their copies when the lists are made and chosen from.
    task = 5 * dim + lists * (2 * Reservoir.row_nbytes(keep) + keep * (12 + _CANDIDATE_NBYTES))
    for sizes in _BLOCKS:
        block = 4 * sizes.units * sizes.sources * _PRODUCT_COPIES + 24 * dim * sizes.sources + _EXACT_NBYTES
        tasks = min(int((free - block) * 0.6) // task, _MOST_TASKS)
        if tasks >= min(sizes.units, problem.n_pairs):
            rest = free - block - tasks * task
            return MemoryPlan(max(tasks, 1), sizes, problem.source_nbytes * n_sources <= rest)
    smallest = 4 * _BLOCKS[-1].units * _BLOCKS[-1].sources * _PRODUCT_COPIES + 24 * dim * _BLOCKS[-1].sources
    needed = _fixed_nbytes(problem) + smallest + _EXACT_NBYTES + int(_BLOCKS[-1].units * task / 0.6)
    if free > smallest + _EXACT_NBYTES + task / 0.6:
        return MemoryPlan(1, _BLOCKS[-1], hold_sources=False)
    msg = (
        f"mining {problem.n_pairs:,} pairs among {n_sources:,} sources of {dim} dimensions needs {format_bytes(needed)}, and "
        f"memory_limit is {format_bytes(memory_limit)}: {format_bytes(_fixed_nbytes(problem))} are numbers of pairs and "
        "sources. Raise memory_limit="
    )
    raise InsufficientMemoryError(msg, needed=needed, available=memory_limit)


def _fixed_nbytes(problem: Problem) -> int:
    """Bytes of what is kept of every pair and every source all the time, results included."""
    per_pair = 8 * 6 + 4 + problem.settings.n_neg * 13
    per_source = 8 * 6
    return problem.n_pairs * per_pair + problem.sources.n_rows * per_source + problem.questions.n_rows * 16
