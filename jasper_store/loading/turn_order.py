"""The order of packed samples: blocks in shuffled order, and within a window a sample of each block in turn.

Packed samples lie in a random order already, so a window need not be shuffled row by row. Taking its blocks in turn has
two advantages: a batch draws equally from all of them, and of a number of ranks that divides the blocks of a window each
rank needs only its share of the blocks, since rank r takes every n-th position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from jasper_store.loading.order import BlockOrder, bijection, like

if TYPE_CHECKING:
    from typing import TypeAlias

    _Numbers: TypeAlias = Any

__all__ = ["TurnOrder"]

_SHIFTS: Final = 1 << 20


@dataclass(frozen=True)
class TurnOrder(BlockOrder):
    """A block order whose windows take their blocks in turn, each block's rows in an order of its window.

    A window with a block that is shorter is mixed as that of :class:`~jasper_store.loading.order.BlockOrder`.
    """

    @property
    def words(self) -> str:
        """What a saved state remembers."""
        return f"{super().words} in turn"

    def _in_window(self, number: int, positions: _Numbers) -> _Numbers:
        blocks = self._blocks_of(number)
        start, stop = self.window_bounds(number)
        if stop - start < len(blocks) * self.block:
            return super()._in_window(number, positions)
        facts = (self.n, self.block, self.seed, self.epoch)
        turns = bijection(len(blocks), "turns", number, *facts).apply(np.arange(len(blocks)))
        shifts = bijection(_SHIFTS, "shifts", number, *facts).apply(np.arange(len(blocks))) % self.block
        rows = bijection(self.block, "rows", number, *facts)
        inner = positions - start
        turn = inner // len(blocks)
        inner -= turn * len(blocks)
        slots = like(turns, inner)[inner]
        found = rows.apply(turn)
        found += like(shifts, inner)[slots]
        found -= (found >= self.block) * self.block
        found += like(blocks * self.block, inner)[slots]
        return found
