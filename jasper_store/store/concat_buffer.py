"""Tensors that are gathered together, concatenated, so that one gather selects from any of them.

A batch that takes each row from one of several tensors (a steering variant per sample) would need a gather per
tensor, and then a merge of the rows. If the tensors are preloaded anyway, they are read into one buffer instead: row
r of the k-th tensor is row ``rows of those before it + r`` of the buffer, and one gather selects all rows.
A last row of zeros stands for "none of them".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from jasper_store.formats.base import TensorSpec
from jasper_store.paging import preload
from jasper_store.store.resident import DeviceTensor, ResidentTensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jasper_store.store.placement import Plan
    from jasper_store.store.tensors import StoredTensor

__all__ = ["ConcatBuffer", "allocate_concat_buffers"]


@dataclass(frozen=True, slots=True)
class ConcatBuffer:
    """One buffer for several tensors.

    Attributes:
        names: the tensors, in the order in which they lie.
        tensor: all their rows, and a last row of zeros.
        parts: the place of each tensor in the buffer, to be filled when it is loaded.
    """

    names: tuple[str, ...]
    tensor: StoredTensor
    parts: Mapping[str, torch.Tensor]


def allocate_concat_buffers(
    groups: Sequence[tuple[str, ...]],
    specs: Mapping[str, TensorSpec],
    plan: Plan,
    dtypes: Mapping[str, torch.dtype],
) -> list[ConcatBuffer]:
    """Buffers for the groups whose tensors are all preloaded to one place, in one dtype and row shape.

    Args:
        groups: names of tensors that are gathered together.
        specs: all tensors by name.
        plan: where they go.
        dtypes: dtype that each is served in.
    """
    return [_allocate(names, specs, plan, dtypes) for names in groups if _fits(names, specs, plan, dtypes)]


def _fits(
    names: tuple[str, ...], specs: Mapping[str, TensorSpec], plan: Plan, dtypes: Mapping[str, torch.dtype]
) -> bool:
    if not names or any(name not in specs or not specs[name].shape for name in names):
        return False
    kinds = {(plan.placement(name), dtypes[name], specs[name].shape[1:]) for name in names}
    return len(kinds) == 1 and plan.placement(names[0]) not in {"mmap", "chunked"}


def _allocate(
    names: tuple[str, ...], specs: Mapping[str, TensorSpec], plan: Plan, dtypes: Mapping[str, torch.dtype]
) -> ConcatBuffer:
    first = specs[names[0]]
    placement, dtype = plan.placement(names[0]), dtypes[names[0]]
    shape = (sum(specs[name].n_rows for name in names) + 1, *first.shape[1:])
    on_host = placement == "ram"
    buffer = preload.empty(shape, dtype) if on_host else torch.empty(shape, dtype=dtype, device=placement)
    buffer[-1].zero_()
    parts: dict[str, torch.Tensor] = {}
    start = 0
    for name in names:
        parts[name] = buffer[start : start + specs[name].n_rows]
        start += specs[name].n_rows
    spec = TensorSpec("+".join(names), dtype, shape, first.location)
    return ConcatBuffer(names, ResidentTensor(spec, buffer) if on_host else DeviceTensor(spec, buffer), parts)
