"""Sources that nearly are a positive of the question, by their cosine with it."""

from __future__ import annotations

import numpy as np

from jasper_store.building.problem import Problem

__all__ = ["are_near_duplicates"]

_AT_ONCE = 1 << 20
_SLACK = 1e-4
"""Cosines near 1 are rounded to 6e-8, which is an angle of 3e-4: that much times the sine of 0.999 is below this."""


def are_near_duplicates(
    problem: Problem, pairs: np.ndarray, sources: np.ndarray, similarities: np.ndarray
) -> np.ndarray:
    """Whether a source has a cosine of at least ``duplicate_similarity`` with a positive of the pair's question.

    Args:
        problem: what is mined.
        pairs: pairs [n].
        sources: a source row for each [n].
        similarities: cosine of each with the question of the pair [n].

    Returns:
        bool [n].
    """
    found = np.zeros(len(pairs), bool)
    threshold = problem.settings.duplicate_similarity
    if threshold is None:
        return found
    questions = problem.pair_question[pairs]
    step = max(_AT_ONCE // max(problem.most_positives, 1), 1)
    for start in range(0, len(pairs), step):
        some = slice(start, start + step)
        which, positives = problem.pairs_of(questions[some])
        mine, theirs = similarities[some][which].astype(np.float64), problem.positive_similarities[positives]
        close = _may_reach(mine, theirs.astype(np.float64), threshold)
        which, positives = which[close], positives[close]
        exact = problem.source_similarities(sources[some][which], problem.pair_source[positives])
        found[start + which[exact.astype(np.float64) >= threshold]] = True
    return found


def _may_reach(mine: np.ndarray, theirs: np.ndarray, threshold: float) -> np.ndarray:
    """Whether two rows of these cosines with a third may have a cosine of ``threshold`` with each other.

    The angle between them is at least the difference of their angles to the third.
    """
    mine, theirs = np.clip(mine, -1, 1), np.clip(theirs, -1, 1)
    highest = mine * theirs + np.sqrt((1 - mine**2) * (1 - theirs**2))
    return np.asarray(highest >= threshold - _SLACK)
