"""What of a block order's windows is due, as a pass moves through them."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from jasper_store.loading.order import BlockOrder

__all__ = ["Windows"]


class Windows:
    """What of a block order's windows is due to be announced or dropped, for the places that one rank takes."""

    def __init__(self, order: BlockOrder, first: int, ranks: int) -> None:
        self.order, self.first, self.ranks = order, first, ranks
        begin = order.window_of(first) if first < order.n else order.n_windows
        self._announced = _Cursor(self.positions, begin, order.n_windows)
        self._dropped = _Cursor(order.blocks_of, begin, order.n_windows)

    def due(self, place: int) -> list[torch.Tensor]:
        """Positions not given yet, in the order of the file: up to as far into the next window as ``place`` is in its own."""
        return self._announced.until(self._when(place) + 1)

    def done(self, place: int) -> list[torch.Tensor]:
        """Blocks not given yet: up to as far into the window before as ``place`` is in its own."""
        return self._dropped.until(self._when(place) - 1)

    def _when(self, place: int) -> float:
        """A place as a number of windows."""
        if place >= self.order.n:
            return float(self.order.n_windows)
        number = self.order.window_of(max(place, 0))
        start, stop = self.order.window_bounds(number)
        return number + max(place - start, 0) / (stop - start)

    def positions(self, number: int) -> torch.Tensor:
        """This rank's positions in a window, in the order of the file."""
        start, stop = self.order.window_bounds(number)
        start = max(start + (self.first - start) % self.ranks, self.first)
        return self.order.at(torch.arange(start, max(start, stop), self.ranks)).sort().values

    def members(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What is in a window, in the order of the file; quickly where this rank is the only one.

        Returns:
            Its blocks; positions in them, this rank's among them; and the place of each position if the blocks lay
            one behind the other.
        """
        block = self.order.block
        blocks = self.order.blocks_of(number).sort().values
        if self.ranks > 1:
            positions = self.positions(number)
            return blocks, positions, torch.searchsorted(blocks, positions // block) * block + positions % block
        positions = (blocks[:, None] * block + torch.arange(block)).view(-1)
        # Only the last block of the file may be shorter, and it is the last here too.
        positions = positions[: len(positions) - max(int(positions[-1]) + 1 - self.order.n, 0)]
        return blocks, positions, torch.arange(len(positions))


class _Cursor:
    """Moves through the windows and hands over what it passes, in portions."""

    def __init__(self, items: Callable[[int], torch.Tensor], window: int, windows: int) -> None:
        self._items, self._window, self._windows = items, window, windows
        self._present: torch.Tensor | None = None
        self._given = 0

    def until(self, when: float) -> list[torch.Tensor]:
        """The items between where it was and ``when``, a number of windows."""
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
