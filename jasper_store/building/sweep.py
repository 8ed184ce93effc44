"""The most similar sources of each pair, from one pass over all products of questions and sources.

::

    a block of tasks (pairs, sorted by cluster and question)
      its units: the distinct questions of each cluster, at length 1
      for each block of sources, in the order of clusters:
        for each block of units:
          product [units, sources]                one matrix product, of floats or of bytes
          positives and their duplicates          left out
          runs of the own and adjacent clusters   offered to their reservoirs, then left out
          what is left                            offered to the reservoir of other clusters

A product of bytes bounds that of floats from above, which is then made where the bound reaches a reservoir's floor: so the
lists hold products of floats either way. Where the bounds are too wide to spare much, the rest is made of floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from jasper_store.building import quantized
from jasper_store.building.problem import Problem
from jasper_store.building.quantized import Quantized, quantize
from jasper_store.building.similarity import product_error
from jasper_store.building.tiers import ADJACENT, IN_CLUSTER, OTHER
from jasper_store.building.topk import Reservoir, above
from jasper_store.native.topk import offer

__all__ = ["Block", "BlockSizes", "Lists", "Sweep", "sweep"]

_TOO_MANY, _TOO_MANY_AT_FIRST = 0.07, 0.3
"""Share of the products that bounds do not spare, from which on all are made of floats; while reservoirs fill, more are."""

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
class Block:
    """Products of some units and sources.

    Attributes:
        product: [units, sources]: float32, or int32 of bytes.
        low: the first unit.
        start: position of the first source.
        sides: rows of the units and of the sources, if the products are of bytes.
    """

    product: torch.Tensor
    low: int
    start: int
    sides: tuple[Quantized, Quantized] | None

    @property
    def left_out(self) -> float:
        """What stands for a source that is left out."""
        return -torch.inf if self.sides is None else quantized.LEFT_OUT

    def part(self, units: slice, sources: slice) -> Block:
        """Some of the units and sources."""
        sides = self.sides and (self.sides[0].part(units), self.sides[1].part(sources))
        return Block(self.product[units, sources], self.low + units.start, self.start + sources.start, sides)


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
        self._compiled = problem.compiled
        self._as_bytes: Quantized | None = None
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
        self._as_bytes = quantize(units) if problem.as_bytes else None
        width = min(sizes.sources, total)
        out = torch.empty(min(sizes.units, len(units)) * width, device=self._device)
        for start in range(0, total, width):
            made = looked = 0
            for block in self._products(units, start, min(start + width, total), out):
                self._exclude(block)
                self._offer_runs(block)
                made += self._offer(OTHER, block)
                looked += block.product.numel()
                if start == 0 and made > _TOO_MANY_AT_FIRST * looked:
                    self._as_bytes = None
                if advance is not None:
                    advance(block.product.numel())
            if start > 0 and made > _TOO_MANY * looked:
                self._as_bytes = None
        return self._lists()

    def _products(self, units: torch.Tensor, start: int, stop: int, out: torch.Tensor) -> Iterator[Block]:
        """Products of all units and some sources, one block after the other in the same memory."""
        right = None if self._as_bytes is None else self._problem.source_bytes(start, stop)
        sources = self._problem.unit_sources(start, stop) if right is None else right.rows
        for low in range(0, len(units), self._sizes.units):
            high = min(low + self._sizes.units, len(units))
            product = out[: (high - low) * len(sources)].view(high - low, len(sources))
            if self._as_bytes is None or right is None:
                yield Block(torch.mm(units[low:high], sources.T, out=product), low, start, None)
            else:
                left = self._as_bytes.part(slice(low, high))
                product = product.view(torch.int32)
                quantized.product(left, right, product)
                yield Block(product, low, start, (left, right))

    def _exclude(self, block: Block) -> None:
        product, low, start = block.product, block.low, block.start
        first, last = np.searchsorted(self._excluded_positions, [start, start + product.shape[1]])
        units = self._excluded_units[first:last]
        inside = (units >= low) & (units < low + len(product))
        rows, columns = units[inside] - low, self._excluded_positions[first:last][inside] - start
        if product.device.type == "cpu":  # numpy needs a tenth of the time, which counts
            product.numpy()[rows, columns] = block.left_out
        else:
            product[torch.from_numpy(rows).to(product.device), torch.from_numpy(columns).to(product.device)] = (
                block.left_out
            )
        if len(self._large_units):
            inside = (self._large_units >= low) & (self._large_units < low + len(product))
            self._exclude_large(block, self._large_units[inside] - low, self._large_groups[inside])

    def _exclude_large(self, block: Block, units: np.ndarray, groups: np.ndarray) -> None:
        product, start = block.product, block.start
        known = self._problem.groups
        for group in np.unique(groups):
            members = known.members[known.starts[group] : known.starts[group + 1]]
            first, last = np.searchsorted(members, [start, start + product.shape[1]])
            if first < last:
                rows = torch.from_numpy(units[groups == group]).to(product.device)
                columns = torch.from_numpy(members[first:last] - start).to(product.device)
                product[rows[:, None], columns[None, :]] = block.left_out

    def _offer_runs(self, block: Block) -> None:
        """Offer the runs of the own and the adjacent clusters, and leave them out of the product."""
        if len(self._kinds) == 1:
            return
        height, width = block.product.shape
        clusters = self._unit_clusters[block.low : block.low + height]
        edges = np.flatnonzero(np.append(True, clusters[1:] != clusters[:-1]))
        for first, last in zip(edges.tolist(), [*edges[1:].tolist(), height], strict=True):
            for kind, begin, end in self._problem.clusters.runs(int(clusters[first])):
                inside, outside = max(begin - block.start, 0), min(end - block.start, width)
                if inside < outside:
                    part = block.part(slice(first, last), slice(inside, outside))
                    self._offer(kind, part)
                    part.product.fill_(block.left_out)

    def _offer(self, kind: int, block: Block) -> int:
        """Offer products to the reservoirs of a kind; how many were made of floats because a bound did not spare them."""
        pool, product, low, start = self._pools[kind], block.product, block.low, block.start
        if self._compiled:
            first_task = self._first_task[low : low + len(product) + 1]
            return offer(pool, product, first_task, start, self._ceilings, self._above, block.sides)
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
        return 0

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
