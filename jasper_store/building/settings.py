"""What decides a built dataset besides its inputs, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from jasper_store.building.steering import KeywordWeights
from jasper_store.errors import IncompatibleOptionsError, UnknownNameError
from jasper_store.formats.registry import writable
from jasper_store.store.guard import check_int

__all__ = ["BuildSettings"]


@dataclass(frozen=True)
class BuildSettings:
    """Options of ``build``.

    Attributes:
        n_neg: hard negatives for each pair.
        format: storage format.
        compression: HDF5 only.
        seed: of k-means, of the splits and of random negatives.
        keyword_weights: ``"equal"``, or ``"softmax"`` of the keywords' cosines with the question.
        normalize_residual: make ``steering_residual`` of length 1.
        shared_questions: allow a question, or a duplicate of one, in two splits.
        repeated_pairs: allow a pair that is there twice.
        keep_similarities: keep the cosines that mining computed as tensors.
        mining: more settings of the miner, by name.

    Raises:
        IncompatibleOptionsError, UnknownNameError: options that make no sense.
    """

    n_neg: int = 5
    format: str = "safetensors"
    compression: str | None = None
    seed: int = 42
    keyword_weights: KeywordWeights = "equal"
    normalize_residual: bool = False
    shared_questions: bool = False
    repeated_pairs: bool = False
    keep_similarities: bool = False
    mining: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_int("n_neg", self.n_neg, at_least=1)
        check_int("seed", self.seed, at_least=0)
        writable(self.format)
        if self.keyword_weights not in get_args(KeywordWeights):
            raise UnknownNameError(
                f"keyword_weights={self.keyword_weights!r}: expected one of {', '.join(get_args(KeywordWeights))}"
            )
        twice = {"n_neg", "seed"} & self.mining.keys()
        if twice:
            raise IncompatibleOptionsError(f"mining: {min(twice)} is an option of build itself; pass it there")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``config.json`` has them."""
        return {**asdict(self), "mining": dict(self.mining)}
