"""Rows of several tensors taken at once: those in memory by one call of the kernel, the others one by one.

A batch of nine tensors is a dozen takes, and at 256 rows each a third of the time would go into calling them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from jasper_store.native.gather import Jobs, Source, widening
from jasper_store.store.resident import empty_rows
from jasper_store.store.rows import out_of_range

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jasper_store.store.tensors import StoredTensor

__all__ = ["GatherRequest", "gather_many"]


class GatherRequest(NamedTuple):
    """Rows of one tensor.

    Attributes:
        tensor: where from; a plain tensor, wherever it is, is given as a :class:`~jasper_store.native.gather.Source`.
        rows: int64 [n], on the tensor's device.
        dtype: dtype of the rows returned; ``None`` keeps the tensor's.
        name: what an error calls a plain tensor.
    """

    tensor: StoredTensor | Source
    rows: torch.Tensor
    dtype: torch.dtype | None = None
    name: str = "a table in memory"


def gather_many(takes: Sequence[GatherRequest]) -> list[torch.Tensor]:
    """Rows of each, as :meth:`~jasper_store.store.tensors.StoredTensor.take` gives them; in the order asked.

    Raises:
        IndexError: a row out of range.
        ClosedError: a store was closed.
    """
    jobs = Jobs()
    sources: list[Source] = []
    found: list[torch.Tensor] = []
    for tensor, rows, dtype, _ in takes:
        source = tensor if isinstance(tensor, Source) else tensor.in_memory
        widen = widening(source.tensor.dtype, dtype or source.tensor.dtype) if source and source.numbers else None
        if source is None or widen is None:
            found.append(_alone(tensor, rows, dtype))
            continue
        n = rows.shape[0]
        out = empty_rows((n, *source.row_shape), dtype or source.tensor.dtype, n * source.row_nbytes)
        jobs.add(source, rows, out, widen)
        sources.append(source)
        found.append(out)
    if sources:
        bad = jobs.run()
        if bad is not None:
            raise _error(sources[bad], takes)
    return found


def _alone(tensor: StoredTensor | Source, rows: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    taken = torch.index_select(tensor.tensor, 0, rows) if isinstance(tensor, Source) else tensor.take(rows)
    return taken if dtype is None else taken.to(dtype)


def _error(source: Source, takes: Sequence[GatherRequest]) -> IndexError:
    """What to say of the first take from a source that named a row out of range."""
    for tensor, rows, _, named in takes:
        name = named if isinstance(tensor, Source) else tensor.name
        if tensor is source or (not isinstance(tensor, Source) and tensor.in_memory is source):
            error = out_of_range(rows, source.tensor.shape[0], name)
            if error is not None:
                return error
    return IndexError("the rows to take were changed by another thread while they were taken")
