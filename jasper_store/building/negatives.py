"""``mine_negatives``: hard negatives of a dataset that is there, mined, and put in place."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from jasper_store.building.inputs import NEAR_DUPLICATE, Method, MiningInputs, MiningSettings
from jasper_store.building.mining import Mined, key_of, mine_problem
from jasper_store.building.mining_report import MiningReport
from jasper_store.building.problem import Problem
from jasper_store.building.stages import WorkDirectory
from jasper_store.building.target import BUILT
from jasper_store.building.tiers import PROPORTIONS, TierNumbers
from jasper_store.conversion.checksum import checksum_of
from jasper_store.conversion.converter import convert
from jasper_store.conversion.rewrite import replace_tensors
from jasper_store.errors import DatasetNotFoundError, IncompatibleOptionsError
from jasper_store.files.atomic import write_bytes
from jasper_store.files.hub import require_local
from jasper_store.formats.base import Chunked, Schema
from jasper_store.formats.generation import read_generation
from jasper_store.formats.registry import FORMATS, locate
from jasper_store.jasper import api
from jasper_store.jasper.config import CONFIG_NAME
from jasper_store.jasper.recognise import known_at
from jasper_store.jasper.writing import DatasetWriter
from jasper_store.memory import budget
from jasper_store.samples.opened import load_config, packed_at

if TYPE_CHECKING:
    from jasper_store.store.store import TensorStore

__all__ = ["MINED", "mine_negatives"]

MINED: Final = "mined"
"""Key of ``config.json`` that says what the negatives were mined from."""

_NEEDED: Final = ("question_embs", "source_embs", "pair_index")
_NEGATIVES: Final = ("hard_negatives", "negative_tiers")
_SIMILARITIES: Final = ("negative_similarities", "positive_similarities")
_DEFAULT_COUNT: Final = 5

Progress = Callable[[str, int, int], None]


def mine_negatives(
    dataset: str | PathLike[str],
    n_neg: int | None = None,
    *,
    tiers: Sequence[float] | None = None,
    relative_margin: float | None = 0.05,
    absolute_margin: float | None = None,
    max_similarity: float | None = None,
    duplicate_similarity: float | None = NEAR_DUPLICATE,
    ranks: tuple[int, int] | None = None,
    method: Method = "exact",
    tier_numbers: TierNumbers = "jasper",
    memory_limit: int | str | None = None,
    seed: int = 42,
    similarities: bool = False,
    force: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> MiningReport:
    """Mine hard negatives from the embeddings of a dataset, and write them into it.

    For each pair other sources are chosen that are similar to the question and are no answer to it. The values are a pure
    function of content, settings and seed. Where the dataset has negatives, the new tensors and
    ``config.json`` replace them in one step if the system can (Linux), so that a running loader takes them by
    ``reload_negatives()``. A dataset in parts (which was appended to) gets them as its next generation. A call that was
    killed is run again with the same arguments, and continues. A call with the same content and settings as the last one finds that out, and writes nothing.

    Args:
        dataset: directory with ``question_embs`` [Q, D], ``source_embs`` [S, D] and ``pair_index`` [P, 2]; with
            ``pair_cluster_id`` [P], and ``centroid_embs`` [C, D] if it is there, negatives are of four kinds.
        n_neg: negatives for each pair; by default as many as the dataset has, else 5.
        tiers: parts of four kinds: in the pair's cluster, in the three nearest clusters, most similar of other clusters,
            random of far clusters. By default (3, 4, 3, 2).
        relative_margin: leave out sources whose cosine with the question is above the positive's less this share of it.
        absolute_margin: leave out sources whose cosine is above the positive's less this.
        max_similarity: leave out sources whose cosine is above this.
        duplicate_similarity: leave out sources whose cosine with a positive of the question is at least this.
        ranks: first and last (exclusive) rank that may be chosen, from 0, by similarity.
        method: ``"exact"`` looks at every product; ``"faiss"`` searches an index (IVF, needs ``jasper_store[build]``) and
            reports which share of the most similar sources it found.
        tier_numbers: ``"jasper"`` writes 0 for random negatives, 1 for those of the own and near clusters, 2 for the most
            similar others; ``"builder"`` writes 1 to 4 for the four kinds.
        memory_limit: bytes, or a text such as ``"8GiB"``; one more upper bound on the memory that is used.
        seed: of random negatives.
        similarities: write cosines, too: ``positive_similarities`` [P] and ``negative_similarities`` [P, n_neg], float32.
        force: mine and write even if the dataset has these negatives already.
        device: where matrices are multiplied, ``"cpu"`` or ``"cuda"``.
        progress: called as ``progress(stage, done, total)``. What it raises ends the call, and nothing is written.

    Returns:
        A report with counts of what each rule left out; ``str(report)`` is for people.

    Raises:
        DatasetNotFoundError: no dataset, or tensors are missing; the message names them.
        IntegrityError: embeddings with NaN or zero rows, pairs that name no row, too few sources.
        IncompatibleOptionsError: settings out of range; or a dataset that is packed; or another ``n_neg`` where it is in parts.
        InsufficientMemoryError: the budget does not hold the numbers of the pairs.
        CorruptFileError: a file.
        ConversionError: no room, no permission, or another process mines for the dataset.

    Example:
        >>> print(js.mine_negatives("data/", n_neg=12))  # doctest: +SKIP
    """
    began = time.perf_counter()
    require_local(dataset)
    path = Path(os.path.realpath(dataset))
    if not path.is_dir():
        raise DatasetNotFoundError(f"{dataset}: expected a dataset's directory, found none; name another", path=path)
    _refuse_packed(path)
    config = dict(load_config(path / CONFIG_NAME)) if (path / CONFIG_NAME).is_file() else {}
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(api._quietly_opened(path))  # noqa: SLF001
        _require_tensors(store, path)
        settings = MiningSettings(
            n_neg=_count(n_neg, config, store, path),
            tiers=PROPORTIONS if tiers is None else tuple(tiers),  # type: ignore[arg-type]
            relative_margin=relative_margin,
            absolute_margin=absolute_margin,
            max_similarity=max_similarity,
            duplicate_similarity=duplicate_similarity,
            ranks=ranks,
            method=method,
            tier_numbers=tier_numbers,
            seed=seed,
        )
        # Similarities of other negatives would contradict the new ones, so those that are there are always written anew.
        similarities = similarities or any(name in store for name in _SIMILARITIES)
        limit = budget.measure(memory_limit).nbytes
        work = WorkDirectory(path, "mine")
        stack.enter_context(work.held(path))
        problem = Problem(_inputs(store), settings, torch.device(device))
        key = key_of(problem)
        if not force and _is_up_to_date(store, config, key, similarities=similarities):
            work.remove()
            report = MiningReport(path=path, **config[MINED]["report"], key=key, seconds=0.0, existed=True)
            return replace(report, seconds=time.perf_counter() - began)
        scratch = work.scratch("mine", key)
        moved = None if progress is None else _Following(progress)
        mined = mine_problem(problem, memory_limit=limit, progress=moved, workdir=scratch)
        facts = _facts(mined, settings)
        tensors = _tensors(mined, similarities=similarities)
        config = _with_mined(config, key, facts, tensors, settings.n_neg)
        _publish(path, store, tensors, config, work.path / "new")
        work.remove()
    return MiningReport(path=path, **facts, key=key, seconds=time.perf_counter() - began)


class _Following:
    """Products that were made, as the progress of a stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __call__(self, done: int, total: int) -> None:
        self._progress("mine", done, total)


