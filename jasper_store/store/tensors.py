"""One tensor of a store, wherever it lives: the same API and bit-equal rows from a map, from memory, from chunks.

========================  ===========================  ==========================  ======================
                          mapped                       resident                    chunked
========================  ===========================  ==========================  ======================
``take``, ``[tensor]``    owned                        owned                       owned
``[int]``, ``[slice]``    view of the file's pages     view of the tensor          owned
``tensor()``              view of the file's pages     the tensor itself           owned, read whole
``blocks()``              views                        views                       owned
========================  ===========================  ==========================  ======================

A view of a map is private: writing to it changes neither the file nor what other processes see. A view of a
resident tensor is that tensor: write to a copy. Four kinds of mapped data have no view to give and return
copies instead: data that lies unaligned in its file, data narrowed to another dtype on the way, maps of a
system that refuses writable ones, and of a tensor in several parts whatever reaches across two of them.

All of them may be read from several threads at once, survive a fork, and pickle as "that tensor of that store":
what unpickles it opens the store again.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from jasper_store.errors import ClosedError, IncompatibleOptionsError, InsufficientMemoryError
from jasper_store.formats.base import Chunked, Extent, Parts
from jasper_store.memory.budget import format_bytes, measure
from jasper_store.paging import residency
from jasper_store.store.rows import as_rows, wrap_negative

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch.utils.data import ConcatDataset

    from jasper_store.formats.base import TensorSpec
    from jasper_store.native.gather import Source
    from jasper_store.store.rows import Rows

__all__ = ["BLOCK_NBYTES", "ByteRun", "StoredTensor", "block_rows", "byte_runs", "resident_nbytes", "span_nbytes"]

BLOCK_NBYTES = 8 << 20
"""Bytes per block of a sequential scan, unless the caller says how many rows."""

_SURELY_FITS = 64 << 20


class StoredTensor(Dataset[torch.Tensor], ABC):
    """A named tensor of a store: rows on demand. Also a map-style dataset whose samples are its rows.

    So ``torch.utils.data.StackDataset(emb=store["embs"], y=store["labels"])`` is a dataset of both; a DataLoader
    gathers the rows of a batch at once. Batches of many tensors are faster through the loaders of this package.

    Attributes:
        name: its name in the store.
        shape: sizes; ``torch.Size([])`` for a scalar, which counts as one row.
        dtype: torch dtype of the rows that are returned.
        placement: ``"mmap"``, ``"ram"``, ``"chunked"`` or a device such as ``"cuda:0"``.
        path: the file that it was found in; of several, the first.
        spec: what the file's header says.
    """

    def __init__(self, spec: TensorSpec, placement: str, dtype: torch.dtype | None = None) -> None:
        self.spec = spec
        self.name = spec.name
        self.shape = torch.Size(spec.shape)
        self.dtype = dtype or spec.dtype
        self.placement = placement
        self.n_rows = spec.n_rows
        self.row_shape = self.shape[1:]
        # Set by the store: what a pickle of this tensor opens again.
        self.origin: Any = None

    @property
    def path(self) -> Path:
        """The file that it was found in."""
        return self.spec.path

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row as it is returned."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all rows as they are returned."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def device(self) -> torch.device:
        """Where the rows that are returned live."""
        return torch.device("cpu")

    def __len__(self) -> int:
        if not self.shape:
            msg = f"{self.name}: a scalar has no length"
            raise TypeError(msg)
        return self.n_rows

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.dtype}, {list(self.shape)}, {self.placement!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        if self.origin is None:
            msg = f"{self.name}: a tensor outside of a store cannot be pickled; pickle the store, or .tensor()"
            raise TypeError(msg)
        return (operator.getitem, (self.origin, self.name))

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredTensor:
        """The tensor itself, where it lives: a copy by way of its pickle would open its files again, mapped."""
        return self

    @abstractmethod
    def take(self, rows: Rows, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows in any order, repeats allowed, as an owned tensor.

        Args:
            rows: 1-D int64 tensor; other integer tensors, arrays, lists and ranges work, a little slower. None
                of them negative.
            out: where to put them: shape ``(len(rows), *row_shape)``, this dtype and device; its old content is
                lost, also if an error is raised.

        Returns:
            ``out``, or a new tensor ``[len(rows), ...]``.

        Raises:
            IndexError: a row outside of [0, n_rows): names the tensor, position, value and bound.
            IncompatibleOptionsError: ``out`` has another shape, dtype or device.
            ClosedError: the store was closed.
        """

    @property
    def in_memory(self) -> Source | None:
        """Where its rows can be gathered from together with those of other tensors; ``None`` if they can not."""
        return None

    @abstractmethod
    def tensor(self) -> torch.Tensor:
        """The whole tensor; the table above says what is a view.

        Raises:
            ClosedError: the store was closed.
        """

    @abstractmethod
    def _rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop, [stop - start, ...]: a view where there is one. Both are inside."""

    def _part(self, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop of a sequential scan, which has prefetched them already."""
        return self._rows(start, stop)

    @abstractmethod
    def _require_open(self) -> None:
        """Raise ClosedError after :meth:`close`."""

    @abstractmethod
    def close(self) -> None:
        """Release the data; views stay valid and hold it as long as they live. May be called twice."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Row of an int, rows of a slice or of a 1-D index; negative ones count from the end.

        Raises:
            IndexError: out of range, or an index of another kind (several dimensions, masks, ``None``).
            ClosedError: the store was closed.
        """
        self._require_open()
        if isinstance(index, torch.Tensor) and index.ndim == 0 and index.dtype != torch.bool:
            index = int(index)
        if isinstance(index, slice):
            start, stop, step = self._require_dims(index).indices(self.n_rows)
            if step > 0:
                return self._rows(start, max(start, stop))[::step]
            return self.take(range(start, stop, step))
        if isinstance(index, (torch.Tensor, list, range)) or (hasattr(index, "__array__") and index.ndim > 0):
            return self.take(wrap_negative(as_rows(self._require_dims(index), self.name), self.n_rows))
        if isinstance(index, tuple) and not index and not self.shape:
            return self.tensor()
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            msg = (
                f"{self.name}: expected an int, a slice or a 1-D index of rows, got {type(index).__name__}; "
                "other dimensions are indexed on the tensor that comes back"
            )
            raise IndexError(msg)
        row = operator.index(self._require_dims(index))
        if not -self.n_rows <= row < self.n_rows:
            msg = f"{self.name}: row {row} is out of range: it has {self.n_rows} rows"
            raise IndexError(msg)
        row %= self.n_rows
        return self._rows(row, row + 1)[0]

    def __getitems__(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Rows of a batch for a DataLoader, gathered at once: views of one owned tensor.

        Raises:
            IndexError, ClosedError: as ``[...]``.
        """
        return list(self[list(indices)].unbind())

    def __add__(self, other: Dataset[torch.Tensor]) -> ConcatDataset[torch.Tensor]:
        """The rows of two datasets one after the other, as for any Dataset; it is not arithmetic."""
        operand: Any = other  # a number, where a caller takes "+" for arithmetic
        return super().__add__(other) if isinstance(operand, Dataset) else NotImplemented

    def _require_dims(self, index: Any) -> Any:
        if not self.shape:
            msg = f"{self.name}: a scalar has no rows to index; use .tensor()"
            raise IndexError(msg)
        return index

    def blocks(self, rows_per_block: int | None = None, *, drop_behind: bool = False) -> Iterator[torch.Tensor]:
        """All rows in order, block by block, for one sequential pass in bounded memory.

        Args:
            rows_per_block: rows per block; 8 MiB worth of them by default.
            drop_behind: give back the page cache's copy of each block once the next is asked for, so that a pass
                over a file leaves the cache to others. Views of earlier blocks stay valid and are read again from
                the file when used; writes into them are lost.

        Yields:
            ``[n, ...]``: views where the data has views, else owned tensors. Never an empty block.

        Raises:
            ClosedError: the store was closed, also halfway.
        """
        self._require_open()
        step = rows_per_block or max(1, BLOCK_NBYTES // max(self.row_nbytes, 1))
        if step < 0:
            msg = f"{self.name}: expected a number of rows per block above 0, got {rows_per_block}"
            raise IncompatibleOptionsError(msg)
        for start in range(0, self.n_rows, step):
            stop = min(start + step, self.n_rows)
            self._scan_ahead(start, min(stop + step, self.n_rows))
            yield self._part(start, stop)
            self._require_open()
            if drop_behind:
                self._scan_behind(start, stop)

    def _scan_ahead(self, start: int, stop: int) -> None:
        """Rows that a sequential scan reads now and next."""

    def _scan_behind(self, start: int, stop: int) -> None:
        """Rows that a sequential scan has finished."""

    def prefetch(self, rows: Rows) -> None:  # noqa: ARG002 - data in memory has nothing to prefetch
        """Ask the kernel to read these rows, and return without waiting; does something for mapped data only.

        Rows out of range are skipped; ``take`` raises for them.

        Raises:
            ClosedError: the store was closed.
        """
        self._require_open()

    def announce(self, rows: Rows) -> None:
        """Old name of :meth:`prefetch`."""
        self.prefetch(rows)

    @property
    def prefetching(self) -> bool:
        """Whether :meth:`prefetch` would ask for anything now: the data is mapped, and lately was not in memory."""
        return False

    def drop_runs(self, starts: np.ndarray, stops: np.ndarray) -> None:  # noqa: ARG002 - as prefetch
        """Drop the pages of many runs of rows; they are read again when needed.

        Args:
            starts: first row of each run, integers [k]; as far as they are in the range of rows.
            stops: row after the last of each run [k].

        Raises:
            ClosedError: the store was closed.
        """
        self._require_open()

    def residency(self) -> int:
        """Bytes of its file that are in the page cache now; of the whole file where the data is chunked.

        Raises:
            ClosedError: the store was closed.
        """
        self._require_open()
        return sum(residency.cached_bytes(*run) or 0 for run in byte_runs(self.spec))

    def drop(self) -> None:
        """Drop its bytes from the page cache; they are read again when needed.

        Raises:
            ClosedError: the store was closed.
        """
        self._require_open()
        for run in byte_runs(self.spec):
            residency.drop_cache(*run)

    def _check_out(self, out: torch.Tensor, n: int) -> None:
        expected = (n, *self.row_shape)
        if out.shape != expected or out.dtype != self.dtype or out.device != self.device:
            msg = (
                f"{self.name}: out must be {self.dtype} {list(expected)} on {self.device}, "
                f"got {out.dtype} {list(out.shape)} on {out.device}"
            )
            raise IncompatibleOptionsError(msg)

    def _require_room(self) -> None:
        """Refuse to make a copy of the whole tensor that would take more memory than there is."""
        if self.nbytes > _SURELY_FITS and self.nbytes > (available := measure().nbytes):
            msg = (
                f"{self.name}: its {format_bytes(self.nbytes)} cannot be had in one piece without a copy, and "
                f"{format_bytes(available)} may be used; read it in parts ([start:stop], blocks(), take(rows)), or convert "
                "it to safetensors, which can be mapped whole (jasper-store convert)"
            )
            raise InsufficientMemoryError(
                msg, path=self.path, tensor=self.name, needed=self.nbytes, available=available
            )

    def _closed_error(self) -> ClosedError:
        msg = f"{self.name}: its store is closed; open it again with jasper_store.open"
        return ClosedError(msg, path=self.path, tensor=self.name)


class ByteRun(NamedTuple):
    """Bytes of a file."""

    path: Path
    offset: int
    nbytes: int


def byte_runs(spec: TensorSpec) -> Iterator[ByteRun]:
    """The bytes of a tensor's values in its files, in order; of the whole file where they have no place of their own."""
    place = spec.location
    if isinstance(place, Extent):
        yield ByteRun(place.path, place.offset, span_nbytes(spec))
    elif isinstance(place, Parts):
        lengths = np.diff(place.starts) * spec.row_nbytes
        ends = place.offsets + lengths
        # Parts that follow one another in a file, such as the batches of one that was compacted, are one run.
        first = np.append(True, (place.file_of[1:] != place.file_of[:-1]) | (place.offsets[1:] != ends[:-1]))
        heads = np.flatnonzero(first)
        for head, last in zip(heads.tolist(), [*(heads[1:] - 1).tolist(), len(ends) - 1], strict=True):
            offset = int(place.offsets[head])
            yield ByteRun(place.files[place.file_of[head]], offset, int(ends[last]) - offset)
    else:
        yield ByteRun(spec.path, 0, spec.path.stat().st_size)


def resident_nbytes(spec: TensorSpec) -> int | None:
    """Bytes of a tensor's values in the page cache; ``None`` where they have no extent, or the system cannot say."""
    if not isinstance(spec.location, (Extent, Parts)):
        return None
    found = [residency.cached_bytes(*run) for run in byte_runs(spec)]
    return None if None in found else sum(filter(None, found))


def span_nbytes(spec: TensorSpec) -> int:
    """Bytes from a tensor's first element to its last as they lie in the file."""
    strides = spec.location.strides if isinstance(spec.location, Extent) else None
    if strides is None or 0 in spec.shape:
        return spec.nbytes
    return (1 + sum((n - 1) * s for n, s in zip(spec.shape, strides, strict=True))) * spec.dtype.itemsize


def block_rows(spec: TensorSpec, nbytes: int = BLOCK_NBYTES) -> int:
    """Rows of a block of about ``nbytes``, at least one; blocks of chunked data hold whole chunks.

    A chunk that the end of a block cuts would be read and unpacked twice.
    """
    chunk_shape = spec.location.chunk_shape if isinstance(spec.location, Chunked) else None
    if chunk_shape:
        chunk = max(chunk_shape[0], 1)
        return max(nbytes // max(spec.row_nbytes * chunk, 1), 1) * chunk
    return max(nbytes // spec.row_nbytes, 1) if spec.row_nbytes else max(spec.n_rows, 1)
