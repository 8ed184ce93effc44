"""The steering rows of a block order, read a window ahead of the batches that they belong to."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import numpy as np
import torch

from jasper_store.jasper.gather import Draw, chain_of
from jasper_store.jasper.schema import split_tensor
from jasper_store.native.gather import source_of
from jasper_store.store.compiled_gather import SECOND_INPUT, CompiledGather, IndexRef, Step

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from jasper_store.loading.windows import Windows
    from jasper_store.store.direct_rows import DirectRowReader

__all__ = ["READERS", "WINDOWS", "Steers", "WindowPrefetcher"]

_Batch = TypeVar("_Batch")
WINDOWS: Final = 4
"""Windows that are held: the one that is served, the one before, which batches on their way may need, and two ahead."""
READERS: Final = 3
"""Windows that are being read at a time: the one that is waited for, and two ahead."""


@dataclass(frozen=True)
class _Window:
    """A window that is held, or is being read.

    Attributes:
        number: of the order's windows.
        blocks: of positions, that are in it.
        places: of its positions among the addresses.
        staging: that reads it.
    """

    number: int
    blocks: np.ndarray
    places: np.ndarray
    staging: DirectRowReader


class Steers(Protocol):
    """The dataset, as far as staging is concerned."""

    split: Any
    staged: WindowPrefetcher | None

    @property
    def store(self) -> Mapping[str, Any]:
        """The stored tensors by name."""

    def draw_now(self) -> Draw:
        """What decides the steering of batches from now on."""


class WindowPrefetcher:
    """Steering rows of the windows around a pass. Serves one pass; the trainer's thread alone asks it.

    Args:
        dataset: knows of this as long as the pass lasts.
        stagings: of its steering tensors, :data:`READERS` of them; closed with this.
        windows: of the pass.
        in_flight: places between a batch that leaves :meth:`over` and the one that is being gathered.

    Attributes:
        ended: whether all batches have left :meth:`over`.
    """

    def __init__(self, dataset: Steers, stagings: Sequence[DirectRowReader], windows: Windows, in_flight: int) -> None:
        self._dataset, self._stagings, self._windows, self._in_flight = dataset, stagings, windows, in_flight
        order = windows.order
        self._order, self._place = order, windows.first
        self._first = self._next = order.window_of(self._place) if self._place < order.n else order.n_windows
        self._draw = dataset.draw_now()
        self.ended = False
        # Where the row of each position of a held window lies; -1 where none is held. Blocks of positions have slots.
        self._addresses = torch.full((WINDOWS * order.span,), -1, dtype=torch.int64)
        self._slots = np.full(-(-order.n // order.block), -1, np.int32)
        self._held: deque[tuple[_Window, torch.Tensor]] = deque()
        self._reads: deque[_Window] = deque()
        self._idle = list(stagings)
        self._alone = CompiledGather(self.steps(0))
        # The disk is at it, without this thread, while tables are drawn.
        self._read_on(self._first)
        self._whole = chain_of(dataset.store, dataset.split, self._draw, self)
        if dataset.staged is not None and dataset.staged.ended:
            dataset.staged.close()
        dataset.staged = self

    def steps(self, first: int) -> list[Step]:
        """Steps of a chain that find a staged row, by the extra input; ``first`` is the number of the first of them."""
        table = source_of(self._addresses)
        staging = self._stagings[0]
        return [
            Step("staged steering", table, SECOND_INPUT, torch.int64, result=False),
            Step("staged steering", staging.anywhere, IndexRef(first), staging.dtype),
        ]

    def over(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        """The same batches, each once its rows are there; the next windows are being read meanwhile.

        Closes when it is left before its end, by an error too. At its end there are batches to be gathered yet.
        """
        try:
            yield from self._over(batches)
        except BaseException:
            self.close()
            raise
        self.ended = True

    def _over(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        until = 0  # the place up to which there is nothing to do
        for batch in batches:
            size: int = len(batch)  # type: ignore[arg-type]
            self._place += size * self._windows.ranks
            if self._place > until:
                until = self._move()
            yield batch

    def _move(self) -> int:
        """Let go of what the present place is done with, have read what it comes to, and wait for what it needs.

        Returns:
            The place up to which all of this holds.
        """
        order = self._order
        now = order.window_of(min(self._place, order.n) - 1)
        oldest = max(order.window_of(max(self._place - self._in_flight, 0)), self._first)
        self._forget(oldest)
        self._take_in(now - 1)
        self._read_on(min(now + 2, oldest + WINDOWS - 1))
        self._take_in(now)
        return min(order.window_bounds(now)[1], order.window_bounds(oldest)[1] + self._in_flight - 1)

    def _read_on(self, last: int) -> None:
        """Have windows read, up to a number."""
        while self._next <= last and self._next < self._order.n_windows:
            self._reads.append(self._begin(self._next))
            self._next += 1

    def _begin(self, number: int) -> _Window:
        """Find out what a window needs, and begin to read it."""
        blocks, positions, within = self._windows.members(number)
        pairs = self._dataset.store[split_tensor(self._dataset.split)].take(positions).long()
        which = self._draw.variants(pairs).numpy() - 1
        staging = self._idle.pop()
        staging.begin(which, pairs.numpy())
        first = number % WINDOWS * self._order.span
        return _Window(number, blocks.numpy(), within.numpy() + first, staging)

    def _take_in(self, last: int) -> None:
        """Wait for windows up to a number, and have their rows found."""
        while self._reads and self._reads[0].number <= last:
            window = self._reads.popleft()
            addresses, memory = window.staging.finish()
            self._idle.append(window.staging)
            order, slot = self._order, window.number % WINDOWS
            self._addresses.numpy()[slot * order.span :][: order.span] = -1
            self._addresses.numpy()[window.places] = addresses
            self._slots[window.blocks] = slot * order.window + np.arange(len(window.blocks))
            self._held.append((window, memory))

    def _forget(self, before: int) -> None:
        while self._held and self._held[0][0].number < before:
            self._slots[self._held.popleft()[0].blocks] = -1

    def batch(self, positions: torch.Tensor, draw: Draw) -> list[torch.Tensor] | None:
        """A whole batch, as :func:`~jasper_store.jasper.gather.chain_of` orders it; ``None`` if it has to go step by step."""
        return self._run(self._whole, positions, draw) if self._whole else None

    def steering(self, positions: torch.Tensor, draw: Draw) -> torch.Tensor | None:
        """Steering rows of a batch [B, D]; ``None`` if not all of them are staged, for this draw."""
        found = self._run(self._alone, positions, draw)
        return found[0] if found else None

    def _run(self, chain: CompiledGather, positions: torch.Tensor, draw: Draw) -> list[torch.Tensor] | None:
        if draw is not self._draw:
            return None  # an epoch or a variant was set since the pass began
        named, block = positions.numpy(), self._order.block
        try:
            # Where a block is not held the place comes out negative, and the chain refuses it, as it does a position
            # that is none.
            places = self._slots[named // block].astype(np.int64)
            places *= block
            places += named % block
            return chain.run(positions, torch.from_numpy(places))
        except IndexError:
            return None  # a position of another rank's, perhaps; if a row is not there, going step by step says which

    # Of the class: at the interpreter's end this module's names are gone.
    _ending = staticmethod(sys.is_finalizing)

    def close(self) -> None:
        """The pass is over, or given up. May be called twice."""
        if self._ending():
            return  # files go with the process
        if self._dataset.staged is self:
            self._dataset.staged = None
        for staging in self._stagings:
            staging.close()
