"""``build``: from embeddings and pairs to a dataset that can be trained on, in bounded memory, resumable."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jasper_store.building.build_report import BuildReport, StageReport
from jasper_store.building.built import make_config, plain
from jasper_store.building.clusters import Clusters, default_count, given_of_pairs, given_of_sources, k_means
from jasper_store.building.finder import Finder
from jasper_store.building.gathered import Facts, Inputs, find_inputs, read_inputs
from jasper_store.building.memory import Memory
from jasper_store.building.mining import Mined, MiningInputs, MiningSettings, mine
from jasper_store.building.settings import BuildSettings
from jasper_store.building.splits import divide, group_pairs, require_apart, require_filled
from jasper_store.building.stages import WorkDirectory, key_of
from jasper_store.building.steering import KeywordWeights
from jasper_store.building.target import BUILT, built_config, probe
from jasper_store.building.write import Derived, output_nbytes, write_tensors
from jasper_store.files.atomic import require_space
from jasper_store.files.lock import lock_beside, remove_stale
from jasper_store.jasper import api
from jasper_store.jasper.writing import DatasetWriter

__all__ = ["build"]

_VERSION = 1
"""Of what is computed: a dataset, or a stage, that another version made is no result of this one."""


Progress = Callable[[str, int, int], None]


def build(
    dst: str | PathLike[str],
    *,
    questions: Any,
    sources: Any,
    pairs: Any,
    keywords: Any = None,
    pair_keywords: Any = None,
    relevance: Any = None,
    clusters: Any = None,
    splits: Any = None,
    n_neg: int = 5,
    format: str = "safetensors",  # noqa: A002 (the word that users pass)
    memory_limit: int | str | None = None,
    seed: int = 42,
    progress: Progress | None = None,
    question_ids: Any = None,
    source_ids: Any = None,
    keyword_weights: KeywordWeights = "equal",
    normalize_residual: bool = False,
    shared_questions: bool = False,
    repeated_pairs: bool = False,
    keep_similarities: bool = False,
    mining: Mapping[str, Any] | None = None,
    device: str = "cpu",
    compression: str | None = None,
    overwrite: bool = False,
) -> BuildReport:
    """Build a JASPER dataset from embeddings: clusters, steering, hard negatives and splits are computed.

    Memory is bounded by the budget at any size of the embeddings. Everything is read and checked before the first byte is
    written. The dataset appears whole, in one step. A build that was killed is run again with the same arguments: stages
    that were finished are kept beside ``dst``. The values are a pure function of the inputs, the seed and the options.

    An input is a numpy array, a torch tensor, a tensor of a store, a path that :func:`jasper_store.open` reads, or
    ``"path:name"``, or (path, name), where several tensors are there. Embeddings are stored as they are, and taken at
    length 1 where a cosine is meant.

    Args:
        dst: directory to make.
        questions: floats [Q, D].
        sources: floats [S, D].
        pairs: which question belongs to which source: row numbers [P, 2], or two columns of ids.
        keywords: floats [K, D].
        pair_keywords: rows of ``keywords`` for each pair: lists, or (values, offsets).
        relevance: floats [P], 0 to 1; by default all are 1.
        clusters: how many to make; or the cluster of each source, [S], or pair, [P], as ``{"sources": numbers}`` or
            ``{"pairs": numbers}`` where S = P. By default sqrt(S / 2) are made by spherical k-means.
        splits: shares of train, val and test (0.8, 0.1, 0.1), a name or number for each pair, or pairs by split.
        n_neg: hard negatives for each pair.
        format: ``"safetensors"``, ``"npy"``, ``"hdf5"`` or ``"pt"``.
        memory_limit: bytes, or a text such as ``"8GiB"``; one more upper bound on the memory that is used.
        seed: of k-means, of the splits and of random negatives.
        progress: called as ``progress(stage, done, total)``, in rows. What it raises ends the build.
        question_ids: the id of each question: strings, ``store.ids(name)``, or a file of strings.
        source_ids: the id of each source.
        keyword_weights: ``"equal"``, or ``"softmax"`` of their cosines with the question.
        normalize_residual: make ``steering_residual`` of length 1.
        shared_questions: allow a question, or an exact duplicate of one, in two splits.
        repeated_pairs: allow a pair that is there twice.
        keep_similarities: keep the cosines of question with positive and with negatives as the tensors
            ``positive_similarities`` [P] and ``negative_similarities`` [P, n_neg].
        mining: more settings of the miner, by name; see ``MiningSettings``.
        device: where mining multiplies matrices, ``"cpu"`` or ``"cuda"``.
        compression: HDF5 only.
        overwrite: replace a dataset that is there, in one step.

    Returns:
        A report with counts and times; ``str(report)`` is for people.

    Raises:
        IntegrityError: inputs that contradict each other or cannot be used; says which argument, and where.
        IncompatibleOptionsError, UnknownNameError: options, ids and columns.
        DatasetNotFoundError, CorruptFileError: a file.
        InsufficientMemoryError: the budget does not hold the numbers of the pairs.
        ConversionError: no room for the dataset, said before the first byte; or ``dst`` is there, cannot be written, or is
            being built by another process.

    Example:
        >>> report = js.build("data/", questions=q, sources=s, pairs=pairs)  # doctest: +SKIP
        >>> loader = js.create_loader("data/", "train", batch_size=256)      # doctest: +SKIP
    """
    settings = BuildSettings(
        n_neg=n_neg,
        format=format,
        compression=compression,
        seed=seed,
        keyword_weights=keyword_weights,
        normalize_residual=normalize_residual,
        shared_questions=shared_questions,
        repeated_pairs=repeated_pairs,
        keep_similarities=keep_similarities,
        mining=dict(mining or {}),
    )
    mining_settings = MiningSettings(n_neg=n_neg, seed=seed, **settings.mining)
    given = {
        "questions": questions,
        "sources": sources,
        "pairs": pairs,
        "keywords": keywords,
        "pair_keywords": pair_keywords,
        "relevance": relevance,
        "clusters": clusters,
        "splits": splits,
        "question_ids": question_ids,
        "source_ids": source_ids,
    }
    target = Path(os.path.realpath(dst))
    with contextlib.ExitStack() as stack:
        if built_config(target) is None:
            probe(target, settings, overwrite=overwrite)
        inputs = find_inputs(given, settings, Finder(stack))
        run = _Build(
            target, inputs, settings, mining_settings, progress=progress, memory_limit=memory_limit, device=device
        )
        return run.run(overwrite=overwrite)


class _Build:
    """One build: its stages in order, with the time that each took."""

    def __init__(
        self,
        target: Path,
        inputs: Inputs,
        settings: BuildSettings,
        mining: MiningSettings,
        *,
        progress: Progress | None,
        memory_limit: int | str | None,
        device: str,
    ) -> None:
        self.target = target
        self.inputs = inputs
        self.settings = settings
        self.mining = mining
        self.device = device
        self.work = WorkDirectory(target)
        self.stages: list[StageReport] = []
        self._progress = progress
        self.n_clusters = _cluster_count(inputs)
        self.memory = Memory.measure(inputs, settings, self.n_clusters, memory_limit)

    def run(self, *, overwrite: bool) -> BuildReport:
        facts = self._read()
        choices = [self.n_clusters, {name: plain(part) for name, part in self.inputs.splits.items()}]
        key = key_of(_VERSION, facts.digests, choices, self.settings.to_dict(), self.mining.to_dict())
        built = built_config(self.target)
        if built is not None and built[BUILT]["key"] == key and not overwrite:
            remove_stale(lock_beside(self.target))  # of a build that was killed once it had published
            self._clean()
            return self._report(built, existed=True)
        if built is not None:
            probe(self.target, self.settings, overwrite=overwrite)
        groups = group_pairs(self.inputs.pairs, facts.question_hashes, shared=self.settings.shared_questions)
        # Whether a split would be empty does not depend on the clusters, which take long.
        self._split(groups, np.zeros(len(groups), np.int64))
        self._require_room()
        with self.work.held(self.target):
            clusters, clusters_key = self._cluster(facts)
            with self._stage("splits", len(groups)):
                splits = self._split(groups, clusters.of_pairs.numpy())
            derived, counts = self._mine(facts, clusters, splits, clusters_key)
            config = make_config(
                key,
                self.target.name,
                inputs=self.inputs,
                settings=self.settings,
                mining=self.mining,
                facts=facts,
                derived=derived,
                counts=counts,
            )
            self._write(derived, config, overwrite=overwrite)
            self.work.remove()
        return self._report(config)

    # --- stages -----------------------------------------------------------------------------------------------

    def _read(self) -> Facts:
        with self._stage("read", sum(len(matrix) for matrix in self.inputs.embeddings)) as moved:
            return read_inputs(self.inputs, self.memory.block_rows, moved)

    def _cluster(self, facts: Facts) -> tuple[Clusters, str]:
        inputs, rows = self.inputs, self.memory.block_rows
        given = inputs.clusters
        owner = given[0] if isinstance(given, tuple) else None
        of = [facts.digests[name] for name in ("sources", "pairs")] + [facts.digests.get(f"clusters of {owner}")]
        key = key_of(_VERSION, "clusters", of, owner or self.n_clusters, self.settings.seed)
        with self._stage("clusters", len(inputs.sources) * (1 if owner else 2)) as moved:
            kept = self.work.kept("clusters", key)
            if kept is not None:
                self._keep_stage()
                return Clusters(**kept[0]), key
            if isinstance(given, tuple):
                make = given_of_sources if owner == "sources" else given_of_pairs
                made = make(inputs.sources, inputs.pairs, given[1], block_rows=rows, progress=moved)
            else:
                seed = self.settings.seed
                made = k_means(
                    inputs.sources, inputs.pairs, self.n_clusters, seed=seed, block_rows=rows, progress=moved
                )
            self.work.keep("clusters", key, vars(made), {})
            return made, key

    def _split(self, groups: NDArray[np.int64], clusters: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """Pairs of each split; those given, or a share of each cluster."""
        rows = {name: part for name, part in self.inputs.splits.items() if isinstance(part, torch.Tensor)}
        if rows:
            require_apart(rows, groups)
        else:
            shares = {name: part for name, part in self.inputs.splits.items() if isinstance(part, float)}
            rows = divide(groups, clusters, shares, self.settings.seed)
        require_filled(rows, int(groups.max()) + 1)
        return rows

    def _mine(
        self, facts: Facts, clusters: Clusters, splits: dict[str, torch.Tensor], clusters_key: str
    ) -> tuple[Derived, dict[str, Any]]:
        inputs = self.inputs
        key = key_of(_VERSION, "mine", clusters_key, facts.digests["questions"], self.mining.to_dict())
        with self._stage("mine", len(inputs.pairs)) as moved:
            kept = self.work.kept("mine", key)
            if kept is not None:
                self._keep_stage()
                tensors, counts = kept
            else:
                found = mine(
                    MiningInputs(
                        inputs.questions,
                        inputs.sources,
                        inputs.pairs.numpy(),
                        clusters.of_pairs.numpy(),
                        clusters.of_sources.numpy(),
                        clusters.centroids.numpy(),
                    ),
                    self.mining,
                    memory_limit=self.memory.free,
                    device=self.device,
                    progress=moved.to,
                    workdir=self.work.scratch("mine", key),
                )
                tensors, counts = _mined(found)
                self.work.keep("mine", key, tensors, counts)
        more = ("positive_similarities", "negative_similarities") if self.settings.keep_similarities else ()
        return (
            Derived(clusters, tensors["negatives"], tensors["tiers"], splits, {name: tensors[name] for name in more}),
            counts,
        )

    def _write(self, derived: Derived, config: dict[str, Any], *, overwrite: bool) -> None:
        settings = self.settings
        rows = sum(len(matrix) for matrix in self.inputs.embeddings) + len(self.inputs.pairs)
        with (
            self._stage("write", rows) as moved,
            DatasetWriter(
                self.target,
                settings.format,
                compression=settings.compression,
                config=config,
                overwrite=overwrite,
            ) as writer,
        ):
            write_tensors(writer, self.inputs, derived, settings, self.memory.block_rows, moved)

    # --- what they share --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _stage(self, name: str, rows: int) -> Iterator[_Moved]:
        began = time.perf_counter()
        moved = _Moved(name, rows, self._progress)
        moved.to(0, rows)
        self._kept = False
        yield moved
        moved.to(rows, rows)
        self.stages.append(StageReport(name, rows, time.perf_counter() - began, self._kept))

    def _keep_stage(self) -> None:
        """Record that the stage at work was finished by an earlier build."""
        self._kept = True

    def _require_room(self) -> None:
        there = next(path for path in self.target.parents if path.is_dir())
        needed = output_nbytes(self.inputs, self.settings, self.n_clusters) + self.memory.kept_nbytes
        require_space(there, needed, what=f"building {self.target.name} there")

    def _clean(self) -> None:
        """Remove what a build left that was killed after it had published the dataset."""
        if self.work.path.is_dir():
            with self.work.held(self.target):
                self.work.remove()

    def _report(self, config: dict[str, Any], *, existed: bool = False) -> BuildReport:
        built = config[BUILT]
        return BuildReport(
            path=self.target,
            format=self.settings.format,
            nbytes=api.plan(self.target, format=self.settings.format).nbytes,
            counts=built["counts"],
            splits=config["split_sizes"],
            mining=built["mining"],
            settings=built["settings"],
            stages=tuple(self.stages),
            notes=tuple(built["notes"]),
            existed=existed,
        )


class _Moved:
    """Progress of one stage: called with rows that were done, or set with :meth:`to`."""

    def __init__(self, name: str, total: int, progress: Progress | None) -> None:
        self._name = name
        self._total = total
        self._done = 0
        self._progress = progress

    def __call__(self, rows: int) -> None:
        self.to(min(self._done + rows, self._total), self._total)

    def to(self, done: int, total: int) -> None:
        """Say how much is done of how much."""
        self._done = done
        if self._progress is not None:
            self._progress(self._name, done, total)


def _cluster_count(inputs: Inputs) -> int:
    """How many clusters there will be, at most."""
    if isinstance(inputs.clusters, tuple):
        return int(inputs.clusters[1].max()) + 1
    return default_count(len(inputs.sources)) if inputs.clusters is None else inputs.clusters


def _mined(found: Mined) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {
        "negatives": torch.from_numpy(found.negatives),
        "tiers": torch.from_numpy(found.tiers).long(),
        "negative_similarities": torch.from_numpy(found.similarities),
        "positive_similarities": torch.from_numpy(found.positive_similarities),
    }
    recall = {} if found.recall is None else {"recall": found.recall}
    return tensors, {**found.counts.to_dict(), **found.kinds, **recall}
