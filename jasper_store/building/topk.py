"""The best columns of many rows, found in matrix products that arrive block by block.

A row keeps a reservoir: columns whose product was above its floor, up to a capacity. When a reservoir is full, it is
cut to the best ``keep``, and the floor rises to the worst of these. So nearly all of a product is only compared with
the floor, and that in groups: the maximum over a group is one vectorised pass over the product.
"""

from __future__ import annotations

from typing import Final

import torch

__all__ = ["Reservoir", "above"]

_GROUP: Final = 32
_HEAVY: Final = 4
"""A row of which more than this part of the groups reaches the floor is looked through column by column."""


class Reservoir:
    """For each row the best columns so far. What was dropped of a row is not above its floor.

    Attributes:
        keep: how many are kept of each row.
        values: float32 [rows, capacity], -inf where there is none.
        columns: int32 [rows, capacity].
        fill: how many there are, int64 [rows].
        floor: float32 [rows].
    """

    def __init__(self, rows: int, keep: int, device: torch.device) -> None:
        self.keep = keep
        self._capacity = keep + max(keep, 16)
        self.values = torch.full((rows, self._capacity), -torch.inf, device=device)
        self.columns = torch.full((rows, self._capacity), -1, dtype=torch.int32, device=device)
        self.fill = torch.zeros(rows, dtype=torch.int64, device=device)
        self.floor = torch.full((rows,), -torch.inf, device=device)

    @staticmethod
    def row_nbytes(keep: int) -> int:
        """Bytes of a row."""
        return (keep + max(keep, 16)) * 8 + 12

    def add(self, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> None:
        """Add candidates [n], sorted by row."""
        while rows.numel():
            place = self.fill[rows] + _rank(rows)
            fits = place < self._capacity
            self.values[rows[fits], place[fits]] = values[fits]
            self.columns[rows[fits], place[fits]] = columns[fits].to(torch.int32)
            self.fill.index_add_(0, rows[fits], torch.ones_like(rows[fits]))
            rest = ~fits
            rows, columns, values = rows[rest], columns[rest], values[rest]
            if rows.numel():
                self._cut(torch.unique_consecutive(rows))
                better = values > self.floor[rows]
                rows, columns, values = rows[better], columns[better], values[better]

    def _cut(self, rows: torch.Tensor) -> None:
        values, at = self.values[rows].topk(self.keep, dim=1)
        columns = self.columns[rows].gather(1, at)
        self.values[rows] = -torch.inf
        self.values[rows, : self.keep] = values
        self.columns[rows, : self.keep] = columns
        self.fill[rows] = self.keep
        self.floor[rows] = torch.maximum(self.floor[rows], values[:, -1])

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and columns [rows, keep] by falling value, -inf and -1 behind the last."""
        full = (self.fill > self.keep).nonzero().view(-1)
        if full.numel():
            self._cut(full)
        values, at = self.values[:, : self.keep].sort(dim=1, descending=True)
        columns = self.columns[:, : self.keep].gather(1, at)
        return values, columns.masked_fill(values == -torch.inf, -1).to(torch.int64)


def _rank(rows: torch.Tensor) -> torch.Tensor:
    """Of each element of a sorted tensor, how many equal ones lie before it."""
    at = torch.arange(rows.numel(), device=rows.device)
    new = torch.ones_like(rows, dtype=torch.bool)
    new[1:] = rows[1:] != rows[:-1]
    return at - torch.where(new, at, 0).cummax(0).values


def above(product: torch.Tensor, floor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where a product is above the floor of its row.

    Args:
        product: [rows, n].
        floor: [rows].

    Returns:
        Rows, columns and values [m], sorted by row; and the rows, ascending, of which most would be: those are left out.
    """
    groups = product.shape[1] // _GROUP
    whole = groups * _GROUP
    heavy = torch.empty(0, dtype=torch.int64, device=product.device)
    found = []
    if groups:
        grouped = product[:, :whole].unflatten(1, (_GROUP, groups))  # type: ignore[no-untyped-call]
        reaching = grouped.amax(dim=1) > floor[:, None]
        many = reaching.sum(dim=1) > max(groups // _HEAVY, 4)
        if bool(many.any()):
            heavy = many.nonzero().view(-1)
            reaching[heavy] = False
        rows, group = reaching.nonzero(as_tuple=True)
        values = grouped[rows, :, group]  # [m, group]
        at, inside = (values > floor[rows][:, None]).nonzero(as_tuple=True)
        found.append((rows[at], inside * groups + group[at], values[at, inside]))
    if whole < product.shape[1]:
        rest = product[:, whole:]
        rows, inside = (rest > floor[:, None]).nonzero(as_tuple=True)
        light = ~torch.isin(rows, heavy) if heavy.numel() else torch.ones_like(rows, dtype=torch.bool)
        rows, inside = rows[light], inside[light]
        found.append((rows, inside + whole, rest[rows, inside]))
    rows, columns, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    if len(found) > 1:
        order = rows.argsort(stable=True)
        rows, columns, values = rows[order], columns[order], values[order]
    return rows, columns, values, heavy
