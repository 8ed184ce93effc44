"""The draw of a choice: which of several tensors a sample takes its row from, by a hash of (seed, epoch, row).

The draw is a counter-based hash, not a stream of random numbers, so the order of the calls does not change it: one
worker or eight, one rank or many, batch by batch or sample by sample. The mixer is the finaliser of SplitMix64
(Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), used on a counter as in Salmon et
al.: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from jasper_store.native.gather import Source, source_of
from jasper_store.store.gather_many import GatherRequest, gather_many

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["VariantSampler", "draw_variants"]

_TABLE_ROWS: Final = 1 << 20
"""Up to this many rows the variants of an epoch are drawn once and looked up: part of another gather instead of
fourteen operations (30 us at B=256 on a core of the machine in docs/notes-paging.md). A table takes five bytes per row. Larger
datasets are drawn batch by batch, so that memory does not grow with them."""

_MASK64: Final = (1 << 64) - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15
_MIX_1: Final = 0xBF58476D1CE4E5B9
_MIX_2: Final = 0x94D049BB133111EB


class VariantSampler:
    """The variant of every row in one epoch. Immutable; answers on the device of the rows.

    Variant 0 is a row of zeros, variant k the row of the k-th tensor of the choice.

    Args:
        seed: the dataset's seed.
        epoch: number of the epoch.
        probabilities: probability of each variant; they add up to 1.
        forced: a variant that every row gets instead, or ``None``.
        n_rows: how many rows there are to draw for.
        numbers: gives the number that each row is drawn by, int64 [n] of int64 [n]; by default the rows themselves.
    """

    __slots__ = ("_n_rows", "_numbers", "_probabilities", "_seed", "_tables", "epoch", "forced")

    def __init__(
        self,
        seed: int,
        epoch: int,
        probabilities: Sequence[float],
        forced: int | None,
        n_rows: int,
        numbers: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.epoch = epoch
        self.forced = forced
        self._seed = seed
        self._probabilities = tuple(probabilities)
        self._n_rows = n_rows
        self._numbers = numbers
        self._tables: tuple[Source, Source] | None = None

    @property
    def n_tensors(self) -> int:
        """How many tensors there are to choose from."""
        return len(self._probabilities) - 1

    def draws(self, variant: int) -> bool:
        """Whether a row may get this variant."""
        return self.forced == variant if self.forced is not None else self._probabilities[variant] > 0

    def requests(self, rows: torch.Tensor) -> list[GatherRequest]:
        """Look up variants [B] and rows of the concatenated tensors [B]; none where there are no tables."""
        tables = self.tables(rows.device)
        return [] if tables is None else [GatherRequest(table, rows, torch.int64) for table in tables]

    def tables(self, device: torch.device) -> tuple[Source, Source] | None:
        """The variant of every row, int8, and its row of the concatenated tensors, int32; ``None`` beyond the limit."""
        if self._tables is None and 0 < self._n_rows <= _TABLE_ROWS:
            rows = torch.arange(self._n_rows, device=device)
            variants = self._of(rows)
            concatenated = self.concatenated_rows(rows, variants)
            self._tables = source_of(variants.to(torch.int8)), source_of(concatenated.to(torch.int32))
        return self._tables

    def variants(self, rows: torch.Tensor) -> torch.Tensor:
        """Variant of each row [B], int64, on the device of ``rows``."""
        # Tables pay off for repeated calls; the first call does not wait for them to be made.
        if self._tables is None:
            return self._of(rows)
        return gather_many([GatherRequest(self._tables[0], rows, torch.int64)])[0]

    def concatenated_rows(self, rows: torch.Tensor, variants: torch.Tensor) -> torch.Tensor:
        """Rows of the concatenated tensors: variant v of row r is (v - 1) * n_rows + r; the last row is the zeros."""
        # Variant 0 comes out negative by (n_rows - r); where() rather than indexing, which would wait for a device.
        last = self.n_tensors * self._n_rows
        return torch.where(variants == 0, last, (variants - 1) * self._n_rows + rows)

    def _of(self, rows: torch.Tensor) -> torch.Tensor:
        if self.forced is not None:
            return torch.full_like(rows, self.forced)
        numbers = rows if self._numbers is None else self._numbers(rows).to(torch.int64)
        return draw_variants(numbers, self._seed, self.epoch, self._probabilities)


def draw_variants(rows: torch.Tensor, seed: int, epoch: int, probs: Sequence[float]) -> torch.Tensor:
    """The variant of each row: a pure function of its arguments, the same on every device.

    Args:
        rows: int64, any shape, on any device.
        seed: the dataset's seed.
        epoch: epoch number.
        probs: probabilities of the variants at that epoch.

    Returns:
        int64 tensor of the same shape and device, values 0 to ``len(probs) - 1``.
    """
    numbers = _uniform_32(rows, seed, epoch)
    variants = torch.zeros_like(numbers)
    for threshold in _thresholds(probs):
        variants.add_(numbers.ge(threshold))
    return variants


def _signed(value: int) -> int:
    """The int64 with the same 64 bits, because torch has no unsigned arithmetic."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _mix_int(value: int) -> int:
    value &= _MASK64
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK64
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK64
    return value ^ (value >> 31)


def _shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return value.bitwise_right_shift(bits).bitwise_and_((1 << (64 - bits)) - 1)


def _uniform_32(rows: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
    """A 32-bit number, uniform in [0, 2**32), for each row, as int64; wraps as unsigned arithmetic does."""
    key = _signed(_mix_int(_mix_int(seed + _GOLDEN) ^ _mix_int((epoch + 1) * _MIX_2)))
    value = rows.mul(_signed(_GOLDEN)).add_(key)
    value = value.bitwise_xor_(_shifted(value, 30)).mul_(_signed(_MIX_1))
    value = value.bitwise_xor_(_shifted(value, 27)).mul_(_signed(_MIX_2))
    # Only the upper 32 bits are used, and the last xor-shift of the mixer changes none of bits 33 to 63.
    value = value.bitwise_xor_(_shifted(value, 31))
    return _shifted(value, 32)


def _thresholds(probabilities: Sequence[float]) -> list[int]:
    """Bounds in 2**32 parts: a number below the first draws variant 0, below the second 1, and so on."""
    bounds: list[int] = []
    total = 0.0
    for variant, probability in enumerate(probabilities[:-1]):
        total += probability
        nothing_follows = sum(probabilities[variant + 1 :]) <= 0.0
        bounds.append(1 << 32 if nothing_follows else min(round(total * (1 << 32)), 1 << 32))
    return bounds
