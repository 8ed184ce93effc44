"""One mining task, checked and laid out: sources in the order of clusters, pairs sorted, similarities of positives."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from jasper_store.building.duplicates import Groups, group_rows
from jasper_store.building.inputs import MiningInputs, MiningSettings, check_inputs
from jasper_store.building.quantized import Quantized, quantize, quantized_nbytes, quantizes
from jasper_store.building.similarity import cosines, dots
from jasper_store.building.source_clusters import centroids_of, clusters_of_sources
from jasper_store.building.tiers import ADJACENT, IN_CLUSTER, OTHER, Clusters, adjacent_clusters, quotas
from jasper_store.building.vectors import Vectors, scan
from jasper_store.errors import IntegrityError
from jasper_store.native.topk import offers

__all__ = ["Problem"]

_EXACT_NBYTES = 2 << 20
"""Of rows whose cosines are computed at a time, as float32."""


class Problem:
    """What is mined.

    Attributes:
        settings: how negatives are chosen.
        questions: embeddings of the questions.
        sources: embeddings of the sources.
        pair_question: question of each pair, int64 [P].
        pair_source: its positive, int64 [P].
        clusters: the order of the sources.
        groups: sources that have the same bytes.
        positive_similarities: cosine of question and positive, float32 [P].
        quotas: negatives of each kind.
        order: pairs sorted by cluster and question, int64 [P].
        device: where products are made.
    """

    def __init__(self, inputs: MiningInputs, settings: MiningSettings, device: torch.device) -> None:
        check_inputs(inputs, settings)
        self.settings = settings
        self.device = device
        self.questions = scan(inputs.questions, "questions", hash_rows=False)
        self.sources = scan(inputs.sources, "sources", hash_rows=True)
        self.pair_question = np.ascontiguousarray(inputs.pair_index[:, 0], np.int64)
        self.pair_source = np.ascontiguousarray(inputs.pair_index[:, 1], np.int64)
        self._lay_out(inputs)
        assert self.sources.hashes is not None
        self.groups = Groups(group_rows(self.sources.hashes), self.clusters.position)
        self.sources.hashes = None
        # A question and a group of duplicates that holds a positive of it, as one number.
        self._n_groups = len(self.groups.starts) - 1
        self._positive_keys = np.unique(self.pair_question * self._n_groups + self.groups.of_row[self.pair_source])
        self.quotas = quotas(settings.n_neg, settings.tiers, clustered=self.pair_clusters is not None)
        by_cluster = self.cluster_of(np.arange(len(self.pair_question)))
        self.order = np.lexsort((self.pair_question, by_cluster))
        self._by_question = np.argsort(self.pair_question, kind="stable")
        self._first_pair = np.searchsorted(self.pair_question[self._by_question], np.arange(self.questions.n_rows + 1))
        self._require_negatives()
        self.positive_similarities = self.similarities(self.pair_question, self.pair_source)
        self._resident: torch.Tensor | None = None
        self._resident_bytes: Quantized | None = None

    def _lay_out(self, inputs: MiningInputs) -> None:
        self.pair_clusters = None if inputs.pair_clusters is None else inputs.pair_clusters.astype(np.int64)
        if self.pair_clusters is None:
            self.clusters = Clusters.of(None, np.empty((0, 3), np.int64), self.sources.n_rows)
            return
        of_sources = clusters_of_sources(inputs, self.pair_source, self.pair_clusters, self.sources)
        count = 1 + max(int(self.pair_clusters.max()), int(of_sources.max()))
        if inputs.centroids is not None:
            centroids = torch.from_numpy(np.ascontiguousarray(inputs.centroids))
        else:
            centroids = centroids_of(self.sources, of_sources, count)
        self.clusters = Clusters.of(of_sources, adjacent_clusters(centroids), self.sources.n_rows)

    def _require_negatives(self) -> None:
        """Refuse a question of which every source is a positive or a duplicate of one."""
        unit, group = self.positive_groups(np.arange(self.questions.n_rows))
        excluded = np.bincount(unit, self.groups.sizes[group], minlength=self.questions.n_rows)
        bad = np.flatnonzero(excluded >= self.sources.n_rows)
        if len(bad):
            msg = (
                f"expected for each question a source that is no positive of it nor a duplicate of one, found none for "
                f"question {bad[0]} ({len(bad):,} such questions); add sources or remove pairs"
            )
            raise IntegrityError(msg)

    # --- pairs ------------------------------------------------------------------------------------------------

    @property
    def n_pairs(self) -> int:
        """Number of pairs."""
        return len(self.pair_question)

    def cluster_of(self, pairs: np.ndarray) -> np.ndarray:
        """Cluster of each pair [n]; -1 without clusters."""
        return np.full(len(pairs), -1) if self.pair_clusters is None else self.pair_clusters[pairs]

    def pairs_of(self, questions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All pairs of some questions: for each its place in ``questions``, and the pair."""
        first = self._first_pair[questions]
        count = self._first_pair[questions + 1] - first
        which = np.repeat(np.arange(len(questions)), count)
        within = np.arange(len(which)) - (np.cumsum(count) - count)[which]
        return which, self._by_question[first[which] + within]

    @property
    def most_positives(self) -> int:
        """Pairs of the question that has most."""
        return int(np.diff(self._first_pair).max(initial=0))

    def kinds_of(self, pairs: np.ndarray, sources: np.ndarray) -> np.ndarray:
        """Kind of each source [T, n] for the pair of its row: in its cluster, adjacent, or other; uint8 [T, n]."""
        own = self.cluster_of(pairs)
        cluster = np.searchsorted(self.clusters.starts, self.clusters.position[sources], side="right") - 1
        kinds = np.full(sources.shape, OTHER, np.uint8)
        for near in self.clusters.adjacent[own].T:
            kinds[(cluster == near[:, None])] = ADJACENT
        kinds[cluster == own[:, None]] = IN_CLUSTER
        return kinds

    def positive_groups(self, questions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Groups of duplicates that hold a positive: for each its place in ``questions``, and the group; none twice."""
        first = np.searchsorted(self._positive_keys, questions * self._n_groups)
        count = np.searchsorted(self._positive_keys, (questions + 1) * self._n_groups) - first
        which = np.repeat(np.arange(len(questions)), count)
        within = np.arange(len(which)) - (np.cumsum(count) - count)[which]
        return which, self._positive_keys[first[which] + within] % self._n_groups

    def is_excluded(self, pairs: np.ndarray, sources: np.ndarray) -> np.ndarray:
        """Whether a source is a positive of the pair's question, or has the bytes of one; bool [n]."""
        keys = self.pair_question[pairs] * self._n_groups + self.groups.of_row[sources]
        at = np.searchsorted(self._positive_keys, keys)
        found: np.ndarray = self._positive_keys[np.minimum(at, len(self._positive_keys) - 1)] == keys
        return found

    # --- similarities -----------------------------------------------------------------------------------------

    def similarities(self, questions: np.ndarray, sources: np.ndarray) -> np.ndarray:
        """Cosine of each question with the source beside it, float32 [n]."""
        return _cosines_of(self.questions, questions, self.sources, sources)

    def source_similarities(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Cosine of each source with the source beside it, float32 [n]."""
        return _cosines_of(self.sources, left, self.sources, right)

    def ceilings(self, pairs: np.ndarray) -> np.ndarray:
        """Cosine that a negative of each pair may have at most, float64 [n]; inf without a rule."""
        found: np.ndarray = self._ceilings(pairs).min(axis=0)
        return found

    def binding_rule(self, pairs: np.ndarray) -> np.ndarray:
        """Which rule sets the ceiling of each pair: 0 maximum, 1 absolute margin, 2 relative margin."""
        found: np.ndarray = self._ceilings(pairs).argmin(axis=0)
        return found

    def _ceilings(self, pairs: np.ndarray) -> np.ndarray:
        settings = self.settings
        positive = self.positive_similarities[pairs].astype(np.float64)
        found = np.full((3, len(pairs)), np.inf)
        if settings.max_similarity is not None:
            found[0] = settings.max_similarity
        if settings.absolute_margin is not None:
            found[1] = positive - settings.absolute_margin
        if settings.relative_margin is not None:
            # Below the positive where its cosine is negative, too.
            found[2] = positive - settings.relative_margin * np.abs(positive)
        return found

    def sweep_ceilings(self, pairs: np.ndarray) -> np.ndarray:
        """Ceilings that a sweep may leave out by: none where ranks are counted, since ranks count what is left out, too."""
        return np.full(len(pairs), np.inf) if self.settings.ranks else self.ceilings(pairs)

    # --- sources at length 1 ----------------------------------------------------------------------------------

    @property
    def compiled(self) -> bool:
        """Whether products are looked through by the compiled loop."""
        return offers(self.device)

    @property
    def as_bytes(self) -> bool:
        """Whether products are made of bytes, unless these turn out to spare little."""
        return self.compiled and quantizes(self.sources.dim)

    @property
    def source_nbytes(self) -> int:
        """Bytes of a source that is held."""
        return 4 * self.sources.dim + (quantized_nbytes(self.sources.dim) if self.as_bytes else 0)

    def hold_sources(self) -> None:
        """Keep all sources at length 1 on the device, in the order of clusters."""
        held = torch.empty((self.sources.n_rows, self.sources.dim), device=self.device)
        for start, stop in _steps(self.sources.n_rows, 1 << 13):
            held[start:stop] = self.sources.unit(self.clusters.rows[start:stop]).to(self.device)
        self._resident = held
        self._resident_bytes = quantize(held) if self.as_bytes else None

    def unit_sources(self, start: int, stop: int) -> torch.Tensor:
        """Sources at length 1 by position, float32 [stop - start, D] on the device."""
        if self._resident is not None:
            return self._resident[start:stop]
        return self.sources.unit(self.clusters.rows[start:stop]).to(self.device)

    def source_bytes(self, start: int, stop: int) -> Quantized:
        """The same as bytes."""
        if self._resident_bytes is not None:
            return self._resident_bytes.part(slice(start, stop))
        return quantize(self.unit_sources(start, stop))


def _steps(total: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, step):
        yield start, min(start + step, total)


def _cosines_of(left: Vectors, left_rows: np.ndarray, right: Vectors, right_rows: np.ndarray) -> np.ndarray:
    found = np.empty(len(left_rows), np.float32)
    step = max(_EXACT_NBYTES // (4 * left.dim), 1)
    for start, stop in _steps(len(left_rows), step):
        lefts, rights = left_rows[start:stop], right_rows[start:stop]
        products = dots(left.raw(lefts), right.raw(rights))
        found[start:stop] = cosines(products, left.norms[lefts], right.norms[rights])
    return found
