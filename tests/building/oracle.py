"""Mining by numpy alone, pair by pair, from the rules as docs/mining.md states them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from jasper_store.building.draw import numbers
from jasper_store.building.mining import MiningInputs, MiningSettings

__all__ = ["Rows", "Wanted", "inputs_of", "oracle"]

N_ATTEMPTS = 32


class Rows:
    """An array as the miner reads one."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = torch.from_numpy(np.ascontiguousarray(values))
        self.shape = tuple(self.values.shape)

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        return self.values[rows]


def inputs_of(questions: np.ndarray, sources: np.ndarray, pairs: np.ndarray, **more: Any) -> MiningInputs:
    return MiningInputs(Rows(questions), Rows(sources), pairs, **more)


@dataclass
class Wanted:
    """What mining should find: for each pair its negatives, their kinds and cosines, and counts over all pairs."""

    rows: np.ndarray
    kinds: np.ndarray
    similarities: np.ndarray
    counts: dict[str, int]


def cosine_table(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float32 [n, m]; of small whole numbers every product and sum is exact, so that no order of adding matters."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    norms = np.sqrt((left**2).sum(axis=1))[:, None] * np.sqrt((right**2).sum(axis=1))[None, :]
    found: np.ndarray = ((left @ right.T) / norms).astype(np.float32)
    return found


def quotas_of(n_neg: int, tiers: tuple[float, ...], clustered: bool) -> list[int]:
    parts = list(tiers) if clustered else [0, 0, sum(tiers[:3]), tiers[3]]
    exact = [n_neg * part / sum(parts) for part in parts]
    found = [int(each) for each in exact]
    for kind in sorted(range(4), key=lambda kind: (found[kind] - exact[kind], kind))[: n_neg - sum(found)]:
        found[kind] += 1
    return found


def oracle(
    questions: np.ndarray,
    sources: np.ndarray,
    pairs: np.ndarray,
    settings: MiningSettings,
    pair_clusters: np.ndarray | None = None,
    source_clusters: np.ndarray | None = None,
    centroids: np.ndarray | None = None,
) -> Wanted:
    similarity, among = cosine_table(questions, sources), cosine_table(sources, sources)
    equal = (sources[:, None, :] == sources[None, :, :]).all(axis=2)
    near = np.empty((0, 3), int)
    positions = np.arange(len(sources))
    if centroids is not None:
        assert source_clusters is not None
        table = cosine_table(centroids, centroids)
        np.fill_diagonal(table, -np.inf)
        near = np.argsort(-table, axis=1, kind="stable")[:, : min(3, len(centroids) - 1)]
        positions = np.argsort(source_clusters, kind="stable")
    names = ("max_similarity", "absolute_margin", "relative_margin", "ranks", "near_duplicates", "other_kinds")
    counts = dict.fromkeys(("candidates", "positives", "duplicates", *names, "relaxed", "repeated"), 0)
    found = []
    for pair, (question, source) in enumerate(pairs):
        positives = np.unique(pairs[pairs[:, 0] == question, 1])
        one = _Pair(settings, counts, pair, similarity[question])
        one.excluded = equal[positives].any(axis=0)
        counts["candidates"] += len(sources)
        counts["positives"] += len(positives)
        counts["duplicates"] += int(one.excluded.sum()) - len(positives)
        if settings.duplicate_similarity is not None:
            one.near = among[positives].max(axis=0).astype(np.float64) >= settings.duplicate_similarity
        else:
            one.near = np.zeros(len(sources), bool)
        one.kind = np.full(len(sources), 2)
        one.far = positions
        if pair_clusters is not None:
            assert source_clusters is not None
            own = pair_clusters[pair]
            one.kind[np.isin(source_clusters, near[own])] = 1
            one.kind[source_clusters == own] = 0
            one.far = positions[one.kind[positions] == 2]
            if not len(one.far):
                one.far = positions
        one.choose(
            quotas_of(settings.n_neg, settings.tiers, pair_clusters is not None), float(similarity[question, source])
        )
        found.append(one.chosen)
    rows, kinds = (np.array([[each[at] for each in chosen] for chosen in found]) for at in (0, 1))
    values = np.array([[similarity[pairs[pair, 0], each[0]] for each in chosen] for pair, chosen in enumerate(found)])
    return Wanted(rows, kinds, values, counts)


class _Pair:
    """One pair, chosen for in a plain loop."""

    excluded: np.ndarray
    near: np.ndarray
    kind: np.ndarray
    far: np.ndarray

    def __init__(self, settings: MiningSettings, counts: dict[str, int], pair: int, similarity: np.ndarray) -> None:
        self.settings, self.counts, self.pair, self.similarity = settings, counts, pair, similarity
        self.chosen: list[tuple[int, int]] = []
        self.refused: set[int] = set()

    def choose(self, quotas: list[int], positive: float) -> None:
        settings = self.settings
        rules = {
            "max_similarity": settings.max_similarity,
            "absolute_margin": None if settings.absolute_margin is None else positive - settings.absolute_margin,
            "relative_margin": None
            if settings.relative_margin is None
            else positive - settings.relative_margin * abs(positive),
        }
        limits = {name: np.inf if value is None else value for name, value in rules.items()}
        rule = min(limits, key=lambda name: limits[name])
        self.ceiling = limits[rule]
        ranked = [row for row in np.argsort(-self.similarity, kind="stable").tolist() if not self.excluded[row]]
        self.first: set[int] = set()
        if settings.ranks:
            self.first = set(ranked[: settings.ranks[0]])
            self.counts["ranks"] += len(self.first)
            ranked = ranked[settings.ranks[0] : settings.ranks[1]]
        self.counts[rule] += sum(self.above(row) for row in ranked)
        self.ranked = [row for row in ranked if not self.above(row)]
        short = sum(quotas[kind] - self.take(quotas[kind], {kind}) for kind in range(3))
        filled = self.take(short, {0, 1, 2})
        self.counts["other_kinds"] += filled
        short -= filled
        left = self.draw(short + quotas[3])
        self.counts["other_kinds"] += max(short - left, 0)
        filled = self.take(left, {0, 1, 2})
        self.counts["other_kinds"] += filled
        self.relax(left - filled)

    def above(self, row: int) -> bool:
        return float(self.similarity[row]) > self.ceiling

    def has(self, row: int) -> bool:
        return any(row == chosen for chosen, _ in self.chosen)

    def take(self, wanted: int, kinds: set[int]) -> int:
        taken = 0
        for row in self.ranked:
            if taken == wanted:
                break
            if self.kind[row] not in kinds or row in self.refused or self.has(row):
                continue
            if self.near[row]:
                self.refused.add(row)
                self.counts["near_duplicates"] += 1
                continue
            self.chosen.append((row, int(self.kind[row])))
            taken += 1
        return taken

    def drawn(self, attempt: int) -> int:
        number = int(numbers(self.settings.seed, np.array([self.pair]), attempt)[0])
        return int(self.far[number % len(self.far)])

    def draw(self, wanted: int) -> int:
        left = wanted
        for attempt in range(N_ATTEMPTS + wanted):
            if not left:
                break
            row = self.drawn(attempt)
            if self.has(row) or self.excluded[row] or row in self.first or self.above(row):
                continue
            if self.near[row]:
                self.counts["near_duplicates"] += 1
                continue
            self.chosen.append((row, 3))
            left -= 1
        return left

    def relax(self, short: int) -> None:
        """Random sources that the rules of similarity leave out, then near-duplicates, then negatives once more."""
        begin = int(numbers(self.settings.seed, np.array([self.pair]), 1 << 21)[0] % np.uint64(len(self.similarity)))
        after = [(begin + step) % len(self.similarity) for step in range(len(self.similarity))]
        tries = [self.drawn((1 << 20) + attempt) for attempt in range(N_ATTEMPTS)]
        order = [(row, False) for row in (*tries, *after)] + [(row, True) for row in after]
        for row, near in order:
            if short and not self.has(row) and not self.excluded[row] and bool(self.near[row]) == near:
                self.chosen.append((row, 3))
                self.counts["relaxed"] += 1
                short -= 1
        there = len(self.chosen)
        self.counts["repeated"] += short
        self.chosen += [self.chosen[number % there] for number in range(short)]
