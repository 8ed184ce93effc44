"""Which question belongs to which source: row numbers, or ids, as rows [P, 2]."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jasper_store.building.finder import Finder
from jasper_store.building.ids import ListedIds
from jasper_store.building.rows import Matrix
from jasper_store.errors import CorruptFileError, IncompatibleOptionsError, IntegrityError
from jasper_store.store.ids import Ids

__all__ = ["count_repeats", "find_pairs", "first_repeat"]

_INTEGERS = frozenset({torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8})
_COLUMNS = ("question", "source")

_Index = Ids | ListedIds


def find_pairs(
    given: object, sizes: tuple[int, int], indices: tuple[_Index | None, _Index | None], finder: Finder
) -> torch.Tensor:
    """Rows of question and source of each pair.

    Args:
        given: row numbers [P, 2]; or two columns, at least one of ids; or a file of either (``.tsv``: ids).
        sizes: how many questions and sources there are.
        indices: the ids of both, where they are known.
        finder: opens files.

    Returns:
        int64 [P, 2], owned, within the sizes.

    Raises:
        IntegrityError: another shape or dtype, no pair, or a row that does not exist.
        UnknownNameError: an id that does not exist.
        IncompatibleOptionsError: ids in pairs, and none of the rows.
    """
    columns = _columns(given)
    if columns is None:
        pairs = _numbers(finder.matrix("pairs", given, "pair_index"))
    else:
        both = [_rows(*column) for column in zip(columns, indices, _COLUMNS, strict=True)]
        if len(both[0]) != len(both[1]):
            raise IntegrityError(
                f"pairs: expected two columns of one length, found {len(both[0])} questions and {len(both[1])} sources",
                tensor="pairs",
            )
        pairs = torch.stack(both, dim=1)
    if not len(pairs):
        raise IntegrityError("pairs: expected at least one pair, found none", tensor="pairs")
    for column, (what, size) in enumerate(zip(_COLUMNS, sizes, strict=True)):
        _require_rows(pairs[:, column], what, size)
    return pairs


def count_repeats(pairs: torch.Tensor) -> int:
    """How many pairs repeat an earlier one.

    Returns:
        Pairs minus distinct pairs.
    """
    return len(pairs) - len(torch.unique(_keys(pairs)))


def first_repeat(pairs: torch.Tensor) -> tuple[int, int]:
    """The first two pairs that are equal, of pairs of which some are."""
    order = torch.argsort(_keys(pairs), stable=True)
    sorted_keys = _keys(pairs)[order]
    same = (sorted_keys[1:] == sorted_keys[:-1]).nonzero().view(-1)
    second = int(order[same + 1].min())
    first = int((_keys(pairs) == _keys(pairs)[second]).nonzero()[0])
    return first, second


def _keys(pairs: torch.Tensor) -> torch.Tensor:
    """One number for each pair; equal pairs have equal ones."""
    return pairs[:, 0] * (int(pairs[:, 1].max()) + 1) + pairs[:, 1]


def _columns(given: object) -> tuple[Any, Any] | None:
    """Both columns, where ids are among them; ``None`` where all is row numbers."""
    if isinstance(given, (str, PathLike)) and str(given).endswith(".tsv"):
        return _read_tsv(Path(given))
    if isinstance(given, np.ndarray) and given.dtype.kind in "UTO" and given.ndim == 2 and given.shape[1] == 2:
        return given[:, 0].tolist(), given[:, 1].tolist()
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) == 0:
        return None
    if len(given) == 2 and any(_is_ids(column) for column in given):
        return given[0], given[1]
    if _is_ids(given[0]):
        raise IntegrityError(
            f"pairs: expected two columns, ([question ids], [source ids]), found {len(given)} rows of ids; "
            "pass them as columns, tuple(zip(*pairs))",
            tensor="pairs",
        )
    return None


def _is_ids(column: object) -> bool:
    if isinstance(column, np.ndarray):
        return column.dtype.kind in "UT"
    return isinstance(column, (list, tuple)) and len(column) > 0 and isinstance(column[0], str)


def _read_tsv(path: Path) -> tuple[list[str], list[str]]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except UnicodeDecodeError as exc:
        raise CorruptFileError(f"pairs: {path} is no UTF-8 ({exc}); save it as UTF-8", path=path) from exc
    rows = [line.split("\t") for line in lines]
    for number, row in enumerate(rows):
        if len(row) != 2:
            raise IntegrityError(
                f"pairs: expected a question id, a tab and a source id on each line of {path}, found {lines[number]!r:.60} "
                f"(pair {number})",
                path=path,
                tensor="pairs",
            )
    return [row[0] for row in rows], [row[1] for row in rows]


def _rows(column: Any, index: _Index | None, what: str) -> torch.Tensor:
    if not _is_ids(column):
        return _integers(Matrix("pairs", np.asarray(column)), 1).part(0, len(column)).long()
    if index is None:
        raise IncompatibleOptionsError(
            f"pairs: found {what} ids such as {column[0]!r:.60}, and no ids to look them up in; pass {what}_ids=, one id for "
            f"each row of {what}s"
        )
    return index.rows([str(text) for text in column])


def _numbers(matrix: Matrix) -> torch.Tensor:
    return torch.cat([block.long() for block in _integers(matrix, 2).blocks(1 << 16)] or [torch.empty(0, 2).long()])


def _integers(matrix: Matrix, ndim: int) -> Matrix:
    """Refuse row numbers of another shape or dtype."""
    fits = len(matrix.shape) == ndim and (ndim == 1 or matrix.shape[1] == 2)
    if not fits or matrix.dtype not in _INTEGERS:
        raise IntegrityError(
            f"pairs: expected row numbers, integers [pairs, 2] of question and source, found {matrix.dtype} "
            f"{list(matrix.shape)}; pass np.stack([question_rows, source_rows], axis=1)",
            tensor="pairs",
        )
    return matrix


def _require_rows(rows: torch.Tensor, what: str, size: int) -> None:
    wrong = ((rows < 0) | (rows >= size)).nonzero().view(-1)
    if len(wrong):
        place = int(wrong[0])
        raise IntegrityError(
            f"pairs: expected {what} rows 0 to {size - 1}, as {what}s= has, found {int(rows[place])} in pair {place}, and "
            f"{len(wrong)} such pairs in all; correct them, or leave these pairs out",
            tensor="pairs",
        )
