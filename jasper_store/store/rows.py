"""Conversion and checks of row indices: from everything a user may pass to a 1-D int64 tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    Rows: TypeAlias = torch.Tensor | np.ndarray | Sequence[int] | range

__all__ = ["as_rows", "host_rows", "out_of_range", "refused", "require_in_range", "wrap_negative"]

_INTEGERS = frozenset(
    {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)


def as_rows(rows: Rows, name: str) -> torch.Tensor:
    """Row indices as a 1-D int64 tensor, on their device.

    Raises:
        IndexError: they are not integers, are a mask, or are not 1-D.
    """
    if isinstance(rows, range):
        return torch.arange(rows.start, rows.stop, rows.step, dtype=torch.int64, device="cpu")
    if not isinstance(rows, torch.Tensor):
        try:
            array = np.asarray(rows)
            # numpy makes an empty list a float array.
            rows = torch.from_numpy(np.ascontiguousarray(array if array.size else array.astype(np.int64)))
        except (TypeError, ValueError, OverflowError) as exc:
            msg = f"{name}: rows are named by an int, a slice or a 1-D list or tensor of whole numbers ({exc})"
            raise IndexError(msg) from exc
    if rows.dtype not in _INTEGERS:
        mask = " of a mask, pass mask.nonzero().squeeze(1)" if rows.dtype == torch.bool else ""
        msg = f"{name}: rows are named by whole numbers, got {rows.dtype}{mask}"
        raise IndexError(msg)
    if rows.ndim != 1:
        msg = f"{name}: rows are named by a 1-D list or tensor, got shape {list(rows.shape)}; flatten it first"
        raise IndexError(msg)
    return rows.long()


def host_rows(rows: Rows, name: str) -> torch.Tensor:
    """:func:`as_rows` in host memory, at no cost for what is that already.

    Raises:
        IndexError: as :func:`as_rows`.
    """
    if type(rows) is torch.Tensor and rows.dtype is torch.int64 and rows.ndim == 1 and not rows.is_cuda:
        return rows
    return as_rows(rows, name).cpu()


def wrap_negative(rows: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Row indices with negative ones counted from the end, as in Python."""
    return torch.where(rows < 0, rows + n_rows, rows)


def require_in_range(rows: torch.Tensor, n_rows: int, name: str) -> None:
    """Raise if a row is outside [0, n_rows).

    Raises:
        IndexError: names the tensor, the position in ``rows``, the value and the bound.
    """
    if rows.numel():
        low, high = torch.aminmax(rows)
        if low < 0 or high >= n_rows:
            error = out_of_range(rows, n_rows, name)
            if error is not None:
                raise error


def refused(rows: torch.Tensor, n_rows: int, name: str) -> IndexError:
    """The error for rows that the gather kernel refused."""
    error = out_of_range(rows, n_rows, name)
    return error or IndexError(f"{name}: the rows to take were changed by another thread while they were taken")


def out_of_range(rows: torch.Tensor, n_rows: int, name: str) -> IndexError | None:
    """The error for the first row outside [0, n_rows); ``None`` if all are inside."""
    bad = ((rows < 0) | (rows >= n_rows)).nonzero()
    if not bad.numel():
        return None
    position = int(bad[0])
    value = int(rows[position])
    bound = f"its {n_rows} rows are 0 to {n_rows - 1}" if n_rows else "it has no rows"
    hint = "; take() counts from 0, only [...] counts from the end" if -n_rows <= value < 0 else ""
    return IndexError(f"{name}: row {value} at position {position} is out of range: {bound}{hint}")
