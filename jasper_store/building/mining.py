"""Hard negatives: for each pair of a question and a source, other sources that are similar and no answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from jasper_store.building.approximate import ApproximateIndex, approximate_lists, measured_recall
from jasper_store.building.checkpoints import Checkpoints
from jasper_store.building.choose import COUNTED, Chosen, choose
from jasper_store.building.inputs import MiningInputs, MiningSettings
from jasper_store.building.memory_plan import plan_memory
from jasper_store.building.problem import Problem
from jasper_store.building.sweep import sweep
from jasper_store.building.tiers import KINDS, tier_numbers

__all__ = ["Mined", "MiningCounts", "MiningInputs", "MiningSettings", "key_of", "mine", "mine_problem"]

_VERSION = 1
"""Changes when other negatives come of the same inputs and settings."""

_SPARE = 8
_GROWTH = 4
_MANY = 0.25
"""Share of the pairs of a block whose lists were too short, above which those of later blocks begin longer."""

_FRONT_SPARE = 3


@dataclass(frozen=True, slots=True)
class MiningCounts:
    """What was left out, and what was done about gaps, over all pairs.

    A source that several rules leave out is counted once, by the first of them: positives, duplicates, ranks, the ceiling
    (by the rule that sets the lowest one for its pair), near-duplicates.

    Attributes:
        candidates: sources for each pair, added up.
        positives: positives of the pair's question, its own among them.
        duplicates: sources with the bytes of such a positive.
        ranks: sources of a rank before the first that may be chosen.
        max_similarity: sources above ``max_similarity``.
        absolute_margin: sources too similar by the absolute margin.
        relative_margin: sources too similar by the relative margin.
        near_duplicates: sources that would have been chosen, and nearly are a positive of the question.
        other_kinds: negatives of another kind than wanted, because that kind had too few.
        relaxed: random negatives that the rules of similarity leave out, because too few others were there.
        repeated: negatives that a pair has more than once, because there are no others.
    """

    candidates: int = 0
    positives: int = 0
    duplicates: int = 0
    ranks: int = 0
    max_similarity: int = 0
    absolute_margin: int = 0
    relative_margin: int = 0
    near_duplicates: int = 0
    other_kinds: int = 0
    relaxed: int = 0
    repeated: int = 0

    def to_dict(self) -> dict[str, int]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Mined:
    """What was mined.

    Attributes:
        negatives: source rows, int64 [P, n_neg]: by kind, and by falling similarity in each.
        tiers: uint8 [P, n_neg], as ``tier_numbers`` says.
        similarities: cosine of question and negative, float32 [P, n_neg].
        positive_similarities: cosine of question and positive, float32 [P].
        counts: what was left out.
        kinds: how many negatives are of each kind.
        similarity_of_kinds: mean similarity of the negatives of each kind; ``None`` for a kind that there is not.
        products: how many cosines were looked at.
        seconds: time taken.
        recall: share of the most similar sources that an approximate index found; ``None`` for the exact method.
    """

    negatives: np.ndarray
    tiers: np.ndarray
    similarities: np.ndarray
    positive_similarities: np.ndarray
    counts: MiningCounts
    kinds: dict[str, int]
    similarity_of_kinds: dict[str, float | None]
    products: int
    seconds: float
    recall: float | None = None


def mine(
    inputs: MiningInputs,
    settings: MiningSettings,
    *,
    memory_limit: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    workdir: Path | None = None,
) -> Mined:
    """Mine hard negatives for all pairs.

    The result is a pure function of inputs and settings: memory, threads, device, and interruptions change no bit of it.

    Args:
        inputs: embeddings and pairs.
        settings: how negatives are chosen.
        memory_limit: bytes that may be held, besides the inputs.
        device: where matrix products are made: ``"cpu"`` or a CUDA device.
        progress: called with products done and products in all.
        workdir: directory that finished blocks are kept in; a run that was killed continues from these. The caller
            removes it once the result is safe elsewhere.

    Raises:
        IntegrityError: inputs that contradict each other, with NaN, zero rows, or too few sources.
        InsufficientMemoryError: the smallest blocks do not fit.
        ConversionError: ``workdir`` cannot be written.
    """
    problem = Problem(inputs, settings, torch.device(device))
    return mine_problem(problem, memory_limit=memory_limit, progress=progress, workdir=workdir)


def mine_problem(
    problem: Problem,
    *,
    memory_limit: int,
    progress: Callable[[int, int], None] | None = None,
    workdir: Path | None = None,
) -> Mined:
    """Mine what was read and checked already; as :func:`mine`."""
    began = time.perf_counter()
    run = _Run(problem, memory_limit, progress)
    result = run.all(None if workdir is None else Checkpoints(workdir, key_of(problem)))
    totals = dict(zip(COUNTED, result.counts.tolist(), strict=True))
    kinds = np.bincount(result.kinds.ravel(), minlength=len(KINDS)).tolist()
    return Mined(
        result.rows,
        tier_numbers(problem.settings.tier_numbers)[result.kinds],
        result.similarities,
        problem.positive_similarities,
        MiningCounts(**_excluded(problem), **totals),
        dict(zip(KINDS, kinds, strict=True)),
        {name: _mean(result.similarities[result.kinds == kind]) for kind, name in enumerate(KINDS)},
        run.done,
        time.perf_counter() - began,
        run.recall,
    )


def key_of(problem: Problem) -> str:
    """Hash of everything that decides what is mined: contents, pairs, clusters and settings."""
    digest = xxhash.xxh3_128(json.dumps([_VERSION, problem.settings.to_dict()]).encode())
    digest.update(f"{problem.questions.digest} {problem.sources.digest}".encode())
    for array in (
        problem.pair_question,
        problem.pair_source,
        problem.cluster_of(np.arange(problem.n_pairs)),
        problem.clusters.rows,
        problem.clusters.starts,
        problem.clusters.adjacent,
    ):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _mean(similarities: np.ndarray) -> float | None:
    return float(similarities.mean(dtype=np.float64)) if len(similarities) else None


def _excluded(problem: Problem) -> dict[str, int]:
    """How many candidates there are, and how many of them are positives or duplicates of these."""
    questions = np.arange(problem.questions.n_rows)
    pairs = np.bincount(problem.pair_question, minlength=len(questions))
    unit, group = problem.positive_groups(questions)
    same_bytes = np.bincount(unit, problem.groups.sizes[group], minlength=len(questions)).astype(np.int64)
    distinct = np.unique(np.stack([problem.pair_question, problem.pair_source], axis=1), axis=0)[:, 0]
    positives = np.bincount(distinct, minlength=len(questions))
    return {
        "candidates": problem.n_pairs * problem.sources.n_rows,
        "positives": int((pairs * positives).sum()),
        "duplicates": int((pairs * (same_bytes - positives)).sum()),
    }


@dataclass(slots=True)
class _Result:
    rows: np.ndarray
    kinds: np.ndarray
    similarities: np.ndarray
    counts: np.ndarray


class _Run:
    """Blocks of tasks, one after the other."""

    def __init__(self, problem: Problem, memory_limit: int, progress: Callable[[int, int], None] | None) -> None:
        self._problem = problem
        self._limit = memory_limit
        self._progress = progress
        settings = problem.settings
        self._keep = settings.ranks[1] + _SPARE if settings.ranks else settings.n_neg + _SPARE
        self._index: ApproximateIndex | None = None
        if settings.method == "faiss":
            self._index = ApproximateIndex(problem, memory_limit)
            self._limit -= self._index.nbytes
        self._plan = plan_memory(problem, self._keep, self._limit)
        if self._plan.hold_sources:
            problem.hold_sources()
            self._limit -= problem.source_nbytes * problem.sources.n_rows
        self.recall = None
        if self._index is not None:
            self.recall = measured_recall(problem, self._index, self._keep)
        self.done = 0
        self._total = len(_units(problem)) * problem.sources.n_rows

    def all(self, checkpoints: Checkpoints | None) -> _Result:
        """Results of all pairs, in the order of the pairs."""
        problem = self._problem
        shape = (problem.n_pairs, problem.settings.n_neg)
        result = _Result(
            np.empty(shape, np.int64), np.empty(shape, np.uint8), np.empty(shape, np.float32), np.zeros(8, np.int64)
        )
        start = 0
        for low, high, saved in checkpoints.saved() if checkpoints is not None else ():
            self._blocks(start, low, result, checkpoints)
            self._put(low, high, saved, result)
            start = high
        self._blocks(start, problem.n_pairs, result, checkpoints)
        return result

    def _blocks(self, start: int, stop: int, result: _Result, checkpoints: Checkpoints | None) -> None:
        high = start
        while high < stop:
            low, high = high, min(high + self._plan.tasks, stop)
            chosen = self._chosen(self._problem.order[low:high])
            found = {
                "rows": chosen.rows,
                "kinds": chosen.kinds,
                "similarities": chosen.similarities,
                "counts": chosen.counts.sum(axis=0),
            }
            if checkpoints is not None:
                checkpoints.save(low, high, **found)
            self._put(low, high, found, result)

    def _put(self, low: int, high: int, found: dict[str, np.ndarray], result: _Result) -> None:
        pairs = self._problem.order[low:high]
        result.rows[pairs] = found["rows"]
        result.kinds[pairs] = found["kinds"]
        result.similarities[pairs] = found["similarities"]
        result.counts += found["counts"]

    def _chosen(self, pairs: np.ndarray) -> Chosen:
        """Choose for pairs of one block; exactly where an index does not find enough that the rules allow."""
        if self._index is None:
            return self._settled(pairs, self._keep)
        lists = approximate_lists(self._problem, self._index, pairs, self._keep, self._plan.sizes, self._advance)
        chosen = choose(self._problem, pairs, lists, self._keep)
        self._again(chosen, lambda some: self._settled(pairs[some], self._keep))
        return chosen

    def _settled(self, pairs: np.ndarray, keep: int) -> Chosen:
        """Choose for pairs of one block, from ever longer lists until nothing can change."""
        chosen = self._chosen_of_lists(pairs, keep)
        begin_longer = self._index is None and keep == self._keep and chosen.settled.mean() < 1 - _MANY
        self._again(chosen, lambda some: self._settled_in_parts(pairs[some], keep * _GROWTH))
        if begin_longer:
            self._keep = keep * _GROWTH
            self._plan = plan_memory(self._problem, self._keep, self._limit)
        return chosen

    def _chosen_of_lists(self, pairs: np.ndarray, keep: int) -> Chosen:
        """Choose from lists of one length: from their fronts, and from all of them where that was not enough."""
        problem = self._problem
        lists = sweep(problem, pairs, keep, self._plan.sizes, self._advance)
        front = keep if problem.settings.ranks else max(problem.quotas[:3]) + _FRONT_SPARE
        chosen = choose(problem, pairs, lists, front)
        if front < keep:
            self._again(chosen, lambda some: choose(problem, pairs[some], lists.of(some), keep))
        return chosen

    def _again(self, chosen: Chosen, better: Callable[[np.ndarray], Chosen]) -> None:
        some = np.flatnonzero(~chosen.settled)
        if len(some):
            found = better(some)
            for field in fields(Chosen):
                getattr(chosen, field.name)[some] = getattr(found, field.name)

    def _settled_in_parts(self, pairs: np.ndarray, keep: int) -> Chosen:
        step = plan_memory(self._problem, keep, self._limit).tasks
        parts = [self._settled(pairs[at : at + step], keep) for at in range(0, len(pairs), step)]
        return Chosen(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Chosen)))

    def _advance(self, products: int) -> None:
        self.done += products
        if self._progress is not None:
            self._progress(min(self.done, self._total), self._total)


def _units(problem: Problem) -> np.ndarray[Any, Any]:
    """Distinct questions of each cluster."""
    pairs = np.arange(problem.n_pairs)
    return np.unique(np.stack([problem.cluster_of(pairs), problem.pair_question], axis=1), axis=0)
