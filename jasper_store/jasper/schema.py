"""The tensors of a JASPER dataset: names, shapes, HDF5 paths and how often training reads them.

This table and the modules beside it are the only places that know a JASPER name; the storage layers are handed
:data:`SCHEMA` and see nothing but names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

from jasper_store.errors import UnknownNameError
from jasper_store.formats.base import Schema

__all__ = [
    "PAIR_KEYWORDS",
    "SCHEMA",
    "SPLITS",
    "STEERING_TENSORS",
    "TENSORS",
    "Split",
    "TensorRule",
    "check_split",
    "schema_for",
    "split_tensor",
]

Split: TypeAlias = Literal["train", "val", "test"]
SPLITS: Final[tuple[Split, ...]] = ("train", "val", "test")

PAIR_KEYWORDS: Final = "pair_keyword_ids"
"""The only ragged tensor: a list of keyword rows per pair."""

STEERING_TENSORS: Final = ("steering_centroid", "steering_keyword_weighted", "steering_residual")
"""Steering tensors in the order of their variant numbers 1, 2, 3."""


@dataclass(frozen=True, slots=True)
class TensorRule:
    """What a tensor of a JASPER dataset must look like.

    Attributes:
        shape: symbolic sizes: ``"D"`` is ``embedding_dim``, ``"n_neg"`` the negatives per pair, a number is itself,
            and any other symbol (``"pairs"``, ``"questions"``, ...) is one count shared by all tensors that name it.
        kind: ``"float"`` (any floating dtype) or ``"int"`` (any integer dtype).
        hdf5_path: path in ``dataset.h5``.
        reads: rows read per training sample; ``"1 + n_neg"`` is worked out from the configuration, and the
            steering tensors are read as often as their variant is drawn.
        refers_to: the symbol that the values are rows of, for index tensors.
    """

    shape: tuple[str | int, ...]
    kind: Literal["float", "int"]
    hdf5_path: str
    reads: float | str
    refers_to: str | None = None


TENSORS: Final[Mapping[str, TensorRule]] = MappingProxyType(
    {
        "question_embs": TensorRule(("questions", "D"), "float", "embeddings/questions", 1.0),
        "source_embs": TensorRule(("sources", "D"), "float", "embeddings/sources", "1 + n_neg"),
        "keyword_embs": TensorRule(("keywords", "D"), "float", "embeddings/keywords", 0.0),
        "centroid_embs": TensorRule(("clusters", "D"), "float", "embeddings/centroids", 0.0),
        "pair_index": TensorRule(("pairs", 2), "int", "pair_data/index", 1.0),
        "pair_cluster_id": TensorRule(("pairs",), "int", "pair_data/cluster_id", 1.0, "clusters"),
        "pair_relevance": TensorRule(("pairs",), "float", "pair_data/relevance", 1.0),
        PAIR_KEYWORDS: TensorRule(("pairs",), "int", "pair_data/keyword_ids", 0.0, "keywords"),
        "hard_negatives": TensorRule(("pairs", "n_neg"), "int", "negatives/hard", 1.0, "sources"),
        "negative_tiers": TensorRule(("pairs", "n_neg"), "int", "negatives/tiers", 1.0),
        "steering_centroid": TensorRule(("pairs", "D"), "float", "steering/centroid", "probability"),
        "steering_keyword_weighted": TensorRule(("pairs", "D"), "float", "steering/keyword_weighted", "probability"),
        "steering_residual": TensorRule(("pairs", "D"), "float", "steering/residual", "probability"),
        "centroid_distances": TensorRule(("pairs",), "float", "steering/distances", 1.0),
        "train_idx": TensorRule(("train",), "int", "splits/train", 1.0, "pairs"),
        "val_idx": TensorRule(("val",), "int", "splits/val", 1.0, "pairs"),
        "test_idx": TensorRule(("test",), "int", "splits/test", 1.0, "pairs"),
    }
)

_SELDOM: Final = 0.01
"""Reads per sample of a variant that the curriculum never draws; ``force_steering`` may still ask for it."""

_ALIASES: Final = MappingProxyType({"negatives/hardnegatives": "hard_negatives"})
"""HDF5 paths that other builders use."""


def split_tensor(split: Split) -> str:
    """Name of the tensor that lists the pair rows of a split."""
    return f"{split}_idx"


def check_split(split: str) -> Split:
    """The split, if it is one.

    Raises:
        UnknownNameError: it is not; the message lists those that are.
    """
    for known in SPLITS:
        if split == known:
            return known
    raise UnknownNameError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")


def schema_for(n_neg: int | None = None, steering: tuple[float, float, float] = (0.3, 0.25, 0.15)) -> Schema:
    """The schema that is handed to the storage layers.

    Args:
        n_neg: negatives per pair, from the configuration; 5 is assumed where it is not known.
        steering: expected share of samples that draw centroid, keyword_weighted and residual steering; the default
            is the middle stage of the default curriculum, so that a plan does not change from epoch to epoch.
    """
    shares = dict(zip(STEERING_TENSORS, steering, strict=True))
    worked_out = {"1 + n_neg": 1.0 + (5 if n_neg is None else n_neg)}
    reads: dict[str, float] = {}
    for name, rule in TENSORS.items():
        if rule.reads == "probability":
            reads[name] = max(shares[name], _SELDOM)
        else:
            reads[name] = worked_out[rule.reads] if isinstance(rule.reads, str) else rule.reads
    # Plain dictionaries: a schema travels to spawned workers, and a mapping proxy does not pickle.
    return Schema(
        required=frozenset(TENSORS),
        hdf5_paths={name: rule.hdf5_path for name, rule in TENSORS.items()},
        hdf5_aliases=dict(_ALIASES),
        reads_per_sample=reads,
        stacks=(STEERING_TENSORS,),
    )


SCHEMA: Final = schema_for()
"""The schema of a JASPER dataset whose configuration has not been read."""
