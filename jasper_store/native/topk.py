"""Offers products to reservoirs of the best columns, with the compiled loop (``topk.c``) where it was built.

It reads a product once, while it is still in the processor's cache. It is optional: without it, and on other devices,
:mod:`jasper_store.building.topk` does the same by operations of torch.
"""

from __future__ import annotations

import array
from typing import Any, Protocol

import numpy as np
import torch

from jasper_store.native.library import library

__all__ = ["Reservoirs", "RowsAsBytes", "multiplies_bytes", "offer", "offers"]


class Reservoirs(Protocol):
    """Reservoirs of tasks: contiguous tensors in host memory."""

    keep: int
    values: torch.Tensor
    """float32 [tasks, capacity]."""
    columns: torch.Tensor
    """int32 [tasks, capacity]."""
    fill: torch.Tensor
    """int64 [tasks]: how many are in the reservoir; always fewer than its capacity."""
    floor: torch.Tensor
    """float32 [tasks]: what is not above it is not added."""


def offers(device: torch.device) -> bool:
    """Whether there is a compiled loop for products on this device."""
    return device.type == "cpu" and library() is not None


def multiplies_bytes() -> bool:
    """Whether there is a compiled loop for products of bytes, and a processor that makes these in less time than others."""
    return library() is not None and bool(library().jasper_multiplies_bytes())


class RowsAsBytes(Protocol):
    """Rows of floats, and bytes that nearly are their multiples of a quantum: contiguous tensors in host memory."""

    @property
    def rows(self) -> torch.Tensor:
        """float32 [n, D], of length 1 at most."""

    @property
    def quantum(self) -> torch.Tensor:
        """float32 [n], above zero."""

    @property
    def length(self) -> torch.Tensor:
        """float32 [n]: length of the row that the bytes stand for, or more."""

    @property
    def radius(self) -> torch.Tensor:
        """float32 [n]: distance of that row from the row of floats, or more, and what rounding adds to a bound."""


def offer(
    pool: Reservoirs,
    product: torch.Tensor,
    first_task: np.ndarray[Any, np.dtype[np.int64]],
    start: int,
    ceiling: torch.Tensor,
    above: torch.Tensor,
    sides: tuple[RowsAsBytes, RowsAsBytes] | None = None,
) -> int:
    """Add to each reservoir the columns whose product is above its floor and not above its ceiling.

    Args:
        pool: reservoirs; a full one is cut to the best, and its floor rises.
        product: float32 [units, columns] in host memory, its rows without gaps, without NaN. With ``sides`` int32 of the
            bytes, the least of int32 where a column is left out: a product of floats is made where a bound reaches the floor.
        first_task: int64 [units + 1], contiguous: the tasks of a unit, which are consecutive.
        start: what is added to the number of a column.
        ceiling: float32 [tasks].
        above: int64 [tasks]: the columns of each task that were above its ceiling are added to it.
        sides: the units and the columns, of a product of bytes.

    Returns:
        How many products of floats were made.
    """
    units, columns = product.shape
    if product.stride(1) != 1 and columns > 1:
        raise ValueError(f"expected rows without gaps, found strides {product.stride()}")
    made = np.zeros(1, np.uint64)
    of_bytes = [0] * 10
    if sides is not None:
        of_bytes = [sides[0].rows.shape[1]]
        for side in sides:
            of_bytes += [part.data_ptr() for part in (side.rows, side.quantum, side.length, side.radius)]
        of_bytes.append(made.ctypes.data)
    numbers = array.array(
        "q",
        (
            *(product.data_ptr(), product.stride(0), units, columns, start, first_task.ctypes.data),
            *(pool.values.data_ptr(), pool.columns.data_ptr(), pool.fill.data_ptr(), pool.floor.data_ptr()),
            *(ceiling.data_ptr(), above.data_ptr(), pool.keep, pool.values.shape[1], torch.get_num_threads()),
            *of_bytes,
        ),
    )
    library().jasper_offer(numbers.buffer_info()[0])
    return int(made[0])
