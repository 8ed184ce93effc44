"""The most similar sources of each pair, from one pass over all products of questions and sources.

::

    a block of tasks (pairs, sorted by cluster and question)
      its units: the distinct questions of each cluster, at length 1
      for each block of sources, in the order of clusters:
        for each block of units:
          product [units, sources]                one matrix product
          positives and their duplicates          set to -inf
          runs of the own and adjacent clusters   offered to their reservoirs, then set to -inf
          what is left                            offered to the reservoir of other clusters
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from jasper_store.building.problem import Problem
from jasper_store.building.similarity import product_error
from jasper_store.building.tiers import ADJACENT, IN_CLUSTER, OTHER
from jasper_store.building.topk import Reservoir, above
from jasper_store.native.topk import offer, offers

__all__ = ["BlockSizes", "Lists", "Sweep", "sweep"]

_SCATTERED = 1 << 8
"""Members of a group of duplicates up to which they are listed one by one for each unit."""


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """How much is held at once.

    Attributes:
        units: rows of a product.
        sources: columns of a product.
    """

    units: int = 1024
    sources: int = 2048


@dataclass(frozen=True, slots=True)
class Lists:
    """Candidates of tasks, by kind: in cluster, adjacent, other. Without clusters, only other.

    Attributes:
        kinds: the kinds that there are.
        values: float32 [kinds, T, keep], falling; -inf behind the last.
        positions: positions of the sources, int64; -1 behind the last.
        floors: float32 [kinds, T]: sources that are not listed are not above this by their product.
        above: sources that are more similar than the ceiling beyond doubt, int64 [T]; they are not listed.
        error: how far a value may be from the cosine.
    """

    kinds: tuple[int, ...]
    values: np.ndarray
    positions: np.ndarray
    floors: np.ndarray
    above: np.ndarray
    error: float

    def of(self, some: np.ndarray) -> Lists:
        """The lists of some of the tasks."""
        return Lists(
            self.kinds,
            self.values[:, some],
            self.positions[:, some],
            self.floors[:, some],
            self.above[some],
            self.error,
        )


def sweep(
    problem: Problem,
    tasks: np.ndarray,
    keep: int,
    sizes: BlockSizes,
    advance: Callable[[int], None] | None = None,
) -> Lists:
    """List the most similar sources of tasks.

    Args:
        problem: what is mined.
        tasks: pairs, sorted by cluster and question [T].
        keep: how many to list of each kind.
        sizes: sizes of the blocks; they change no result, only what else is listed.
        advance: called with the number of products that were made since the last call.
    """
    with torch.inference_mode(), _full_precision():
        return Sweep(problem, tasks, keep, sizes).run(advance)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Forbid products of less than float32, which the bound on their error does not cover."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Sweep:
    """One pass; see :func:`sweep`."""

    def __init__(self, problem: Problem, tasks: np.ndarray, keep: int, sizes: BlockSizes) -> None:
        self._problem = problem
        self._sizes = sizes
        self._device = device = problem.device
        self._keep = min(keep, problem.sources.n_rows)
        self._error = product_error(problem.sources.dim)
        clustered = bool(len(problem.clusters.adjacent))
        self._kinds = (IN_CLUSTER, ADJACENT, OTHER) if clustered and not problem.settings.ranks else (OTHER,)
        self._pools = {kind: Reservoir(len(tasks), self._keep, device) for kind in self._kinds}
        ceilings = problem.sweep_ceilings(tasks) + self._error
        # Rounded up, so that nothing is left out that may be below the ceiling.
        rounded = np.nextafter(ceilings.astype(np.float32), np.float32(np.inf))
        self._ceilings = torch.from_numpy(rounded).to(device)
        self._limited = bool(np.isfinite(ceilings).any())
        self._above = torch.zeros(len(tasks), dtype=torch.int64, device=device)
        self._compiled = offers(device)
        self._group_units(problem.cluster_of(tasks), problem.pair_question[tasks])
        self._list_excluded()

    def _group_units(self, clusters: np.ndarray, questions: np.ndarray) -> None:
        """Find the units, and the tasks of each, which are consecutive."""
        new = np.ones(len(questions), bool)
        new[1:] = (questions[1:] != questions[:-1]) | (clusters[1:] != clusters[:-1])
        first = np.flatnonzero(new)
        self._unit_questions = questions[first]
        self._unit_clusters = clusters[first]
        self._first_task = np.append(first, len(questions))
        self._one_to_one = len(first) == len(questions)
        self._unit_of_task = torch.from_numpy(np.cumsum(new) - 1).to(self._device)
        self._first = torch.from_numpy(self._first_task).to(self._device)

    def _list_excluded(self) -> None:
        """Positives of each unit's question and their duplicates: small groups by member, large ones by group."""
        problem = self._problem
        unit, group = problem.positive_groups(self._unit_questions)
        large = problem.groups.sizes[group] > _SCATTERED
        which, position = problem.groups.expanded(group[~large])
        order = np.argsort(position, kind="stable")
        self._excluded_units = unit[~large][which][order]
        self._excluded_positions = position[order]
        self._large_units, self._large_groups = unit[large], group[large]

    def run(self, advance: Callable[[int], None] | None) -> Lists:
        """List the candidates; ``advance`` as for :func:`sweep`."""
        problem, sizes = self._problem, self._sizes
        total = problem.sources.n_rows
        units = problem.questions.unit(self._unit_questions).to(self._device)
        width = min(sizes.sources, total)
        height = min(sizes.units, len(units))
        out = torch.empty(height * width, device=self._device)
        for start in range(0, total, width):
            stop = min(start + width, total)
            sources = problem.unit_sources(start, stop)
            for low in range(0, len(units), height):
                high = min(low + height, len(units))
                product = out[: (high - low) * (stop - start)].view(high - low, stop - start)
                torch.mm(units[low:high], sources.T, out=product)
                self._exclude(product, low, high, start, stop)
                self._offer_runs(product, low, high, start, stop)
                self._offer(OTHER, product, low, start)
                if advance is not None:
                    advance(product.numel())
        return self._lists()

    def _exclude(self, product: torch.Tensor, low: int, high: int, start: int, stop: int) -> None:
        first, last = np.searchsorted(self._excluded_positions, [start, stop])
        units = self._excluded_units[first:last]
        inside = (units >= low) & (units < high)
        rows = torch.from_numpy(units[inside] - low).to(product.device)
        columns = torch.from_numpy(self._excluded_positions[first:last][inside] - start).to(product.device)
        product[rows, columns] = -torch.inf
        if len(self._large_units):
            inside = (self._large_units >= low) & (self._large_units < high)
            self._exclude_large(product, self._large_units[inside] - low, self._large_groups[inside], start, stop)

    def _exclude_large(
        self, product: torch.Tensor, units: np.ndarray, groups: np.ndarray, start: int, stop: int
    ) -> None:
        known = self._problem.groups
        for group in np.unique(groups):
            members = known.members[known.starts[group] : known.starts[group + 1]]
            first, last = np.searchsorted(members, [start, stop])
            if first < last:
                rows = torch.from_numpy(units[groups == group]).to(product.device)
                columns = torch.from_numpy(members[first:last] - start).to(product.device)
                product[rows[:, None], columns[None, :]] = -torch.inf

    def _offer_runs(self, product: torch.Tensor, low: int, high: int, start: int, stop: int) -> None:
        """Offer the runs of the own and the adjacent clusters, and take them out of the product."""
        if len(self._kinds) == 1:
            return
        clusters = self._unit_clusters[low:high]
        edges = np.flatnonzero(np.append(True, clusters[1:] != clusters[:-1]))
        for first, last in zip(edges.tolist(), [*edges[1:].tolist(), high - low], strict=True):
            for kind, begin, end in self._problem.clusters.runs(int(clusters[first])):
                inside, outside = max(begin, start), min(end, stop)
                if inside < outside:
                    part = product[first:last, inside - start : outside - start]
                    self._offer(kind, part, low + first, inside)
                    part.fill_(-torch.inf)

    def _offer(self, kind: int, product: torch.Tensor, low: int, start: int) -> None:
        """Offer a product to a reservoir.

        Args:
            kind: whose reservoir.
            product: [units, n].
            low: the first unit.
            start: position of the first source.
        """
        pool = self._pools[kind]
        if self._compiled:
            offer(pool, product, self._first_task[low : low + len(product) + 1], start, self._ceilings, self._above)
            return
        begin, end = self._first_task[low], self._first_task[low + len(product)]
        floor = pool.floor[begin:end]
        if not self._one_to_one:
            owner = self._unit_of_task[begin:end] - low
            low_floor = torch.full((len(product),), torch.inf, device=product.device)
            floor = low_floor.scatter_reduce_(0, owner, floor, "amin")
        rows, columns, values, heavy = above(product, floor)
        rows, columns, values = self._tasks_of(rows + low, columns, values)
        if heavy.numel():
            self._offer_heavy(pool, product, heavy, low, start)
        if not self._one_to_one:
            better = values > pool.floor[rows]
            rows, columns, values = rows[better], columns[better], values[better]
        if self._limited:
            over = values > self._ceilings[rows]
            self._above.index_add_(0, rows, over.to(torch.int64))
            rows, columns, values = rows[~over], columns[~over], values[~over]
        pool.add(rows, columns + start, values)

    def _tasks_of(
        self, units: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same for each task of the units, sorted by task."""
        if self._one_to_one:
            return units, columns, values
        first, count = self._first[units], self._first[units + 1] - self._first[units]
        at = torch.repeat_interleave(torch.arange(len(units), device=units.device), count)
        begins = count.cumsum(0) - count
        tasks = first[at] + torch.arange(len(at), device=units.device) - begins[at]
        order = tasks.argsort(stable=True)
        return tasks[order], columns[at][order], values[at][order]

    def _offer_heavy(self, pool: Reservoir, product: torch.Tensor, units: torch.Tensor, low: int, start: int) -> None:
        """Offer rows of which much is above the floor: their reservoirs are not full, or the ceiling is below most."""
        at = torch.arange(len(units), device=units.device)
        tasks, owner, _ = self._tasks_of(units + low, at, at)
        step = max(len(product), 1)
        for begin in range(0, len(tasks), step):
            some = tasks[begin : begin + step]
            part = product[units[owner[begin : begin + step]]]
            if self._limited:
                over = part > self._ceilings[some][:, None]
                self._above.index_add_(0, some, over.sum(dim=1))
                part = part.masked_fill_(over, -torch.inf)
            best = part.topk(min(pool.keep + 1, part.shape[1]), dim=1)
            values, columns = best.values, best.indices
            if values.shape[1] > pool.keep:
                pool.floor[some] = torch.maximum(pool.floor[some], values[:, -1])
                values, columns = values[:, :-1], columns[:, :-1]
            rows = some[:, None].expand_as(values)
            good = (values > -torch.inf) & (values > pool.floor[some][:, None])
            pool.add(rows[good], columns[good] + start, values[good])

    def _lists(self) -> Lists:
        best = {kind: pool.best() for kind, pool in self._pools.items()}
        return Lists(
            self._kinds,
            np.stack([best[kind][0].cpu().numpy() for kind in self._kinds]),
            np.stack([best[kind][1].cpu().numpy() for kind in self._kinds]),
            np.stack([self._pools[kind].floor.cpu().numpy() for kind in self._kinds]),
            self._above.cpu().numpy(),
            self._error,
        )
