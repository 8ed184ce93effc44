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

__all__ = ["Reservoirs", "offer", "offers"]


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


def offer(
    pool: Reservoirs,
    product: torch.Tensor,
    first_task: np.ndarray[Any, np.dtype[np.int64]],
    start: int,
    ceiling: torch.Tensor,
    above: torch.Tensor,
) -> None:
    """Add to each reservoir the columns whose product is above its floor and not above its ceiling.

    Args:
        pool: reservoirs; a full one is cut to the best, and its floor rises.
        product: float32 [units, columns] in host memory, its rows without gaps, without NaN.
        first_task: int64 [units + 1], contiguous: the tasks of a unit, which are consecutive.
        start: what is added to the number of a column.
        ceiling: float32 [tasks].
        above: int64 [tasks]: the columns of each task that were above its ceiling are added to it.
    """
    units, columns = product.shape
    if product.stride(1) != 1 and columns > 1:
        raise ValueError(f"expected rows without gaps, found strides {product.stride()}")
    numbers = array.array(
        "q",
        (
            *(product.data_ptr(), product.stride(0), units, columns, start, first_task.ctypes.data),
            *(pool.values.data_ptr(), pool.columns.data_ptr(), pool.fill.data_ptr(), pool.floor.data_ptr()),
            *(ceiling.data_ptr(), above.data_ptr(), pool.keep, pool.values.shape[1], torch.get_num_threads()),
        ),
    )
    library().jasper_offer(numbers.buffer_info()[0])
