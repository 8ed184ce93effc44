"""What mining is given: embeddings, pairs, clusters, and settings; checked before anything is computed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from jasper_store.building.tiers import PROPORTIONS, TierNumbers, quotas, tier_numbers
from jasper_store.building.vectors import RowSource, require_matrix
from jasper_store.errors import IncompatibleOptionsError, IntegrityError

__all__ = ["Method", "MiningInputs", "MiningSettings", "check_inputs"]

Method = Literal["exact", "faiss"]

_MOST_CLUSTERS = 1 << 24

NEAR_DUPLICATE = 0.999
"""Cosine from which a source counts as a duplicate of a positive. Rows that differ by rounding to half precision alone have
more than 0.9999, and unrelated texts never come near it: in the bundled WordNet sample docs/mining.md shows what lies above."""


@dataclass(frozen=True, slots=True)
class MiningInputs:
    """Embeddings of questions and sources, and which belong together.

    Attributes:
        questions: rows of floating numbers [Q, D]; anything with ``shape`` and ``take(int64 rows)``, as a stored tensor.
        sources: [S, D].
        pair_index: integers [P, 2]: row of the question, row of the source.
        pair_clusters: cluster of each pair, integers [P]; ``None`` for no clusters.
        source_clusters: cluster of each source, integers [S], -1 where it is not known; ``None`` derives them: the cluster
            of the first pair that has the source, else the nearest centroid.
        centroids: float32 [C, D]; ``None`` takes the mean of each cluster's sources.
    """

    questions: RowSource
    sources: RowSource
    pair_index: np.ndarray
    pair_clusters: np.ndarray | None = None
    source_clusters: np.ndarray | None = None
    centroids: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class MiningSettings:
    """How negatives are chosen.

    Attributes:
        n_neg: negatives per pair.
        tiers: parts of the four kinds: in cluster, adjacent clusters, most similar of other clusters, random of far ones.
        relative_margin: a source is left out if its cosine is above
            ``positive - relative_margin * abs(positive)``.
        absolute_margin: a source is left out if its cosine is above the positive's less this.
        max_similarity: a source is left out if its cosine is above this.
        duplicate_similarity: a source is left out if its cosine with a positive of the question is at least this; ``None``
            leaves out only those with the same bytes.
        ranks: first and last (exclusive) rank that may be chosen, counted from 0 over all sources but the question's
            positives and their exact duplicates; random negatives are never of a rank before the first.
        method: ``"exact"``: every product of a question and a source is looked at; ``"faiss"``: an index finds most of the
            similar sources of other clusters.
        tier_numbers: what is written for the kinds: ``"jasper"`` (random 0, in cluster and adjacent 1, most similar 2) or
            ``"builder"`` (1 to 4).
        seed: seed of random negatives.

    Raises:
        IncompatibleOptionsError: a value out of its range.
    """

    n_neg: int = 5
    tiers: tuple[float, float, float, float] = PROPORTIONS
    relative_margin: float | None = 0.05
    absolute_margin: float | None = None
    max_similarity: float | None = None
    duplicate_similarity: float | None = NEAR_DUPLICATE
    ranks: tuple[int, int] | None = None
    method: Method = "exact"
    tier_numbers: TierNumbers = "jasper"
    seed: int = 42

    def __post_init__(self) -> None:
        _check_whole("n_neg", self.n_neg, at_least=1)
        _check_whole("seed", self.seed, at_least=0)
        quotas(self.n_neg, self.tiers, clustered=True)
        tier_numbers(self.tier_numbers)
        for name, low, high in (
            ("relative_margin", 0.0, 1.0),
            ("absolute_margin", 0.0, 2.0),
            ("max_similarity", -1.0, 1.0),
            ("duplicate_similarity", 0.0, 1.0),
        ):
            _check_number(name, getattr(self, name), low, high)
        if self.method not in get_args(Method):
            msg = f"method={self.method!r}: expected one of {', '.join(get_args(Method))}"
            raise IncompatibleOptionsError(msg)
        self._check_ranks()

    def _check_ranks(self) -> None:
        if self.ranks is None:
            return
        given: Any = self.ranks
        if not (isinstance(given, (tuple, list)) and len(given) == 2 and all(_is_whole(each) for each in given)):
            msg = f"ranks={given!r}: expected two whole numbers, the first rank and the one behind the last: (10, 100)"
            raise IncompatibleOptionsError(msg)
        start, stop = given
        if not 0 <= start < stop:
            msg = f"ranks={given!r}: expected 0 <= first < last, for example (10, 100)"
            raise IncompatibleOptionsError(msg)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def _is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_whole(name: str, value: Any, *, at_least: int) -> None:
    if not _is_whole(value) or value < at_least:
        msg = f"{name}={value!r}: expected a whole number of at least {at_least}"
        raise IncompatibleOptionsError(msg)


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        msg = f"{name}={value!r}: expected a number from {low:g} to {high:g}, or None to leave the rule out"
        raise IncompatibleOptionsError(msg)
    if not low <= value <= high:
        msg = f"{name}={value!r}: expected a number from {low:g} to {high:g}, or None to leave the rule out"
        raise IncompatibleOptionsError(msg)


def check_inputs(inputs: MiningInputs, settings: MiningSettings) -> None:
    """Check shapes, dtypes and row numbers.

    Raises:
        IntegrityError: what contradicts what.
    """
    require_matrix(inputs.questions, "questions")
    require_matrix(inputs.sources, "sources")
    questions, sources = tuple(inputs.questions.shape), tuple(inputs.sources.shape)
    if questions[1] != sources[1]:
        msg = (
            f"expected questions and sources of one dimension, found {list(questions)} and {list(sources)}; embed both with "
            "the same model"
        )
        raise IntegrityError(msg)
    _check_rows(inputs.pair_index, questions[0], sources[0])
    if not len(inputs.pair_index):
        raise IntegrityError("expected at least one pair of a question and a source, found none; pass pairs")
    if sources[0] <= settings.n_neg:
        msg = (
            f"expected more sources than the n_neg={settings.n_neg} negatives of a pair, since its positive is none of them; "
            f"found {sources[0]}; mine fewer negatives or add sources"
        )
        raise IntegrityError(msg)
    count = None if inputs.centroids is None else len(inputs.centroids)
    if inputs.centroids is not None and (inputs.centroids.ndim != 2 or inputs.centroids.shape[1] != sources[1]):
        msg = f"centroids: expected shape [C, {sources[1]}], found {list(inputs.centroids.shape)}; compute them anew"
        raise IntegrityError(msg)
    if inputs.centroids is not None and not np.isfinite(inputs.centroids).all():
        raise IntegrityError("centroids: expected finite numbers, found NaN or Inf; compute them anew")
    _check_clusters("pair_clusters", inputs.pair_clusters, len(inputs.pair_index), 0, count)
    _check_clusters("source_clusters", inputs.source_clusters, sources[0], -1, count)
    if inputs.pair_clusters is None and inputs.source_clusters is not None:
        raise IntegrityError("source_clusters: expected pair_clusters with them, found none; pass both or neither")


def _check_rows(pairs: np.ndarray, n_questions: int, n_sources: int) -> None:
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
        msg = f"pair_index: expected integers of shape [P, 2], found {pairs.dtype} {list(pairs.shape)}"
        raise IntegrityError(msg)
    for column, (what, count) in enumerate((("question", n_questions), ("source", n_sources))):
        bad = np.flatnonzero((pairs[:, column] < 0) | (pairs[:, column] >= count))
        if len(bad):
            msg = (
                f"pair_index: expected rows of the {count:,} {what}s, found row {pairs[bad[0], column]} in pair {bad[0]} "
                f"({len(bad):,} such pairs); correct the pairs or add the {what}s"
            )
            raise IntegrityError(msg)


def _check_clusters(name: str, clusters: np.ndarray | None, n_rows: int, low: int, count: int | None) -> None:
    if clusters is None:
        return
    if clusters.shape != (n_rows,) or clusters.dtype.kind not in "iu":
        msg = f"{name}: expected integers of shape [{n_rows}], found {clusters.dtype} {list(clusters.shape)}"
        raise IntegrityError(msg)
    bad = np.flatnonzero((clusters < low) | (clusters >= (_MOST_CLUSTERS if count is None else count)))
    if len(bad):
        known = f"{_MOST_CLUSTERS:,}" if count is None else f"{count}, the number of centroids"
        msg = f"{name}: expected numbers of clusters from {low} on, below {known}; found {clusters[bad[0]]} at row {bad[0]}"
        raise IntegrityError(msg)
