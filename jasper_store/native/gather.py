"""Rows gathered from tensors in memory, several tensors in one call, by a kernel of our own where it was built.

The kernel (``rows.c``) asks for rows ahead of the one it copies, and so gathers half as fast again as
``torch.index_select`` with the same threads, and twice as fast with one (docs/notes-paging.md). It is built when the
package is, if there is a C compiler, and is not needed: without it callers let torch gather, tensor by tensor.
"""

from __future__ import annotations

import array
import math
from typing import Any, Final, NamedTuple

import torch

from jasper_store.native.library import library

__all__ = ["NUMBERS", "Jobs", "Source", "kernel", "run_packed", "source_of", "widening"]

NUMBERS: Final = 10
_WIDENS: Final = {torch.uint8: -1, torch.int8: 1, torch.int16: 2, torch.int32: 4}


def kernel() -> Any:
    """The kernel's entry point, or ``None`` where it was not built for this system."""
    found = library()
    return None if found is None else found.jasper_gather


class Source(NamedTuple):
    """A tensor that rows are gathered from, as the kernel sees it. Keeps the tensor alive.

    Attributes:
        tensor: [n_rows, ...].
        row_shape: sizes of a row.
        row_nbytes: bytes of a row.
        numbers: address of the first value, rows that may be named, bytes of a row, bytes from one row to the next;
            empty where the kernel cannot gather: on a device, where rows have gaps, where it was not built.
    """

    tensor: torch.Tensor
    row_shape: tuple[int, ...]
    row_nbytes: int
    numbers: tuple[int, ...]


def source_of(tensor: torch.Tensor) -> Source:
    """A tensor [n_rows, ...] as a source of rows."""
    row_shape = tuple(tensor.shape[1:])
    item = tensor.element_size()
    row_nbytes = math.prod(row_shape) * item
    reachable = tensor.device.type == "cpu" and tensor.numel() > 0 and tensor[0].is_contiguous()
    if not reachable or kernel() is None:
        return Source(tensor, row_shape, row_nbytes, ())
    numbers = (tensor.data_ptr(), tensor.shape[0], row_nbytes, tensor.stride(0) * item)
    return Source(tensor, row_shape, row_nbytes, numbers)


def widening(stored: torch.dtype, wanted: torch.dtype) -> int | None:
    """How :meth:`Jobs.add` makes one dtype of another: integers of up to 32 bits become int64; ``None`` if it cannot."""
    return 0 if stored == wanted else _WIDENS.get(stored) if wanted == torch.int64 else None


class Jobs:
    """Rows to gather from several tensors by one call of the kernel, which there has to be. Not for concurrent use."""

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        self._numbers: list[int] = []

    def add(self, source: Source, rows: torch.Tensor, out: torch.Tensor, widen: int = 0) -> None:
        """One more gather, which must not depend on the others.

        Args:
            source: where from; one with numbers.
            rows: int64 [n] in host memory, of any stride; kept alive by the caller until :meth:`run`, as ``out`` is.
            out: where to: [n, *row_shape] without gaps.
            widen: what :func:`widening` said of the dtypes of source and out.
        """
        self._numbers += source.numbers
        self._numbers += (rows.data_ptr(), rows.stride(0), rows.shape[0], out.data_ptr(), widen, 0)

    def run(self) -> int | None:
        """Do all, with torch's number of threads.

        Returns:
            ``None``, or the number of the first gather that names a row out of range; then nothing was written.
        """
        return run_packed(array.array("q", self._numbers))


def run_packed(jobs: array.array[int]) -> int | None:
    """Gathers as the kernel takes them: :data:`NUMBERS` numbers each, as ``struct job`` in ``rows.c`` says.

    Returns:
        ``None``, or the number of the first gather that names a row out of range; then nothing was written by its
        stage and those after it.
    """
    bad = kernel()(jobs.buffer_info()[0], len(jobs) // NUMBERS, torch.get_num_threads())
    return bad - 1 if bad else None
