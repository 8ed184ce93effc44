"""``config.json``: what a JASPER dataset says of itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jasper_store.errors import DatasetNotFoundError, IntegrityError
from jasper_store.jasper.schema import SPLITS
from jasper_store.jasper.steering import Curriculum, parse_curriculum
from jasper_store.samples.opened import CONFIG_NAME, load_config

__all__ = ["CONFIG_NAME", "Config", "parse_config", "read_config"]


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration of a dataset, checked for itself (not yet against the tensors).

    Attributes:
        embedding_dim: columns of every embedding.
        n_neg: hard negatives per pair.
        n_clusters: number of clusters, if it is said.
        split_sizes: samples per split, where it is said.
        curriculum: probabilities of the steering variants by epoch.
        values: the file as it stands.
    """

    embedding_dim: int
    n_neg: int
    n_clusters: int | None
    split_sizes: Mapping[str, int]
    curriculum: Curriculum
    values: Mapping[str, Any]


def read_config(directory: Path) -> Config:
    """Read ``config.json`` of a dataset directory.

    Raises:
        DatasetNotFoundError: no such directory, or no ``config.json`` in it.
        CorruptFileError: the file is not JSON.
        IntegrityError: a dimension is missing or not a positive whole number.
    """
    if not directory.is_dir():
        raise DatasetNotFoundError(
            f"Dataset directory not found: {directory}. Pass the directory that holds {CONFIG_NAME} and the tensors.",
            path=directory,
        )
    path = directory / CONFIG_NAME
    if not path.is_file():
        found = ", ".join(sorted(os.listdir(directory))[:8]) or "nothing"  # noqa: PTH208 - it may have many files
        raise DatasetNotFoundError(
            f"Config file not found: {path}. A dataset needs one with at least embedding_dim and n_neg;"
            f" the directory holds {found}.",
            path=path,
        )
    return parse_config(load_config(path), path)


def parse_config(values: Mapping[str, Any], path: Path) -> Config:
    """The configuration in these values; ``path`` is the file that holds them, or will, for errors.

    Raises:
        IntegrityError: as :func:`read_config`.
    """

    def count(key: str) -> int:
        value = values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            what = "is missing" if key not in values else f"is {value!r}"
            raise IntegrityError(f"{path}: {key} should be a whole number of at least 1, but {what}", path=path)
        return value

    return Config(
        embedding_dim=count("embedding_dim"),
        n_neg=count("n_neg"),
        n_clusters=count("n_clusters") if values.get("n_clusters") is not None else None,
        split_sizes=_split_sizes(values.get("split_sizes"), path),
        curriculum=parse_curriculum(values.get("curriculum"), values.get("steering_probabilities"), str(path)),
        values=values,
    )


def _split_sizes(sizes: object, path: Path) -> dict[str, int]:
    if sizes is None:
        return {}
    if not isinstance(sizes, Mapping):
        raise IntegrityError(
            f"{path}: split_sizes should map {', '.join(SPLITS)} to numbers, found {sizes!r}", path=path
        )
    known: dict[str, Any] = {split: sizes[split] for split in SPLITS if split in sizes}
    for split, size in known.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise IntegrityError(
                f"{path}: split_sizes of {split} should be a number of samples, found {size!r}", path=path
            )
    return known
