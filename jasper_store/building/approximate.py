"""Lists of similar sources from an inverted file of faiss, which looks at a part of all sources.

Sources of the own and the adjacent clusters are still looked at all: there are few. What the index finds is ranked by exact
cosines afterwards, as after :mod:`jasper_store.building.sweep`; what it misses is missing. How much that is, is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch

from jasper_store.building.faiss_library import faiss_in_one_thread
from jasper_store.building.problem import Problem
from jasper_store.building.similarity import product_error
from jasper_store.building.sweep import Block, BlockSizes, Lists, Sweep
from jasper_store.building.tiers import OTHER
from jasper_store.errors import IncompatibleOptionsError, InsufficientMemoryError
from jasper_store.memory.sizes import format_bytes

__all__ = ["ApproximateIndex", "approximate_lists", "measured_recall"]

_CELLS_PER_ROOT: Final = 4
_CELL_ROWS: Final = 39
"""Sources for each cell, at least: faiss recommends as many for k-means."""
_SAMPLED: Final = 64
"""Sources that k-means sees for each cell."""
_PROBED: Final = 64
"""Cells that a question looks into."""
_BLOCK_ROWS: Final = 1 << 13
_FOUND: Final = 4
"""How many are asked for, for each that is listed: positives, near clusters and what is too similar are left out of them."""
_MEASURED: Final = 256
_UNKNOWN: Final = 2.0
"""Above every cosine: where an index finds fewer than asked for, nothing is known of the rest."""


class ApproximateIndex:
    """All sources of a problem at length 1, in ``4 sqrt(S)`` cells, of which 64 are searched.

    Args:
        problem: what is mined.
        memory_limit: bytes that it may hold.

    Raises:
        IncompatibleOptionsError: faiss is not installed, or products are to be made on a device.
        InsufficientMemoryError: the index does not fit.
    """

    def __init__(self, problem: Problem, memory_limit: int) -> None:
        if problem.device.type != "cpu":
            msg = f"method='faiss' searches on the CPU; expected device='cpu' with it, found {problem.device}"
            raise IncompatibleOptionsError(msg)
        n_sources, dim = problem.sources.n_rows, problem.sources.dim
        cells = max(min(round(_CELLS_PER_ROOT * math.sqrt(n_sources)), n_sources // _CELL_ROWS), 1)
        sampled = min(_SAMPLED * cells, n_sources)
        # faiss grows its lists by doubling them.
        self.nbytes = 2 * n_sources * (4 * dim + 8) + 3 * sampled * 4 * dim
        if self.nbytes > memory_limit:
            msg = (
                f"method='faiss' needs {format_bytes(self.nbytes)} for its index of {n_sources:,} sources, and "
                f"{format_bytes(memory_limit)} are free; raise memory_limit=, or pass method='exact', which needs no index"
            )
            raise InsufficientMemoryError(msg, needed=self.nbytes, available=memory_limit)
        rng = np.random.default_rng(problem.settings.seed)
        sample = np.sort(rng.permutation(n_sources)[:sampled])
        with faiss_in_one_thread("method='faiss' searches", "method='exact'") as faiss:
            self._index: Any = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
            self._index.cp.seed = problem.settings.seed % (1 << 31)
            self._index.cp.min_points_per_centroid = 1
            self._index.cp.max_points_per_centroid = _SAMPLED
            self._index.train(problem.sources.unit(problem.clusters.rows[sample]).numpy())
            for start in range(0, n_sources, _BLOCK_ROWS):
                rows = problem.clusters.rows[start : start + _BLOCK_ROWS]
                self._index.add(problem.sources.unit(rows).numpy())
        self._index.nprobe = min(_PROBED, cells)

    def search(self, units: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Products and positions of the most similar sources of rows at length 1 [n, count], falling; -1 where none is found."""
        products, positions = self._index.search(units.numpy(), count)
        return products, positions


def approximate_lists(
    problem: Problem,
    index: ApproximateIndex,
    tasks: np.ndarray,
    keep: int,
    sizes: BlockSizes,
    advance: Callable[[int], None] | None = None,
) -> Lists:
    """As :func:`jasper_store.building.sweep.sweep`, with what the index finds of other clusters; its floors hold for that."""
    with torch.inference_mode():
        return _Searched(problem, tasks, keep, sizes, index).run(advance)