# --- what there is --------------------------------------------------------------------------------------------


def _refuse_packed(path: Path) -> None:
    if packed_at(path) is not None:
        msg = (
            f"{path} is packed, and holds copies of its negatives; mine for the dataset that it was packed from, and pack "
            "negative_embs and negative_tiers again"
        )
        raise IncompatibleOptionsError(msg, path=path)


def _require_tensors(store: TensorStore, path: Path) -> None:
    missing = [name for name in _NEEDED if name not in store]
    if missing:
        msg = (
            f"{path}: mining needs {', '.join(_NEEDED)}; expected all of them, found no {', '.join(missing)}. Name a JASPER "
            "dataset, or build one of your embeddings (jasper-store build)"
        )
        raise DatasetNotFoundError(msg, path=path)
    if read_generation(path) is None:
        for name in {*_NEGATIVES, *_SIMILARITIES} & set(store):
            _require_own_file(store, name, path)


def _require_own_file(store: TensorStore, name: str, path: Path) -> None:
    """Refuse to replace a tensor of a file that other tensors share, unless the format has one file for all."""
    spec = store[name].spec
    fmt = FORMATS.get(store.format)
    shared = [other for other in store if other != name and set(store[other].spec.paths) & set(spec.paths)]
    if fmt is None or (fmt.one_file is None and shared):
        msg = (
            f"{path}: expected a format that is written, with a file for each tensor, found {store.format} with {name} beside "
            f"{', '.join(shared[:3]) or 'others'}; convert the dataset into a new directory (jasper-store convert), and mine there"
        )
        raise IncompatibleOptionsError(msg, path=path)


