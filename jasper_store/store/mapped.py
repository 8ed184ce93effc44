"""Rows read through a private map of their file, whatever the format."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import numpy as np
import torch

from jasper_store.errors import CorruptFileError
from jasper_store.formats.base import Extent, Parts, contiguous_strides
from jasper_store.paging import madvise as paging
from jasper_store.paging.mapping import mappable, view
from jasper_store.paging.row_prefetcher import RowPrefetcher
from jasper_store.store.paged import LARGE_VIEW, SMALL_TENSOR, SMALL_VIEW, PagedTensor
from jasper_store.store.tensors import span_nbytes

if TYPE_CHECKING:
    from pathlib import Path

    from jasper_store.formats.base import TensorSpec
    from jasper_store.paging.mapping import FileMap

__all__ = ["MappedTensor", "rows_are_runs", "why_not_mappable"]


def rows_are_runs(spec: TensorSpec) -> bool:
    """Whether each row is one run of bytes in the file, so that reading it touches as few pages as possible."""
    if isinstance(spec.location, Parts):
        return True
    if not isinstance(spec.location, Extent):
        return False
    strides, shape = spec.location.strides, spec.shape
    if strides is None or not shape or 0 in shape:
        return True
    inner = contiguous_strides(shape[1:])
    return all(s == e for s, e, n in zip(strides[1:], inner, shape[1:], strict=True) if n > 1)


def why_not_mappable(spec: TensorSpec) -> str:
    """The reason why rows cannot be read through a map; ``""`` if they can."""
    if not isinstance(spec.location, (Extent, Parts)):
        return "it has no single place in its file"
    if sys.byteorder != "little":
        return "this machine is big-endian, and the files are little-endian"
    if isinstance(spec.location, Parts):
        return ""
    if not mappable(spec.location.offset, spec.dtype) and not spec.contiguous:
        return "it is neither aligned nor contiguous in its file"
    return ""


class MappedTensor(PagedTensor):
    """Rows read through a map of the file; the kernel decides which pages stay in memory.

    Data that is unaligned in its file is gathered as bytes, and data that is narrowed to another dtype is converted
    after the gather. Both cost an additional pass over the rows taken, and have no views.

    Args:
        spec: the file's header entry; its location is an :class:`~jasper_store.formats.base.Extent`.
        fmap: the map of its file.
        dtype: floating dtype of the rows that are returned, instead of the stored one.
    """

    def __init__(self, spec: TensorSpec, fmap: FileMap, *, dtype: torch.dtype | None = None) -> None:
        if not isinstance(spec.location, Extent):
            msg = f"{spec.path}: {spec.name} has no single place in its file and cannot be mapped"
            raise CorruptFileError(msg, path=spec.path, tensor=spec.name)
        offset, strides = spec.location.offset, spec.location.strides
        aligned = mappable(offset, spec.dtype) or 0 in spec.shape
        if aligned:
            source = view(fmap, offset, spec.dtype, spec.shape, strides)
        else:
            source = view(fmap, offset, torch.uint8, (spec.n_rows, spec.row_nbytes))
        super().__init__(spec, source, "mmap", dtype=dtype, as_bytes=not aligned, read_only=not fmap.writable)
        self._fmap: FileMap | None = fmap
        self._offset = offset
        self._address = fmap.address + offset
        self._span = span_nbytes(spec)
        self._row_nbytes = spec.row_nbytes
        self._row_stride = spec.row_nbytes if not strides else strides[0] * spec.dtype.itemsize
        self._runs = rows_are_runs(spec) and self._span > 0
        # Small tensors are read as a whole once. Rows that are not runs are left to page faults.
        large = self._span > SMALL_TENSOR
        self._prefetch_whole = self._span > 0 and not large
        self._prefetcher = (
            RowPrefetcher(self._address, self._row_stride, self._row_nbytes, spec.n_rows)
            if self._runs and large
            else None
        )

    def _require_whole_file(self) -> None:
        """Raise if the file was truncated since it was mapped: touching a page beyond its end would end the process.

        Costs a quarter of a microsecond, as seeking to the end does; fstat takes three times as long. It cannot protect
        views returned before, nor detect a truncation after it.

        Raises:
            CorruptFileError: the file ends before the end of this tensor.
        """
        fmap = self._fmap
        if fmap is not None and os.lseek(fmap.fileno(), 0, os.SEEK_END) < self._offset + self._span:
            msg = (
                f"{self.path}: the file was truncated or is being rewritten in place while {self.name} is mapped; "
                "write a new file and rename it over the old one (as torch.save to a temporary name and os.replace "
                "do), then open the dataset again"
            )
            raise CorruptFileError(msg, path=self.path, tensor=self.name)

    def _path_at(self, address: int) -> Path:
        del address  # there is one file
        return self.spec.path

    def _prefetch_bytes(self, begin: int, length: int) -> None:
        paging.madvise_batcher().prefetch(paging.span(self._address + begin, length))

    def residency(self) -> int:
        """Bytes of its file range that are in the page cache."""
        fmap = self._open_map()
        return paging.residency(self._address, self._span, fmap.fileno(), self._offset)

    def drop(self) -> None:
        """Ask the system to evict its pages from this process and from the page cache.

        They are read again when needed. Private writes through views survive.
        """
        fmap = self._open_map()
        paging.drop(self._address, self._span, fmap.fileno(), self._offset)

    def drop_runs(self, starts: np.ndarray, stops: np.ndarray) -> None:
        """Ask the system to evict the pages of many runs of rows, in as few system calls as possible.

        Pages shared with rows outside of a run stay, and so do pages that were prefetched and never read.

        Raises:
            ClosedError: the store was closed.
        """
        self._require_open()
        starts, stops = np.clip(starts, 0, self.n_rows), np.clip(stops, 0, self.n_rows)
        if self._runs:
            ends = (stops - 1) * self._row_stride + self._row_nbytes
            paging.drop_ranges(self._address + starts * self._row_stride, self._address + ends)

    @property
    def mapped_nbytes(self) -> int:
        """Bytes from the first value to the last."""
        return self._span

    @property
    def row_stride(self) -> int:
        """Bytes from one row to the next in the file."""
        return self._row_stride

    @property
    def has_raw_rows(self) -> bool:
        """Whether a row's bytes in the file are those returned: one run, in this machine's byte order and dtype."""
        return self._runs and self._plain

    def _address_of(self, start: int) -> tuple[int, object]:
        fmap = self._open_map()
        return self._address + start, fmap

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        if self._runs and start < stop:
            begin, length = self._byte_range(start, stop)
            if length > LARGE_VIEW and self._prefetcher is not None:
                self._prefetcher.advise("normal")
            elif length > SMALL_VIEW:
                self._prefetch_bytes(begin, length)
        return super()._rows(start, stop)

    def _part(self, start: int, stop: int) -> torch.Tensor:
        self._require_whole_file()
        return super()._part(start, stop)

    def _scan_ahead(self, start: int, stop: int) -> None:
        if self._runs:
            self._prefetch_bytes(*self._byte_range(start, stop))

    def _scan_behind(self, start: int, stop: int) -> None:
        if self._runs:
            begin, length = self._byte_range(start, stop)
            paging.drop(self._address + begin, length, self._open_map().fileno(), self._offset + begin)

    def _byte_range(self, start: int, stop: int) -> tuple[int, int]:
        """Offset from the tensor's first byte and length of rows start to stop, which must be runs."""
        return start * self._row_stride, (stop - 1 - start) * self._row_stride + self._row_nbytes

    def _open_map(self) -> FileMap:
        if self._fmap is None:
            raise self._closed_error()
        return self._fmap

    def close(self) -> None:
        """Release the map; existing views stay valid and keep it open as long as they live."""
        super().close()
        self._fmap = None
