"""Which candidates become the negatives of a pair: rules, kinds, random draws, and what fills gaps.

Similarities are computed exactly here, for as few candidates as needed: the front of each list. Whether that was enough
is checked, not assumed: a pair whose negatives might be others, had more candidates been looked at, is not settled,
and is chosen again from longer lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from jasper_store.building.draw import numbers
from jasper_store.building.near_duplicates import are_near_duplicates
from jasper_store.building.problem import Problem
from jasper_store.building.similarity import sort_keys
from jasper_store.building.sweep import Lists
from jasper_store.building.tiers import ADJACENT, IN_CLUSTER, OTHER, RANDOM

__all__ = ["COUNTED", "Chosen", "choose"]

COUNTED: Final = (
    "max_similarity",
    "absolute_margin",
    "relative_margin",
    "ranks",
    "near_duplicates",
    "other_kinds",
    "relaxed",
    "repeated",
)
"""What is counted for each pair: sources that a rule left out, then negatives that filled a gap."""
_RANKS, _NEAR, _OTHER_KINDS, _RELAXED, _REPEATED = range(3, 8)

_ATTEMPTS: Final = 32


@dataclass(slots=True)
class Chosen:
    """Negatives of some pairs.

    Attributes:
        rows: source rows, int64 [T, n_neg]; by kind, and by falling similarity in each; -1 while there is a gap.
        kinds: kind of each, uint8 [T, n_neg].
        similarities: cosine with the question, float32 [T, n_neg].
        counts: what :data:`COUNTED` names, int64 [T, 8].
        settled: whether longer lists could change nothing, bool [T].
    """

    rows: np.ndarray
    kinds: np.ndarray
    similarities: np.ndarray
    counts: np.ndarray
    settled: np.ndarray


class _Candidates:
    """The fronts of the lists of some pairs, with exact similarities, sorted by falling similarity and rising row."""

    def __init__(self, problem: Problem, pairs: np.ndarray, lists: Lists, front: int) -> None:
        keep = lists.values.shape[2]
        front = min(front, keep)
        values, positions = lists.values[:, :, :front], lists.positions[:, :, :front]
        there = positions >= 0
        rows = np.where(there, problem.clusters.rows[positions], 0)
        similarities = np.full(rows.shape, -np.inf, np.float32)
        _, task, _ = there.nonzero()
        similarities[there] = problem.similarities(problem.pair_question[pairs][task], rows[there])
        del values
        kinds = np.broadcast_to(np.array(lists.kinds, np.uint8)[:, None, None], rows.shape)
        flat = [np.moveaxis(part, 0, 1).reshape(len(pairs), -1) for part in (similarities, rows, kinds, there)]
        order = np.argsort(np.where(flat[3], sort_keys(flat[0], flat[1]), np.uint64(2**64 - 1)), axis=1, kind="stable")
        self.similarities, self.rows, self.kinds, self.there = (
            np.take_along_axis(part, order, axis=1) for part in flat
        )
        # No source that is not a candidate is more similar than this; -inf where all are candidates.
        self.bounds = lists.floors.astype(np.float64)
        if front < keep:
            self.bounds = np.maximum(self.bounds, lists.values[:, :, front])
        self.bounds += lists.error


def choose(problem: Problem, pairs: np.ndarray, lists: Lists, front: int) -> Chosen:
    """Choose the negatives of pairs.

    Args:
        problem: what is mined.
        pairs: pairs that the lists are of [T].
        lists: candidates.
        front: how many candidates of each list to look at.
    """
    return _Chooser(problem, pairs, lists, front).run()


class _Chooser:
    def __init__(self, problem: Problem, pairs: np.ndarray, lists: Lists, front: int) -> None:
        self._problem, self._pairs, self._lists = problem, pairs, lists
        settings = problem.settings
        count = len(pairs)
        self._found = found = _Candidates(problem, pairs, lists, front)
        self._ceilings = problem.ceilings(pairs)
        self._settled = np.ones(count, bool)
        self.counts = np.zeros((count, len(COUNTED)), np.int64)
        too_similar = found.there & (found.similarities.astype(np.float64) > self._ceilings[:, None])
        self._valid = found.there & ~too_similar
        if settings.ranks:
            self._apply_ranks(too_similar)
        else:
            # A source that is no candidate, yet may be above the ceiling, would not be counted.
            finite = np.isfinite(self._ceilings)
            self._settled &= ~(finite & (found.bounds > self._ceilings).any(axis=0))
        np.add.at(
            self.counts,
            (np.arange(count), problem.binding_rule(pairs)),
            too_similar.sum(axis=1) + (0 if settings.ranks else lists.above),
        )
        self._taken = np.zeros_like(self._valid)
        n_neg = settings.n_neg
        self._rows = np.full((count, n_neg), -1, np.int64)
        self._kinds = np.zeros((count, n_neg), np.uint8)
        self._similarities = np.zeros((count, n_neg), np.float32)
        self._filled = np.zeros(count, np.int64)

    def _apply_ranks(self, too_similar: np.ndarray) -> None:
        """Leave out ranks outside of the range, and give candidates their kinds."""
        problem, found = self._problem, self._found
        assert problem.settings.ranks is not None
        start, stop = problem.settings.ranks
        rank = np.arange(found.rows.shape[1])
        inside = (rank >= start) & (rank < stop)
        too_similar &= inside
        self._valid &= inside
        self.counts[:, _RANKS] = (found.there & (rank < start)).sum(axis=1)
        # All ranks up to the last must be known: nothing unseen may be as similar as that.
        unseen = np.isfinite(found.bounds[0])
        if stop <= found.rows.shape[1]:
            self._settled &= ~unseen | (found.similarities[:, stop - 1] > found.bounds[0])
        else:
            self._settled &= ~unseen
        if problem.pair_clusters is not None:
            found.kinds = problem.kinds_of(self._pairs, found.rows)

    def run(self) -> Chosen:
        quotas = self._problem.quotas
        short = np.zeros(len(self._pairs), np.int64)
        for kind in (IN_CLUSTER, ADJACENT, OTHER):
            if quotas[kind]:
                wanted = np.full(len(self._pairs), quotas[kind])
                short += self._take(wanted, self._found.kinds == kind, kind)
        short = self._fill(short)
        left = self._draw(short + quotas[RANDOM])
        self.counts[:, _OTHER_KINDS] += np.maximum(short - left, 0)
        self._relax(self._fill(left))
        return Chosen(self._rows, self._kinds, self._similarities, self.counts, self._settled)

    def _fill(self, short: np.ndarray) -> np.ndarray:
        """Fill gaps with the most similar sources of other kinds."""
        if not short.any():
            return short
        left = self._take(short, np.ones_like(self._valid), None)
        self.counts[:, _OTHER_KINDS] += short - left
        return left

    # --- by similarity ----------------------------------------------------------------------------------------

    def _take(self, wanted: np.ndarray, among: np.ndarray, kind: int | None) -> np.ndarray:
        """Take the most similar candidates that no rule leaves out; how many are missing of each pair.

        Near-duplicates are looked for among those that would be taken, until none is found.
        """
        found = self._found
        checked = np.zeros_like(self._valid)
        while True:
            free = self._valid & among & ~self._taken
            picked = free & (np.cumsum(free, axis=1) <= wanted[:, None])
            task, column = (picked & ~checked).nonzero()
            bad = are_near_duplicates(
                self._problem, self._pairs[task], found.rows[task, column], found.similarities[task, column]
            )
            checked |= picked
            if not bad.any():
                break
            self._valid[task[bad], column[bad]] = False
            np.add.at(self.counts[:, _NEAR], task[bad], 1)
        self._certify(picked, wanted, kind)
        self._taken |= picked
        task, column = picked.nonzero()
        self._append(task, found.rows[task, column], found.kinds[task, column], found.similarities[task, column])
        left: np.ndarray = wanted - picked.sum(axis=1)
        return left

    def _certify(self, picked: np.ndarray, wanted: np.ndarray, kind: int | None) -> None:
        """Mark pairs of which a source that is no candidate might have been taken."""
        if self._problem.settings.ranks:
            return  # all ranks are candidates, or the pair is not settled already
        bounds = self._found.bounds
        bound = bounds.max(axis=0) if kind is None else bounds[self._lists.kinds.index(kind)]
        least = np.where(picked, self._found.similarities, np.inf).min(axis=1)
        missing = picked.sum(axis=1) < wanted
        surely = (wanted == 0) | ~np.isfinite(bound) | (~missing & (least > bound))
        self._settled &= surely

    def _append(self, task: np.ndarray, rows: np.ndarray, kinds: np.ndarray, similarities: np.ndarray) -> None:
        """Append negatives, sorted by pair."""
        if not len(task):
            return
        new = np.append(True, task[1:] != task[:-1])
        first = np.flatnonzero(new)
        at = self._filled[task] + np.arange(len(task)) - np.repeat(first, np.diff(np.append(first, len(task))))
        self._rows[task, at] = rows
        self._kinds[task, at] = kinds
        self._similarities[task, at] = similarities
        np.add.at(self._filled, task, 1)

    # --- random -----------------------------------------------------------------------------------------------

    def _draw(self, wanted: np.ndarray) -> np.ndarray:
        """Draw random sources of far clusters that no rule leaves out; how many are missing of each pair."""
        left: np.ndarray = wanted.copy()
        for attempt in range(_ATTEMPTS + int(wanted.max(initial=0))):
            # As many attempts as the pair's own count allows: other pairs of the block change nothing.
            task = np.flatnonzero((left > 0) & (attempt < _ATTEMPTS + wanted))
            if not len(task):
                break
            rows = self._far(task, attempt)
            good = self._is_new(task, rows) & ~self._in_first_ranks(task, rows)
            similarities = np.zeros(len(task), np.float32)
            some = np.flatnonzero(good)
            pairs = self._pairs[task]
            similarities[some] = self._problem.similarities(self._problem.pair_question[pairs[some]], rows[some])
            good &= similarities.astype(np.float64) <= self._ceilings[task]
            some = np.flatnonzero(good)
            near = are_near_duplicates(self._problem, pairs[some], rows[some], similarities[some])
            np.add.at(self.counts[:, _NEAR], task[some[near]], 1)
            good[some[near]] = False
            self._append_random(task[good], rows[good], similarities[good])
            left[task[good]] -= 1
        return left

    def _far(self, task: np.ndarray, attempt: int) -> np.ndarray:
        pairs = self._pairs[task]
        drawn = numbers(self._problem.settings.seed, pairs, attempt)
        clusters = self._problem.clusters
        return np.asarray(clusters.rows[clusters.far(self._problem.cluster_of(pairs), drawn)])

    def _is_new(self, task: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Whether a source is no negative of the pair yet, no positive, and has not the bytes of one."""
        taken = (self._rows[task] == rows[:, None]).any(axis=1)
        found: np.ndarray = ~taken & ~self._problem.is_excluded(self._pairs[task], rows)
        return found

    def _in_first_ranks(self, task: np.ndarray, rows: np.ndarray) -> np.ndarray:
        ranks = self._problem.settings.ranks
        if not ranks or not ranks[0]:
            return np.zeros(len(task), bool)
        first = slice(ranks[0])
        same = self._found.rows[task, first] == rows[:, None]
        return np.asarray((same & self._found.there[task, first]).any(axis=1))

    def _append_random(self, task: np.ndarray, rows: np.ndarray, similarities: np.ndarray) -> None:
        self._append(task, rows, np.full(len(task), RANDOM, np.uint8), similarities)
        # The list may hold it, too, and must not give it again.
        match = self._found.rows[task] == rows[:, None]
        self._taken[task] |= match & self._found.there[task]

    # --- the last resort --------------------------------------------------------------------------------------

    def _relax(self, short: np.ndarray) -> None:
        """Fill gaps that the rules leave: by random sources that are no positives, else by negatives once more."""
        start = 1 << 20  # attempts that _draw never makes
        for attempt in range(start, start + _ATTEMPTS):
            task = np.flatnonzero(short > 0)
            if not len(task):
                return
            rows = self._far(task, attempt)
            good = self._is_new(task, rows) & ~self._nearly_positive(task, rows)
            self._append_relaxed(task[good], rows[good])
            short[task[good]] -= 1
        for task in np.flatnonzero(short > 0).tolist():
            left = self._search(task, int(short[task]), near=False)
            self._repeat(task, self._search(task, left, near=True))

    def _nearly_positive(self, task: np.ndarray, rows: np.ndarray) -> np.ndarray:
        pairs = self._pairs[task]
        similarities = self._problem.similarities(self._problem.pair_question[pairs], rows)
        return are_near_duplicates(self._problem, pairs, rows, similarities)

    def _append_relaxed(self, task: np.ndarray, rows: np.ndarray) -> None:
        questions = self._problem.pair_question[self._pairs[task]]
        self._append_random(task, rows, self._problem.similarities(questions, rows))
        np.add.at(self.counts[:, _RELAXED], task, 1)

    def _search(self, task: int, short: int, *, near: bool) -> int:
        """Look through all sources from a random one on, near-duplicates of positives or others; how many are missing."""
        problem = self._problem
        total = problem.sources.n_rows
        begin = int(numbers(problem.settings.seed, self._pairs[[task]], 1 << 21)[0] % np.uint64(total))
        for low in range(0, total, 1 << 16):
            if not short:
                return 0
            rows = (begin + np.arange(low, min(low + (1 << 16), total))) % total
            tasks = np.full(len(rows), task)
            rows = rows[self._is_new(tasks, rows) & (self._nearly_positive(tasks, rows) == near)][:short]
            self._append_relaxed(np.full(len(rows), task), rows)
            short -= len(rows)
        return short

    def _repeat(self, task: int, short: int) -> None:
        """Fill the last gaps of a pair with its negatives once more."""
        there = int(self._filled[task])
        for number in range(short):
            at = number % there
            self._append(
                np.array([task]), self._rows[task, [at]], self._kinds[task, [at]], self._similarities[task, [at]]
            )
        self.counts[task, _REPEATED] += short