def _count(n_neg: int | None, config: Mapping[str, Any], store: TensorStore, path: Path) -> int:
    """Negatives for each pair."""
    there = None
    if "hard_negatives" in store and len(store["hard_negatives"].shape) == 2:
        there = int(store["hard_negatives"].shape[1])
    if n_neg is None:
        return int(config.get("n_neg", _DEFAULT_COUNT)) if there is None else there
    if there not in (None, n_neg) and read_generation(path) is not None:
        msg = (
            f"n_neg={n_neg}: {path} is in parts, which keep the shape of their rows; expected {there} as it has. For another "
            "number convert it into a new directory (jasper-store convert), and mine there"
        )
        raise IncompatibleOptionsError(msg, path=path)
    return n_neg


def _inputs(store: TensorStore) -> MiningInputs:
    def whole(name: str) -> np.ndarray | None:
        return store[name].tensor().clone().cpu().numpy() if name in store else None

    centroids = store["centroid_embs"].tensor().to(torch.float32).clone().numpy() if "centroid_embs" in store else None
    clusters = whole("pair_cluster_id")
    pairs = whole("pair_index")
    assert pairs is not None
    return MiningInputs(
        store["question_embs"],
        store["source_embs"],
        pairs,
        clusters,
        centroids=None if clusters is None else centroids,
    )


def _is_up_to_date(store: TensorStore, config: Mapping[str, Any], key: str, *, similarities: bool) -> bool:
    """Whether the dataset has the negatives of this key, unchanged since they were mined."""
    mined = config.get(MINED)
    if not isinstance(mined, dict) or mined.get("key") != key:
        return False
    names = [*_NEGATIVES, *(_SIMILARITIES if similarities else ())]
    digests = mined.get("tensors", {})
    return all(name in store and digests.get(name) == checksum_of(store[name].tensor()) for name in names)


# --- what is written ------------------------------------------------------------------------------------------


def _tensors(mined: Mined, *, similarities: bool) -> dict[str, torch.Tensor]:
    found = {
        "hard_negatives": torch.from_numpy(mined.negatives),
        "negative_tiers": torch.from_numpy(mined.tiers).long(),
    }
    if similarities:
        found["negative_similarities"] = torch.from_numpy(mined.similarities)
        found["positive_similarities"] = torch.from_numpy(mined.positive_similarities)
    return found


def _facts(mined: Mined, settings: MiningSettings) -> dict[str, Any]:
    return {
        "n_pairs": len(mined.negatives),
        "settings": settings.to_dict(),
        "counts": mined.counts.to_dict(),
        "kinds": mined.kinds,
        "similarity_of_kinds": mined.similarity_of_kinds,
        "recall": mined.recall,
        "positive_similarity": float(mined.positive_similarities.mean(dtype=np.float64)),
    }


def _with_mined(
    config: Mapping[str, Any], key: str, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], n_neg: int
) -> dict[str, Any]:
    """The configuration with what was mined; a build's key goes, since the dataset is no longer what it made."""
    new = dict(config)
    if isinstance(new.get(BUILT), dict):
        new[BUILT] = {name: value for name, value in new[BUILT].items() if name != "key"}
    # No time of day: the same content and settings give the same file.
    new[MINED] = {
        "by": f"jasper_store {metadata.version('jasper-store')}",
        "key": key,
        "tensors": {name: checksum_of(tensor) for name, tensor in tensors.items()},
        "report": dict(facts),
    }
    if "embedding_dim" in new:
        new["n_neg"] = n_neg
    return new


def _publish(
    path: Path, store: TensorStore, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], staging: Path
) -> None:
    """Write and prove the tensors and ``config.json``; they replace the old ones, in one step if that can be done.

    Of a dataset in parts, tensors are replaced by its next generation, and ``config.json`` just before.
    """
    with DatasetWriter(staging, overwrite=True) as writer:
        for name, tensor in tensors.items():
            writer.append(name, tensor)
    content = json.dumps(config, indent=2).encode()
    if read_generation(path) is not None:
        # First, so that publishing is the last step. A cut between the two leaves a key that fits no tensors: no key.
        write_bytes(path / CONFIG_NAME, content)
        replace_tensors(path, locate(staging, "safetensors", Schema()).specs, known_at(path).schema)
        return
    write_bytes(staging / CONFIG_NAME, content)
    convert(
        staging,
        path,
        format=store.format,
        compression=_compression(store),
        overwrite=True,
        tensors=list(tensors),
        source_format="safetensors",
        schema=known_at(path).schema,
    )


def _compression(store: TensorStore) -> str | None:
    """The compression of an HDF5 file, which is written anew as a whole."""
    filters = " ".join(
        spec.location.filters for name in store if isinstance((spec := store[name].spec).location, Chunked)
    )
    return next((known for known in ("gzip", "lzf") if known in filters), None)
