"""The tensors of a JASPER dataset: names, shapes, HDF5 paths, and what a sample reads of them.

This table and the modules beside it are the only places that know a JASPER name; the engine receives
:data:`SCHEMA` and :func:`declaration_for`, and knows no more than these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

import torch

from jasper_store.errors import DeclarationError, UnknownNameError
from jasper_store.formats.base import Schema
from jasper_store.jasper.steering import Curriculum
from jasper_store.samples.declaration import CONFIG_KEY, Choice, Declaration, Field, Variant

__all__ = [
    "NOUNS",
    "PAIR_KEYWORDS",
    "SCHEMA",
    "SPLITS",
    "STEERING_TENSORS",
    "TENSORS",
    "Split",
    "TensorRule",
    "check_split",
    "declaration_for",
    "packed_declaration",
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
        refers_to: the tensor whose rows the values name, for tensors that no sample reads.
        optional: a dataset may lack it, because no sample reads it.
    """

    shape: tuple[str | int, ...]
    kind: Literal["float", "int"]
    hdf5_path: str
    refers_to: str | None = None
    optional: bool = False


TENSORS: Final[Mapping[str, TensorRule]] = MappingProxyType(
    {
        "question_embs": TensorRule(("questions", "D"), "float", "embeddings/questions"),
        "source_embs": TensorRule(("sources", "D"), "float", "embeddings/sources"),
        "keyword_embs": TensorRule(("keywords", "D"), "float", "embeddings/keywords", optional=True),
        "centroid_embs": TensorRule(("clusters", "D"), "float", "embeddings/centroids", optional=True),
        "pair_index": TensorRule(("pairs", 2), "int", "pair_data/index"),
        "pair_cluster_id": TensorRule(("pairs",), "int", "pair_data/cluster_id", refers_to="centroid_embs"),
        "pair_relevance": TensorRule(("pairs",), "float", "pair_data/relevance"),
        PAIR_KEYWORDS: TensorRule(("pairs",), "int", "pair_data/keyword_ids", refers_to="keyword_embs", optional=True),
        "hard_negatives": TensorRule(("pairs", "n_neg"), "int", "negatives/hard"),
        "negative_tiers": TensorRule(("pairs", "n_neg"), "int", "negatives/tiers"),
        "steering_centroid": TensorRule(("pairs", "D"), "float", "steering/centroid"),
        "steering_keyword_weighted": TensorRule(("pairs", "D"), "float", "steering/keyword_weighted"),
        "steering_residual": TensorRule(("pairs", "D"), "float", "steering/residual"),
        "centroid_distances": TensorRule(("pairs",), "float", "steering/distances"),
        "train_idx": TensorRule(("train",), "int", "splits/train"),
        "val_idx": TensorRule(("val",), "int", "splits/val"),
        "test_idx": TensorRule(("test",), "int", "splits/test"),
    }
)

_ALIASES: Final = MappingProxyType({"negatives/hardnegatives": "hard_negatives"})
"""HDF5 paths that other builders use."""


def split_tensor(split: Split) -> str:
    """Name of the tensor that lists the pair rows of a split."""
    return f"{split}_idx"


def check_split(split: str | None) -> Split:
    """Check the name of a split.

    Raises:
        UnknownNameError: there is no such split; the message lists the splits.
    """
    for known in SPLITS:
        if split == known:
            return known
    raise UnknownNameError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")


def declaration_for(curriculum: Curriculum) -> Declaration:
    """What a sample of a JASPER dataset reads; the keys of a batch in their order."""
    ids = torch.int64
    return Declaration.parse(
        {
            "question_emb": "question_embs[pair_index[row, 0]]",
            "target_source_emb": "source_embs[pair_index[row, 1]]",
            "steering": Choice(STEERING_TENSORS, curriculum.probabilities, typical=curriculum.typical()),
            "negative_embs": "source_embs[hard_negatives[row]]",
            "cluster_id": Field.parse("pair_cluster_id[row]", "cluster_id", ids),
            "relevance": "pair_relevance[row]",
            "centroid_distance": "centroid_distances[row]",
            "steering_variant": Variant("steering"),
            "negative_tiers": Field.parse("negative_tiers[row]", "negative_tiers", ids),
        },
        {split: split_tensor(split) for split in SPLITS},
    )


def packed_declaration(curriculum: Curriculum, values: Mapping[str, object], path: Path) -> Declaration:
    """What a sample of a packed JASPER dataset reads: what its configuration declares, drawn by the curriculum.

    Args:
        curriculum: of the configuration.
        values: the configuration.
        path: its file, for errors.

    Raises:
        DeclarationError: what it declares cannot be understood, or is missing.
    """
    found = Declaration.from_config(values, path)
    if found is None:
        raise DeclarationError(
            f'{path}: expected "{CONFIG_KEY}" of a packed dataset, found none; pack again', path=path
        )
    fields = {
        name: replace(value, probabilities=curriculum.probabilities, typical=curriculum.typical())
        if isinstance(value, Choice)
        else value
        for name, value in found.fields.items()
    }
    return Declaration.parse(fields, found.splits)


# Plain dictionaries: a schema travels to spawned workers, and a mapping proxy does not pickle.
SCHEMA: Final = Schema(
    required=frozenset(name for name, rule in TENSORS.items() if not rule.optional),
    optional=frozenset(name for name, rule in TENSORS.items() if rule.optional),
    hdf5_paths={name: rule.hdf5_path for name, rule in TENSORS.items()},
    hdf5_aliases=dict(_ALIASES),
)
"""What the storage layers know of the names of a JASPER dataset."""

NOUNS: Final = MappingProxyType(
    {
        "question_embs": ("question", "questions"),
        "source_embs": ("source", "sources"),
        "keyword_embs": ("keyword", "keywords"),
        "centroid_embs": ("cluster", "clusters"),
        **{name: ("pair", "pairs") for name, rule in TENSORS.items() if rule.shape[0] == "pairs"},
    }
)
"""What a row of each tensor is called, singular and plural."""
