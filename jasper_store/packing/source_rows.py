"""Rows of a stored tensor brought into memory, for a long list of them: whole, by a sweep, or by sorted direct reads.

A tensor that fits the memory allowed is read whole, from front to end. Of a larger one the wanted rows are sorted and
each is read once: rows that lie near each other in one read, since a disk reads 12 KiB more in the time that a
separate read takes (:data:`jasper_store.native.reads` has the figure). So a dense list becomes a sweep over the file, and a
sparse one single reads, many in flight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch

from jasper_store.native.gather import Jobs, source_of
from jasper_store.store.direct_rows import direct_readers_for
from jasper_store.store.load import load
from jasper_store.store.paged import PagedTensor

if TYPE_CHECKING:
    from jasper_store.native.gather import Source
    from jasper_store.store.tensors import StoredTensor

__all__ = ["RowsInMemory", "is_resident", "pays_whole", "read_rows", "read_whole"]

_DENSE: Final = 4
"""A tensor is read whole if at least a fourth of its rows are wanted."""
_SWEPT: Final = 16
"""A tensor without direct reads is swept if at least a sixteenth of its rows are wanted."""
_STEP: Final = 1 << 14


class RowsInMemory(NamedTuple):
    """Rows that were brought into memory.

    Attributes:
        memory: bytes of rows [u, row_nbytes].
        which: which of them each wanted row is, int64 [n].
        source: ``memory`` as the kernel gathers from it.
    """

    memory: torch.Tensor
    which: torch.Tensor
    source: Source

    def gather(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Copy the wanted rows number ``start`` to ``stop`` to ``out``, uint8 [stop - start, row_nbytes], contiguous."""
        rows = self.which[start:stop]
        if not out.numel():
            return
        if not self.source.numbers:
            torch.index_select(self.memory, 0, rows, out=out)
            return
        jobs = Jobs()
        jobs.add(self.source, rows, out)
        bad = jobs.run()
        assert bad is None, "rows were checked when they were read"


def _of(memory: torch.Tensor, index: torch.Tensor) -> RowsInMemory:
    raw = _raw(memory)
    return RowsInMemory(raw, index, source_of(raw))


def _raw(rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, ...] as bytes [n, row_nbytes]."""
    flat = rows.contiguous().reshape(rows.shape[0], -1) if rows.numel() else rows.new_empty((rows.shape[0], 0))
    # Of one value torch calls any stride contiguous, and then refuses the view.
    return (flat if flat.stride(-1) == 1 else flat.clone(memory_format=torch.contiguous_format)).view(torch.uint8)


def is_resident(tensor: StoredTensor) -> bool:
    """Whether its rows are in memory already."""
    return tensor.placement == "ram"


def pays_whole(tensor: StoredTensor, wanted: int, room: int) -> bool:
    """Whether a tensor of which ``wanted`` rows are read is read whole, into ``room`` bytes at most."""
    return tensor.nbytes <= room and wanted * _DENSE >= tensor.n_rows


def read_whole(tensor: StoredTensor, index: torch.Tensor, known: torch.Tensor | None = None) -> RowsInMemory:
    """All rows of a tensor, and which of them are wanted.

    Args:
        tensor: the tensor.
        index: the rows wanted.
        known: the bytes of all its rows, where they were read before.

    Raises:
        IndexError: a row that it does not have.
        CorruptFileError: its file is truncated or damaged.
    """
    _check(tensor, index)
    if known is not None:
        return _of(known, index)
    if is_resident(tensor):
        return _of(tensor.tensor(), index)
    return _of(load(tensor.spec, tensor.dtype, drop_behind=True), index)


def read_rows(tensor: StoredTensor, index: torch.Tensor) -> RowsInMemory:
    """The wanted rows of a tensor alone, each once.

    Raises:
        IndexError: a row that it does not have.
        CorruptFileError: its file is truncated or damaged.
    """
    _check(tensor, index)
    found, inverse = np.unique(index.numpy(), return_inverse=True)
    rows, which = torch.from_numpy(found), torch.from_numpy(inverse.reshape(-1).astype(np.int64, copy=False))
    readers = direct_readers_for([tensor], 1) if isinstance(tensor, PagedTensor) and len(rows) else []
    if readers:
        (reader,) = readers
        try:
            reader.begin(np.zeros(len(found), np.int64), found)
            addresses, memory = reader.finish()
        finally:
            reader.close()
        # Sorted rows lie in memory in their order.
        assert not len(addresses) or addresses[0] == memory.data_ptr()
        return _of(memory, which)
    if len(found) * _SWEPT >= tensor.n_rows:
        return _of(_swept(tensor, found), which)
    memory = torch.empty((len(rows), *tensor.row_shape), dtype=tensor.dtype)
    for start in range(0, len(rows), _STEP):
        part = rows[start : start + _STEP]
        if isinstance(tensor, PagedTensor):
            tensor.prefetch(part)
        memory[start : start + _STEP] = tensor.take(part)
    return _of(memory, which)


def _swept(tensor: StoredTensor, rows: np.ndarray) -> torch.Tensor:
    """Sorted rows of a tensor that is read from front to end."""
    memory = torch.empty((len(rows), *tensor.row_shape), dtype=tensor.dtype)
    first = 0
    for block in tensor.blocks(drop_behind=True):
        begin, end = np.searchsorted(rows, (first, first + len(block)))
        memory[begin:end] = block[torch.from_numpy(rows[begin:end] - first)]
        first += len(block)
    return memory


def _check(tensor: StoredTensor, index: torch.Tensor) -> None:
    if not len(index):
        return
    low, high = (int(bound) for bound in torch.aminmax(index))
    if low < 0 or high >= tensor.n_rows:
        row = low if low < 0 else high
        raise IndexError(f"{tensor.name}: row {row} is out of range, it has rows 0 to {tensor.n_rows - 1}")
