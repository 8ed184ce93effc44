"""Rows as bytes, whose products take a quarter of the time and bound those of the rows.

A row x of length 1 is q(x) = quantum * bytes, and r(x) = x - q(x) is what is lost. Then

    x y = q(x) q(y) + q(x) r(y) + r(x) y <= q(x) q(y) + |q(x)| |r(y)| + |r(x)|

by Cauchy-Schwarz. With 384 columns the last two terms add up to some 0.015.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import torch

from jasper_store.native.topk import multiplies_bytes

__all__ = ["LEFT_OUT", "Quantized", "product", "quantize", "quantized_nbytes", "quantizes"]

LEFT_OUT: Final = torch.iinfo(torch.int32).min
"""Instead of a product: a column that is left out."""

_MOST: Final = 127
_COLUMNS: Final = 64
"""Columns of bytes are a multiple of this: torch's product is wrong at some others (of one column, in 2.13)."""

_BLOCK_ROWS: Final = 1024
_ROUNDING: Final = 2e-6
"""Added to lengths and radii: rounding of a bound and of rows to length 1, in float32."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows [n, D] of length 1, and the bytes that stand for them.

    Attributes:
        rows: float32 [n, D].
        numbers: int8 [n, D and zeros up to a multiple of 64], -127 to 127.
        quantum: float32 [n], above zero.
        length: float32 [n], of ``quantum * numbers``, or more.
        radius: float32 [n], how far that is from ``rows``, or more.
    """

    rows: torch.Tensor
    numbers: torch.Tensor
    quantum: torch.Tensor
    length: torch.Tensor
    radius: torch.Tensor

    def part(self, some: slice) -> Quantized:
        """Some of the rows."""
        return Quantized(self.rows[some], self.numbers[some], self.quantum[some], self.length[some], self.radius[some])


def quantize(rows: torch.Tensor) -> Quantized:
    """Rows of length 1, float32 [n, D], as bytes."""
    count, dim = rows.shape
    found = Quantized(rows, torch.zeros(count, _padded(dim), dtype=torch.int8), *torch.empty(3, count).unbind())
    summing = 1 + dim * torch.finfo(torch.float32).eps
    for start in range(0, count, _BLOCK_ROWS):
        some = found.part(slice(start, start + _BLOCK_ROWS))
        torch.amax(some.rows.abs(), dim=1, out=some.quantum).div_(_MOST)
        nearest = (some.rows / some.quantum[:, None]).round_()
        some.numbers[:, :dim] = nearest
        nearest.mul_(some.quantum[:, None])
        torch.linalg.vector_norm(nearest, dim=1, out=some.length).mul_(summing).add_(_ROUNDING)
        torch.linalg.vector_norm(nearest.sub_(some.rows), dim=1, out=some.radius).mul_(summing).add_(_ROUNDING)
    return found


def _padded(dim: int) -> int:
    return -dim % _COLUMNS + dim


def quantized_nbytes(dim: int) -> int:
    """Bytes of a row beside the row itself."""
    return _padded(dim) + 3 * 4


def product(left: Quantized, right: Quantized, out: torch.Tensor) -> None:
    """Products of the bytes, int32 [n, m]."""
    _multiply(left.numbers, right.numbers, out)


def _multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    torch._int_mm(left, right.T, out=out)  # noqa: SLF001 -- none of the public functions makes it on a processor


def quantizes(dim: int) -> bool:
    """Whether products of bytes are to be had here, in less time than others, of rows of ``dim`` columns."""
    return dim >= _COLUMNS and _multiplies_exactly()


@functools.cache
def _multiplies_exactly() -> bool:
    """Ask the processor, and compare the largest products once.

    torch's function is not of its public ones, and takes what the processor has: one that adds up two products in 16 bits
    gets these wrong.
    """
    if not multiplies_bytes():
        return False
    generator = torch.Generator().manual_seed(0)
    for rows, columns, dim in ((64, 96, 384), (3, 5, 64), (17, 33, 1024)):
        left, right = (
            _MOST * (1 - 2 * torch.randint(0, 2, (count, dim), generator=generator)) for count in (rows, columns)
        )
        left[0], right[0] = _MOST, _MOST
        out = torch.empty(rows, columns, dtype=torch.int32)
        try:
            _multiply(left.to(torch.int8), right.to(torch.int8), out)
        except (AttributeError, RuntimeError):
            return False
        if not torch.equal(out.to(torch.int64), left @ right.T):
            return False
    return True
