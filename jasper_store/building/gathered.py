"""All inputs of a build, found, compared with each other, and read once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jasper_store.building.finder import Finder, Ragged
from jasper_store.building.given import find_clusters, find_relevance, find_splits
from jasper_store.building.pairs import count_repeats, find_pairs, first_repeat
from jasper_store.building.rows import Matrix
from jasper_store.building.scan import digest_of, scan_embeddings
from jasper_store.building.settings import BuildSettings
from jasper_store.errors import IncompatibleOptionsError, IntegrityError

__all__ = ["Facts", "Inputs", "find_inputs", "read_inputs"]


@dataclass(frozen=True)
class Inputs:
    """What a dataset is built from; nothing of the embeddings was read yet.

    Attributes:
        questions: [Q, D].
        sources: [S, D].
        pairs: rows of both, int64 [P, 2].
        keywords: [K, D].
        pair_keywords: rows of ``keywords`` for each pair.
        relevance: float32 [P].
        clusters: numbers of the pairs or the sources, or how many to make.
        splits: shares, or pairs by split.
    """

    questions: Matrix
    sources: Matrix
    pairs: torch.Tensor
    keywords: Matrix | None
    pair_keywords: Ragged | None
    relevance: torch.Tensor | None
    clusters: tuple[str, torch.Tensor] | int | None
    splits: dict[str, float] | dict[str, torch.Tensor]

    @property
    def dim(self) -> int:
        """Columns of every embedding, D."""
        return self.questions.shape[1]

    @property
    def embeddings(self) -> tuple[Matrix, ...]:
        """Questions, sources and keywords, as far as there are any."""
        return tuple(matrix for matrix in (self.questions, self.sources, self.keywords) if matrix is not None)


@dataclass(frozen=True)
class Facts:
    """What reading the inputs told.

    Attributes:
        digests: hash of the content of each input, by its argument.
        question_hashes: of the bytes of each question, uint64 [Q].
        duplicates: rows that equal an earlier one, by argument; pairs too.
    """

    digests: dict[str, str]
    question_hashes: NDArray[np.uint64]
    duplicates: dict[str, int]


def find_inputs(given: dict[str, Any], settings: BuildSettings, finder: Finder) -> Inputs:
    """Open what ``build`` was given and compare shapes, dtypes and row numbers; reads what is no embedding.

    Raises:
        JasperStoreError: what is wrong, in the words of the arguments.
    """
    questions, sources = (
        _embeddings(finder.matrix(role, given[role], known))
        for role, known in (("questions", "question_embs"), ("sources", "source_embs"))
    )
    keywords = None
    if given["keywords"] is not None:
        keywords = _embeddings(finder.matrix("keywords", given["keywords"], "keyword_embs"))
    for other in (sources, *([keywords] if keywords is not None else [])):
        if other.shape[1] != questions.shape[1]:
            raise IntegrityError(
                f"{other.role}: expected {questions.shape[1]} dimensions, as questions= has, found {other.shape[1]}; embed both "
                "with one model",
                tensor=other.role,
            )
    if len(sources) <= settings.n_neg:
        raise IncompatibleOptionsError(
            f"n_neg={settings.n_neg}: expected more sources than negatives and the positive, found {len(sources)}; pass a "
            "smaller n_neg= or more sources"
        )
    indices = tuple(
        None if given[f"{what}_ids"] is None else _indexed(finder, f"{what}_ids", given[f"{what}_ids"], rows)
        for what, rows in (("question", questions), ("source", sources))
    )
    pairs = find_pairs(given["pairs"], (len(questions), len(sources)), (indices[0], indices[1]), finder)
    _check_repeats(pairs, settings)
    return Inputs(
        questions,
        sources,
        pairs,
        keywords,
        _pair_keywords(given["pair_keywords"], keywords, len(pairs), finder),
        find_relevance(given["relevance"], len(pairs), finder),
        find_clusters(given["clusters"], len(pairs), len(sources), finder),
        find_splits(given["splits"], len(pairs), finder),
    )


def read_inputs(inputs: Inputs, block_rows: int, progress: Callable[[int], None]) -> Facts:
    """Read all embeddings once.

    Raises:
        IntegrityError: NaN, Inf or rows of zeros.
    """
    scans = {matrix.role: scan_embeddings(matrix, block_rows, progress) for matrix in inputs.embeddings}
    digests = {role: scan.digest for role, scan in scans.items()}
    small: dict[str, torch.Tensor | None] = {"pairs": inputs.pairs, "relevance": inputs.relevance}
    if isinstance(inputs.clusters, tuple):
        small[f"clusters of {inputs.clusters[0]}"] = inputs.clusters[1]
    small |= {f"splits {name}": rows for name, rows in inputs.splits.items() if isinstance(rows, torch.Tensor)}
    digests |= {role: digest_of(Matrix(role, rows)) for role, rows in small.items() if rows is not None}
    if inputs.pair_keywords is not None:
        digests["pair_keywords"] = digest_of(inputs.pair_keywords.values) + digest_of(inputs.pair_keywords.offsets)
    duplicates = {f"duplicate_{role}": scan.duplicates for role, scan in scans.items()}
    duplicates["duplicate_pairs"] = count_repeats(inputs.pairs)
    return Facts(digests, scans["questions"].row_hashes, duplicates)


def _embeddings(matrix: Matrix) -> Matrix:
    if len(matrix.shape) != 2 or not matrix.dtype.is_floating_point or 0 in matrix.shape:
        raise IntegrityError(
            f"{matrix.role}: expected embeddings, floats [rows, dimensions], found {matrix.dtype} {list(matrix.shape)}",
            tensor=matrix.role,
        )
    return matrix


def _indexed(finder: Finder, role: str, given: object, rows: Matrix) -> Any:
    index = finder.ids(role, given)
    if len(index) != len(rows):
        raise IntegrityError(
            f"{role}: expected one id for each of the {len(rows)} {rows.role}, found {len(index)}", tensor=role
        )
    return index


def _check_repeats(pairs: torch.Tensor, settings: BuildSettings) -> None:
    if settings.repeated_pairs:
        return
    repeats = count_repeats(pairs)
    if repeats:
        first, second = first_repeat(pairs)
        raise IntegrityError(
            f"pairs: expected each pair of question and source once, found pair {second} equal to pair {first}, and {repeats} "
            "such pairs in all; leave them out, or pass repeated_pairs=True",
            tensor="pairs",
        )


def _pair_keywords(given: object, keywords: Matrix | None, pairs: int, finder: Finder) -> Ragged | None:
    """Keyword rows of each pair, checked; ``None`` without any."""
    if (given is None) != (keywords is None):
        have, lack = ("keywords", "pair_keywords") if given is None else ("pair_keywords", "keywords")
        raise IncompatibleOptionsError(
            f"{have}= needs {lack}= too: keywords= are embeddings, pair_keywords= the rows of them that belong to each pair"
        )
    if given is None or keywords is None:
        return None
    found = finder.ragged("pair_keywords", given, "pair_keyword_ids")
    if len(found) != pairs:
        raise IntegrityError(
            f"pair_keywords: expected a list of keyword rows for each of the {pairs} pairs, found {len(found)} lists",
            tensor="pair_keywords",
        )
    offsets = found.offsets.part(0, pairs + 1).long()
    if int(offsets[0]) or int(offsets[-1]) != len(found.values) or bool((offsets.diff() < 0).any()):
        raise IntegrityError(
            f"pair_keywords: expected offsets that rise from 0 to the number of values, {len(found.values)}, found others",
            tensor="pair_keywords",
        )
    start = 0
    for block in found.values.blocks(1 << 20):
        wrong = ((block < 0) | (block >= len(keywords))).nonzero().view(-1)
        if block.dtype.is_floating_point or len(wrong):
            place = start + (int(wrong[0]) if len(wrong) else 0)
            pair = int(torch.searchsorted(offsets, place, right=True)) - 1
            raise IntegrityError(
                f"pair_keywords: expected rows 0 to {len(keywords) - 1} of keywords=, found {block[place - start].item()} "
                f"in pair {pair}",
                tensor="pair_keywords",
            )
        start += len(block)
    return found
