"""Cosines whose bits are the same on every machine, and how far a quick matrix product may be from them.

A matrix product of a library adds in an order that depends on the processor, the shapes and the number of threads, so
its last bits do too. Here it is only a filter: what may be among the best by the error bound is computed again,
in float64, where the product of two float32 is exact, and added up in a fixed order of element-wise additions.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

__all__ = ["cosines", "dots", "product_error", "sort_keys"]

_CHUNK_NBYTES: Final = 2 << 20
_UNIT_ROUNDOFF: Final = 2.0**-24


def dots(left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    """Dot product of each row with the row beside it, in float64, added up in an order that depends on D alone.

    Args:
        left: [n, D], any floating dtype, in host memory.
        right: [n, D].

    Returns:
        float64 [n].
    """
    out = np.empty(len(left))
    step = max(_CHUNK_NBYTES // max(8 * left.shape[1], 1), 1)
    for start in range(0, len(left), step):
        products = left[start : start + step].to(torch.float64) * right[start : start + step].to(torch.float64)
        out[start : start + step] = _folded(products).numpy()
    return out


def _folded(values: torch.Tensor) -> torch.Tensor:
    """Sum of each row [n, D], by adding the second half to the first until one column is left; overwrites ``values``."""
    width = values.shape[1]
    while width > 1:
        half = width // 2
        values[:, :half] += values[:, width - half : width]
        width -= half
    return values[:, 0]


def cosines(products: np.ndarray, left_norms: np.ndarray, right_norms: np.ndarray) -> np.ndarray:
    """Cosines [n], float32, from dot products and norms in float64; all rounded as IEEE 754 says, 0 without a sign."""
    found: np.ndarray = (products / (left_norms * right_norms)).astype(np.float32) + np.float32(0)
    return found


def product_error(dim: int) -> float:
    """How far a float32 product of two unit rows of ``dim`` columns may be from :func:`cosines`, added in any order.

    By Cauchy-Schwarz the absolute products add up to 1, and each addition errs by at most one unit roundoff of what it
    has added so far; 16 more are for rounding the rows, their norms and the result.
    """
    return (dim + 16) * _UNIT_ROUNDOFF


def sort_keys(similarities: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Numbers that ascend as similarities descend, and as rows ascend among equal similarities.

    Args:
        similarities: float32, any shape, without -0.0.
        rows: integers of the same shape, 0 <= rows < 2**32.

    Returns:
        uint64 of that shape.
    """
    bits = np.ascontiguousarray(similarities).view(np.uint32)
    ascending = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    found: np.ndarray = (~ascending).astype(np.uint64) << np.uint64(32) | rows.astype(np.uint64)
    return found
