"""Clusters, splits and relevance that the caller has already, in all forms that they may come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jasper_store.building.finder import Finder, split_column
from jasper_store.building.ids import read_strings
from jasper_store.building.rows import Matrix
from jasper_store.building.splits import DEFAULT_SHARES, check_shares
from jasper_store.errors import IncompatibleOptionsError, IntegrityError
from jasper_store.jasper.schema import SPLITS, split_tensor

__all__ = ["find_clusters", "find_relevance", "find_splits"]

_INTEGERS = frozenset({torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8})
_OWNERS = ("pairs", "sources")


def find_relevance(given: object, pairs: int, finder: Finder) -> torch.Tensor | None:
    """Relevance of each pair, float32 [P]; ``None`` if it is not given.

    Raises:
        IntegrityError: another shape or dtype, or values outside 0 to 1.
    """
    if given is None:
        return None
    matrix = finder.matrix("relevance", given, "pair_relevance")
    if tuple(matrix.shape) != (pairs,) or not matrix.dtype.is_floating_point:
        raise IntegrityError(
            f"relevance: expected floats [{pairs}], one for each pair, found {matrix.dtype} {list(matrix.shape)}",
            tensor="relevance",
        )
    values = matrix.part(0, pairs).float()
    outside = (~((values >= 0) & (values <= 1))).nonzero().view(-1)
    if len(outside):
        first = int(outside[0])
        raise IntegrityError(
            f"relevance: expected values from 0 to 1, found {float(values[first]):g} for pair {first}, and {len(outside)} such "
            "values in all; scale them",
            tensor="relevance",
        )
    return values


def find_clusters(given: object, pairs: int, sources: int, finder: Finder) -> tuple[str, torch.Tensor] | int | None:
    """Clusters that are given: of what ("pairs" or "sources") and int64 numbers; or how many; or ``None``.

    Raises:
        IntegrityError: another shape or dtype.
        IncompatibleOptionsError: it cannot be told whether they are of pairs or of sources.
    """
    if given is None or (isinstance(given, (int, np.integer)) and not isinstance(given, bool)):
        return None if given is None else int(given)
    owner = None
    if isinstance(given, Mapping):
        if len(given) != 1 or next(iter(given)) not in _OWNERS:
            raise IncompatibleOptionsError(
                f"clusters: expected one of {{'pairs': numbers}} and {{'sources': numbers}}, found the keys {list(given)}"
            )
        owner, given = next(iter(given.items()))
    matrix = finder.matrix("clusters", given, "pair_cluster_id")
    sizes = {"pairs": pairs, "sources": sources}
    fitting = [each for each in _OWNERS if tuple(matrix.shape) == (sizes[each],)]
    if matrix.dtype not in _INTEGERS or not fitting or (owner is not None and owner not in fitting):
        wanted = " or ".join(f"[{sizes[each]}], one for each of the {each}" for each in (owner and [owner]) or _OWNERS)
        raise IntegrityError(
            f"clusters: expected integers {wanted}, or how many clusters to make, found {matrix.dtype} {list(matrix.shape)}",
            tensor="clusters",
        )
    if owner is None and len(fitting) > 1:
        raise IncompatibleOptionsError(
            f"clusters: found {pairs} numbers, and there are as many pairs as sources; say of which they are, by a dictionary "
            "{'pairs': numbers} or {'sources': numbers} (on the command line by --clusters-of)"
        )
    return owner or fitting[0], matrix.part(0, len(matrix)).long()


def find_splits(given: Any, pairs: int, finder: Finder) -> dict[str, float] | dict[str, torch.Tensor]:
    """Shares of the splits, or the pairs of each of them (int64).

    Args:
        given: ``None``; shares, in order or by name; a name or number (0 train, 1 val, 2 test) for each pair; pairs by the
            name of the split; or a directory that holds ``train_idx``, ``val_idx`` and ``test_idx``.
        pairs: how many there are.
        finder: opens files.

    Raises:
        IncompatibleOptionsError: shares or names that make no sense.
        IntegrityError: another shape or dtype, a pair that does not exist, or one that is in two splits.
    """
    if given is None:
        return check_shares(DEFAULT_SHARES)
    if isinstance(given, Mapping):
        if all(isinstance(value, (int, float)) for value in given.values()):
            return check_shares(given)
        return _lists(given, pairs, finder)
    if _are_shares(given):
        return check_shares(dict(zip(SPLITS, given, strict=False)))
    if isinstance(given, (str, PathLike)) and Path(given).is_dir():
        return _lists(_in_directory(Path(given)), pairs, finder)
    return _of_pairs(_names_or_numbers(given, finder), pairs)


def _are_shares(given: object) -> bool:
    few = isinstance(given, Sequence) and not isinstance(given, str) and 2 <= len(given) <= len(SPLITS)
    return few and all(isinstance(value, float) for value in given)  # type: ignore[attr-defined]


def _in_directory(path: Path) -> dict[str, Any]:
    from jasper_store.formats.registry import locate
    from jasper_store.jasper.recognise import known_at

    there = {spec.name for spec in locate(path, "auto", known_at(path).schema).specs}
    found: dict[str, Any] = {split: (path, split_tensor(split)) for split in SPLITS if split_tensor(split) in there}
    if not found:
        raise IntegrityError(
            f"splits: expected {', '.join(map(split_tensor, SPLITS))} in {path}, found none of them", path=path
        )
    return found


def _names_or_numbers(given: Any, finder: Finder) -> torch.Tensor:
    """The number of each pair's split, int64; names become numbers."""
    names = None
    if isinstance(given, (str, PathLike)):
        path, column = split_column(str(given))
        names = read_strings("splits", path) if column is None and path.is_file() else None
    elif isinstance(given, np.ndarray) and given.dtype.kind in "UTO":
        names = given.tolist()
    elif isinstance(given, (list, tuple)) and given and isinstance(given[0], str):
        names = list(given)
    if names is None:
        matrix = finder.matrix("splits", given)
        if matrix.dtype not in _INTEGERS:
            raise _no_splits(matrix)
        return matrix.part(0, len(matrix)).long() if len(matrix.shape) else torch.empty(0)
    numbers: dict[str, int] = {name: number for number, name in enumerate(SPLITS)}
    unknown = [name for name in names if name not in numbers]
    if unknown:
        raise IncompatibleOptionsError(f"splits: expected {', '.join(SPLITS)}, found {unknown[0]!r:.60}; rename it")
    return torch.tensor([numbers[name] for name in names])