def measured_recall(problem: Problem, index: ApproximateIndex, count: int) -> float:
    """Share of the ``count`` most similar sources of a question that the index finds, of the questions of 256 pairs."""
    some = problem.order[np.linspace(0, problem.n_pairs - 1, min(_MEASURED, problem.n_pairs)).astype(np.int64)]
    units = problem.questions.unit(problem.pair_question[some])
    count = min(count, problem.sources.n_rows)
    best = torch.full((len(units), count), -torch.inf)
    with torch.inference_mode():
        for start in range(0, problem.sources.n_rows, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, problem.sources.n_rows)
            product = units @ problem.unit_sources(start, stop).T
            best = torch.cat((best, product), dim=1).topk(count, dim=1).values
    products, positions = index.search(units, count)
    # By value, since of equally similar sources any is as good.
    least = best[:, -1:].numpy() - 2 * product_error(problem.sources.dim)
    return float(((products >= least) & (positions >= 0)).mean())


class _Searched(Sweep):
    def __init__(
        self, problem: Problem, tasks: np.ndarray, keep: int, sizes: BlockSizes, index: ApproximateIndex
    ) -> None:
        super().__init__(problem, tasks, keep, sizes)
        self._tasks = tasks
        self._index = index

    def run(self, advance: Callable[[int], None] | None) -> Lists:
        units = self._problem.questions.unit(self._unit_questions)
        for low in range(0, len(units), self._sizes.units):
            high = min(low + self._sizes.units, len(units))
            self._look_near(units[low:high], low)
            self._search(units[low:high], low)
            if advance is not None:
                advance((high - low) * self._problem.sources.n_rows)
        return self._lists()

    def _look_near(self, units: torch.Tensor, low: int) -> None:
        """Offer all sources of the own and the adjacent clusters."""
        if len(self._kinds) == 1:
            return
        clusters = self._unit_clusters[low : low + len(units)]
        edges = np.flatnonzero(np.append(True, clusters[1:] != clusters[:-1])).tolist()
        for first, last in zip(edges, [*edges[1:], len(units)], strict=True):
            for kind, begin, end in self._problem.clusters.runs(int(clusters[first])):
                for start in range(begin, end, self._sizes.sources):
                    stop = min(start + self._sizes.sources, end)
                    product = units[first:last] @ self._problem.unit_sources(start, stop).T
                    block = Block(product, low + first, start, None)
                    self._exclude(block)
                    self._offer(kind, block)

    def _search(self, units: torch.Tensor, low: int) -> None:
        """Offer what the index finds, without near clusters, positives and what is above the ceiling."""
        problem, pool = self._problem, self._pools[OTHER]
        begin, end = self._first_task[low], self._first_task[low + len(units)]
        owner = np.repeat(np.arange(len(units)), np.diff(self._first_task[low : low + len(units) + 1]))
        count = min(_FOUND * self._keep, problem.sources.n_rows)
        values, positions = (part[owner] for part in self._index.search(units, count))
        there = positions >= 0
        rows, pairs = problem.clusters.rows[np.where(there, positions, 0)], self._tasks[begin:end]
        good = there & ~problem.is_excluded(np.repeat(pairs, count), rows.ravel()).reshape(rows.shape)
        if len(self._kinds) > 1:
            good &= problem.kinds_of(pairs, rows) == OTHER
        over = good & (values > self._ceilings[begin:end].numpy()[:, None])
        self._above[begin:end] += torch.from_numpy(over.sum(axis=1))
        good &= ~over
        task, column = good.nonzero()
        pool.add(
            torch.from_numpy(task + begin),
            torch.from_numpy(positions[task, column]),
            torch.from_numpy(values[task, column]),
        )
        if count < problem.sources.n_rows:
            worst = np.where(there[:, -1], values[:, -1], np.float32(_UNKNOWN)).astype(np.float32)
            pool.floor[begin:end] = torch.maximum(pool.floor[begin:end], torch.from_numpy(worst))
