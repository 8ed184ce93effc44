"""Checks of a JASPER dataset's headers: tensors, shapes and dtypes have to agree with each other.

Reads no data. Which values have to be rows of what follows from the declaration (:mod:`jasper_store.samples.graph`),
but for the tensors that no sample reads: :func:`unread_bounds`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from jasper_store.errors import DatasetNotFoundError, IntegrityError
from jasper_store.jasper.config import Config
from jasper_store.jasper.schema import PAIR_KEYWORDS, SPLITS, TENSORS, Split, TensorRule, split_tensor
from jasper_store.samples.graph import Bound

__all__ = ["check_structure", "require_structure", "unread_bounds"]

_INTEGERS = frozenset({torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8})


class _Described(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


def check_structure(
    tensors: Mapping[str, _Described], config: Config, splits: Iterable[Split], where: Path
) -> Mapping[str, int]:
    """Check that every tensor is there and that shapes and dtypes agree with each other and the configuration.

    Splits that are not asked for, and tensors that no sample reads, may be missing.

    Args:
        tensors: what the headers say, by stored name; or an open store.
        config: the configuration.
        splits: the splits that will be served.
        where: the dataset's directory, for errors.

    Returns:
        Sizes by symbol: ``"pairs"``, ``"questions"``, ``"sources"``, ``"keywords"``, ``"clusters"``, and each split.

    Raises:
        DatasetNotFoundError: tensors are missing; the message names all of them.
        IntegrityError: a shape or dtype is wrong; the message names the tensor, what it is and what it should be.
    """
    wanted = set(splits)
    lists = {split_tensor(split) for split in SPLITS if split not in wanted}
    there = [name for name in TENSORS if _is_there(tensors, name)]
    _require_all([name for name in TENSORS if name not in there and name not in lists], tensors, where)
    sizes: dict[str, int] = {"D": config.embedding_dim, "n_neg": config.n_neg}
    origin = {"D": "embedding_dim in the configuration", "n_neg": "n_neg in the configuration"}
    # The tensor that defines a count comes before those that must agree with it.
    for name in sorted(there, key=lambda name: name != "pair_index"):
        rule = TENSORS[name]
        if name == PAIR_KEYWORDS:
            _match_shape(name, (_ragged_rows(tensors),), rule, sizes, origin)
            continue
        _match_dtype(name, tensors[name], rule)
        _match_shape(name, tensors[name].shape, rule, sizes, origin)
    _match_config(sizes, config, wanted)
    return sizes


def require_structure(tensors: Mapping[str, _Described], config: Config, where: Path) -> tuple[Split, ...]:
    """:func:`check_structure` of the splits that are there.

    Returns:
        Those splits.

    Raises:
        DatasetNotFoundError, IntegrityError: as :func:`check_structure`; also that there is no split at all.
    """
    there = tuple(split for split in SPLITS if split_tensor(split) in tensors)
    check_structure(tensors, config, there, where)
    if not there:
        wanted = ", ".join(split_tensor(split) for split in SPLITS)
        raise DatasetNotFoundError(f"{where}: no split to serve; expected at least one of {wanted}", path=where)
    return there


def unread_bounds(tensors: Mapping[str, _Described]) -> Iterator[Bound]:
    """Index bounds of tensors that no sample reads, or whose values no sample follows."""
    for name, rule in TENSORS.items():
        stored = f"{name}.values" if name == PAIR_KEYWORDS else name
        if rule.refers_to is not None and stored in tensors and rule.refers_to in tensors:
            yield Bound(stored, None, rule.refers_to, tensors[rule.refers_to].shape[0])


def _is_there(tensors: Mapping[str, _Described], name: str) -> bool:
    return name in tensors or (name == PAIR_KEYWORDS and f"{name}.offsets" in tensors and f"{name}.values" in tensors)


def _require_all(missing: list[str], tensors: Mapping[str, _Described], where: Path) -> None:
    missing = [name for name in missing if not TENSORS[name].optional]
    if not missing:
        return
    hint = ""
    if any(name.endswith("_idx") for name in missing):
        splits = [split for split in SPLITS if split_tensor(split) in tensors]
        hint = f" Splits found: {', '.join(splits) or 'none'}."
    several = len(missing) > 1
    raise DatasetNotFoundError(
        f"{', '.join(missing)} {'are' if several else 'is'} missing: no such tensor{'s' if several else ''} in {where}.{hint}"
        f" Write {'them' if several else 'it'}, convert the dataset (jasper-store convert), or open another format of it.",
        path=where,
        tensor=missing[0],
    )


def _ragged_rows(tensors: Mapping[str, _Described]) -> int:
    name = PAIR_KEYWORDS
    if name in tensors:
        raise IntegrityError(
            f"{name} should be ragged, a list of keyword rows for each pair, found one tensor", tensor=name
        )
    offsets, values = tensors[f"{name}.offsets"], tensors[f"{name}.values"]
    if len(offsets.shape) != 1 or len(values.shape) != 1 or offsets.shape[0] < 1:
        raise IntegrityError(
            f"{name}: expected values [n] and offsets [pairs + 1], found {list(values.shape)} and {list(offsets.shape)};"
            " convert the dataset again",
            tensor=name,
        )
    return offsets.shape[0] - 1


def _match_dtype(name: str, tensor: _Described, rule: TensorRule) -> None:
    fits = tensor.dtype in _INTEGERS if rule.kind == "int" else tensor.dtype.is_floating_point
    if not fits:
        expected = "an integer dtype (int64)" if rule.kind == "int" else "a floating dtype (float32)"
        raise IntegrityError(f"{name} should have {expected}, found {tensor.dtype}; write it anew", tensor=name)


def _match_shape(
    name: str, shape: tuple[int, ...], rule: TensorRule, sizes: dict[str, int], origin: dict[str, str]
) -> None:
    if len(shape) != len(rule.shape):
        expected = ", ".join(str(size) for size in rule.shape)
        raise IntegrityError(f"{name} should have shape [{expected}], found {list(shape)}", tensor=name)
    for axis, (found, symbol) in enumerate(zip(shape, rule.shape, strict=True)):
        expected_size = symbol if isinstance(symbol, int) else sizes.setdefault(symbol, found)
        source = origin.setdefault(symbol, name) if isinstance(symbol, str) else "the layout"
        if found != expected_size:
            what = "entries" if axis == 0 else "columns"
            raise IntegrityError(
                f"{name} has {found} {what}, expected {expected_size} as in {source}"
                f" (shape {list(shape)}, expected [{', '.join(map(str, rule.shape))}])",
                tensor=name,
            )


def _match_config(sizes: Mapping[str, int], config: Config, wanted: set[Split]) -> None:
    if config.n_clusters is not None and sizes.get("clusters", config.n_clusters) != config.n_clusters:
        raise IntegrityError(
            f"centroid_embs has {sizes['clusters']} entries, expected {config.n_clusters} as n_clusters in the"
            " configuration says; correct whichever is wrong",
            tensor="centroid_embs",
        )
    for split in wanted:
        said = config.split_sizes.get(split)
        if said is not None and sizes[split] != said:
            raise IntegrityError(
                f"{split_tensor(split)} has {sizes[split]} entries, expected {said} as split_sizes in the"
                " configuration says; correct whichever is wrong",
                tensor=split_tensor(split),
            )