def _no_splits(matrix: Matrix) -> IntegrityError:
    return IntegrityError(
        f"splits: expected shares such as (0.8, 0.1, 0.1), or the name or number (0 train, 1 val, 2 test) of each pair's split, "
        f"found {matrix.dtype} {list(matrix.shape)}",
        tensor="splits",
    )


def _of_pairs(numbers: torch.Tensor, pairs: int) -> dict[str, torch.Tensor]:
    if tuple(numbers.shape) != (pairs,) or int(numbers.min()) < 0 or int(numbers.max()) >= len(SPLITS):
        raise IntegrityError(
            f"splits: expected {pairs} numbers, 0 for train, 1 for val or 2 for test, one for each pair, found "
            f"{list(numbers.shape)} from {int(numbers.min())} to {int(numbers.max())}",
            tensor="splits",
        )
    return {split: (numbers == number).nonzero().view(-1) for number, split in enumerate(SPLITS)}


def _lists(given: Mapping[str, Any], pairs: int, finder: Finder) -> dict[str, torch.Tensor]:
    unknown = [name for name in given if name not in SPLITS]
    if unknown:
        raise IncompatibleOptionsError(f"splits: expected {', '.join(SPLITS)}, found {unknown[0]!r:.60}; rename it")
    found: dict[str, torch.Tensor] = {}
    owner = torch.full((pairs,), -1)
    for number, split in enumerate(split for split in SPLITS if split in given):
        matrix = finder.matrix("splits", given[split], split_tensor(split))
        rows = matrix.part(0, len(matrix)).long() if len(matrix.shape) == 1 and matrix.dtype in _INTEGERS else None
        if rows is None or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < pairs):
            raise IntegrityError(
                f"splits: expected pairs of {split} as integers [n] from 0 to {pairs - 1}, found {matrix.dtype} "
                f"{list(matrix.shape)}" + ("" if rows is None else f" from {int(rows.min())} to {int(rows.max())}"),
                tensor=split_tensor(split),
            )
        if bool((owner[rows] >= 0).any()) or len(torch.unique(rows)) != len(rows):
            raise IntegrityError(
                f"splits: expected each pair in one split, once, found pairs of {split} again; take them out",
                tensor=split_tensor(split),
            )
        owner[rows] = number
        found[split] = rows
    return found
