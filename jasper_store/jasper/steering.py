"""Which steering a sample gets: the names of the variants, and how likely each is in which epoch (the curriculum).

Which variant a pair draws is :func:`jasper_store.samples.draw.draw_variants`, a hash of (seed, epoch, pair).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

from jasper_store.errors import IntegrityError, UnknownNameError
from jasper_store.samples.draw import draw_variants

__all__ = [
    "VARIANTS",
    "Curriculum",
    "LinearCurriculum",
    "Probabilities",
    "StagedCurriculum",
    "default_curriculum",
    "draw_variants",
    "parse_curriculum",
    "variant_number",
]

VARIANTS: Final = ("none", "centroid", "keyword_weighted", "residual")
"""Names of the steering variants; the position is the number that a batch carries."""

_ALIASES: Final = {"zero": "none", "keyword": "keyword_weighted"}
"""Names that other builders use."""

Probabilities: TypeAlias = tuple[float, float, float, float]
"""Probability of each of :data:`VARIANTS`; they add up to 1."""

_TOLERANCE: Final = 1e-6


def variant_number(name: str) -> int:
    """Number of a steering variant, by its name or a known alias ("zero", "keyword").

    Raises:
        UnknownNameError: no such variant; the message lists the names.
    """
    try:
        return VARIANTS.index(_ALIASES.get(name, name))
    except ValueError:
        raise UnknownNameError(
            f"unknown steering variant {name!r}; expected one of {', '.join(VARIANTS)}"
            f" (also {', '.join(f'{alias!r} for {name!r}' for alias, name in _ALIASES.items())}), or None"
        ) from None


class Curriculum(Protocol):
    """How likely each variant is, as a pure function of the epoch."""

    def probabilities(self, epoch: int) -> Probabilities:
        """Probabilities in the order of :data:`VARIANTS` at an epoch, counted from 0."""

    def typical(self) -> Probabilities:
        """Probabilities at the middle of training, for planning what to preload."""


@dataclass(frozen=True, slots=True)
class StagedCurriculum:
    """Probabilities that change in steps.

    Attributes:
        stages: (first epoch, probabilities), ascending, the first starting at epoch 0.
    """

    stages: tuple[tuple[int, Probabilities], ...]

    def probabilities(self, epoch: int) -> Probabilities:
        """The probabilities of the last stage that has begun."""
        return [probs for first, probs in self.stages if first <= max(epoch, 0)][-1]

    def typical(self) -> Probabilities:
        """The middle stage."""
        return self.stages[len(self.stages) // 2][1]


@dataclass(frozen=True, slots=True)
class LinearCurriculum:
    """The probability of no steering moves linearly; the rest is shared in a fixed ratio.

    Attributes:
        start: probability of no steering at epoch 0.
        end: the same from ``epochs`` on.
        epochs: number of epochs over which it moves.
        shares: shares of centroid, keyword_weighted and residual in the rest; they add up to 1.
    """

    start: float
    end: float
    epochs: int
    shares: tuple[float, float, float]

    def probabilities(self, epoch: int) -> Probabilities:
        """``start + (end - start) * min(epoch / epochs, 1)`` for no steering, the rest shared."""
        progress = min(max(epoch, 0) / max(self.epochs, 1), 1.0)
        none = self.start + (self.end - self.start) * progress
        centroid, keyword, residual = (share * (1.0 - none) for share in self.shares)
        return none, centroid, keyword, residual

    def typical(self) -> Probabilities:
        """Half-way."""
        return self.probabilities(self.epochs // 2)


def default_curriculum() -> StagedCurriculum:
    """The curriculum of a dataset whose configuration has none: no steering first, ever more of it later."""
    return StagedCurriculum(
        (
            (0, (0.7, 0.2, 0.1, 0.0)),
            (10, (0.5, 0.3, 0.15, 0.05)),
            (20, (0.3, 0.3, 0.25, 0.15)),
            (30, (0.1, 0.3, 0.35, 0.25)),
            (40, (0.0, 0.2, 0.4, 0.4)),
        )
    )


def parse_curriculum(curriculum: object, probabilities: object, where: str) -> Curriculum:
    """The curriculum that a configuration asks for.

    Args:
        curriculum: the value of ``"curriculum"``: ``None`` or
            ``{"zero_prob_start", "zero_prob_end", "epochs_total"}``.
        probabilities: the value of ``"steering_probabilities"``: ``None``, a mapping of variant names (aliases
            allowed, missing ones 0) or a list in the order of :data:`VARIANTS`.
        where: file named in errors.

    Returns:
        Linear when a curriculum is given, fixed when only probabilities are, else the default.

    Raises:
        IntegrityError: values of the wrong type, outside 0..1, or that do not add up to 1.
        UnknownNameError: a variant name that does not exist.
    """
    fixed = None if probabilities is None else _parse_probabilities(probabilities, where)
    if not curriculum:
        return default_curriculum() if fixed is None else StagedCurriculum(((0, fixed),))
    if not isinstance(curriculum, Mapping):
        raise IntegrityError(f"{where}: curriculum should be an object, found {type(curriculum).__name__}", path=where)
    start = _number(curriculum, "zero_prob_start", 0.5, where)
    end = _number(curriculum, "zero_prob_end", 0.1, where)
    epochs = _number(curriculum, "epochs_total", 100, where, limit=None)
    return LinearCurriculum(start, end, int(epochs), _shares(fixed))


def _shares(fixed: Probabilities | None) -> tuple[float, float, float]:
    if fixed is None:
        return 1 / 3, 1 / 3, 1 / 3
    rest = sum(fixed[1:])
    if rest <= 0:
        return 1.0, 0.0, 0.0
    return fixed[1] / rest, fixed[2] / rest, fixed[3] / rest


def _number(source: Mapping[str, Any], key: str, default: float, where: str, limit: float | None = 1.0) -> float:
    value = source.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise IntegrityError(f"{where}: {key} should be a number of at least 0, found {value!r}", path=where)
    if limit is not None and value > limit:
        raise IntegrityError(f"{where}: {key} should be at most {limit:g}, found {value!r}", path=where)
    return float(value)


def _parse_probabilities(value: object, where: str) -> Probabilities:
    probs = [0.0, 0.0, 0.0, 0.0]
    if isinstance(value, Mapping):
        for name in value:
            probs[variant_number(str(name))] = _number(value, name, 0.0, where)
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) == len(VARIANTS):
        by_name = dict(zip(VARIANTS, value, strict=True))
        probs = [_number(by_name, name, 0.0, where) for name in VARIANTS]
    else:
        raise IntegrityError(
            f"{where}: steering_probabilities should map {', '.join(VARIANTS)} to probabilities,"
            f" or list four of them, found {value!r}",
            path=where,
        )
    if abs(sum(probs) - 1.0) > _TOLERANCE:
        raise IntegrityError(f"{where}: steering_probabilities should add up to 1, found {sum(probs):g}", path=where)
    return probs[0], probs[1], probs[2], probs[3]
