"""Converts what callers pass to a writer to tensors; an error names the tensor and the row."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jasper_store.errors import IncompatibleOptionsError, IntegrityError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["are_strings", "as_block", "as_json", "flatten"]


def are_strings(rows: object) -> bool:
    """Whether rows are strings: a list or tuple that begins with one, or an array of them."""
    if isinstance(rows, np.ndarray):
        first = rows.flat[0] if rows.dtype.kind in "OT" and rows.size else None
        return rows.dtype.kind == "U" or isinstance(first, str)
    return isinstance(rows, list | tuple) and bool(rows) and isinstance(rows[0], str)


def as_block(name: str, rows: torch.Tensor | NDArray[Any] | Sequence[Any] | float) -> torch.Tensor:
    """A block of rows as a tensor; shares memory where it can.

    Raises:
        IntegrityError: the rows do not make a tensor.
    """
    if isinstance(rows, torch.Tensor):
        return rows
    try:
        if isinstance(rows, np.ndarray):
            # Read-only arrays, and those that run backwards, cannot be shared with torch; the copy lives one block.
            shared = rows.flags.writeable and all(step >= 0 for step in rows.strides)
            return torch.from_numpy(rows if shared else np.array(rows))
        return torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError) as exc:
        msg = f"{name!r}: expected rows that make a tensor, found {type(rows).__name__} that does not ({exc})"
        raise IntegrityError(msg, tensor=name) from exc


def flatten(name: str, rows: Sequence[Sequence[int] | torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (int64) and lengths (int64 [rows]) of ragged rows.

    Raises:
        IntegrityError: a row that is not a list of ints; names its position in ``rows``.
    """
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    if any(isinstance(row, torch.Tensor | np.ndarray) for row in rows):
        parts = [_ints(name, i, row) for i, row in enumerate(rows)]
        return torch.cat(parts), lengths
    try:
        # One list at once: a tensor per row takes fifty times as long.
        flat = torch.tensor(list(itertools.chain.from_iterable(rows)))
    except (TypeError, ValueError, RuntimeError):
        flat = torch.empty(1)
    if not len(flat):
        flat = flat.to(torch.int64)
    if flat.ndim != 1 or flat.dtype != torch.int64:
        for i, row in enumerate(rows):
            _ints(name, i, row)
    return flat, lengths


def _ints(name: str, i: int, row: Sequence[int] | torch.Tensor) -> torch.Tensor:
    try:
        values = torch.as_tensor(row) if len(row) else torch.empty(0, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as exc:
        msg = f"{name!r}: expected row {i} to be a list of ints, found {row!r:.80} ({exc})"
        raise IntegrityError(msg, tensor=name) from exc
    if values.ndim != 1 or values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
        msg = f"{name!r}: expected row {i} to be a list of ints, found {row!r:.80} ({values.dtype})"
        raise IntegrityError(msg, tensor=name)
    return values.to("cpu", torch.int64)


def as_json(config: dict[str, Any]) -> str:
    """Text of a configuration file.

    Raises:
        IncompatibleOptionsError: a value that JSON does not have.
    """
    try:
        return json.dumps(config, indent=2) + "\n"
    except (TypeError, ValueError) as exc:
        msg = f"config: expected values that JSON can hold, found another ({exc}); use numbers, texts, lists and dicts"
        raise IncompatibleOptionsError(msg) from exc
