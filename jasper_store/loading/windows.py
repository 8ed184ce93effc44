"""Which rows and blocks of a block order are due, as a pass moves through its windows."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from jasper_store.loading.order import BlockOrder

__all__ = ["Windows"]


class Windows:
    """Says which rows of a block order one rank has to read next, and which blocks it can drop."""

    def __init__(self, order: BlockOrder, first: int, ranks: int) -> None:
        self.order, self.first, self.ranks = order, first, ranks
        begin = order.window_of(first) if first < order.n else order.n_windows
        self._read = _Cursor(self.indices, begin, order.n_windows)
        self._dropped = _Cursor(order.blocks_of, begin, order.n_windows)

    def due(self, position: int) -> list[torch.Tensor]:
        """Indices that are due to be read and were not returned yet, in the order of the file.

        If ``position`` is x % into its window, everything up to x % of the next window is due.
        """
        return self._read.until(self._when(position) + 1)

    def done(self, position: int) -> list[torch.Tensor]:
        """Blocks to drop that were not returned yet: up to x % of the window before that of ``position``."""
        return self._dropped.until(self._when(position) - 1)

    def _when(self, position: int) -> float:
        """A position as a number of windows."""
        if position >= self.order.n:
            return float(self.order.n_windows)
        number = self.order.window_of(max(position, 0))
        start, stop = self.order.window_bounds(number)
        return number + max(position - start, 0) / (stop - start)

    def indices(self, number: int) -> torch.Tensor:
        """Indices of this rank's samples in a window, in the order of the file."""
        start, stop = self.order.window_bounds(number)
        start = max(start + (self.first - start) % self.ranks, self.first)
        return self.order.at(torch.arange(start, max(start, stop), self.ranks)).sort().values

    def members(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What is in a window, in the order of the file. With one rank it needs no sorting of indices.

        Returns:
            Its blocks; indices in them (of this rank, or all with one rank); the slot of each index among the
            concatenated blocks.
        """
        block = self.order.block
        blocks = self.order.blocks_of(number).sort().values
        if self.ranks > 1:
            indices = self.indices(number)
            return blocks, indices, torch.searchsorted(blocks, indices // block) * block + indices % block
        indices = (blocks[:, None] * block + torch.arange(block)).view(-1)
        # Only the last block of the file may be shorter; the blocks are sorted, so it is the last one here.
        indices = indices[: len(indices) - max(int(indices[-1]) + 1 - self.order.n, 0)]
        return blocks, indices, torch.arange(len(indices))


class _Cursor:
    """Moves through the windows and returns the items that it passes."""

    def __init__(self, items: Callable[[int], torch.Tensor], window: int, windows: int) -> None:
        self._items, self._window, self._windows = items, window, windows
        self._present: torch.Tensor | None = None
        self._given = 0

    def until(self, when: float) -> list[torch.Tensor]:
        """The items from the current point to ``when``, in windows."""
        found: list[torch.Tensor] = []
        while self._window < min(when, self._windows):
            if self._present is None:
                self._present, self._given = self._items(self._window), 0
            share = min(when - self._window, 1.0)
            upto = ceil(share * len(self._present))
            if upto > self._given:
                found.append(self._present[self._given : upto])
                self._given = upto
            if share < 1:
                break
            self._window, self._present = self._window + 1, None
        return found
