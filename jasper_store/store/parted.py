"""Rows of a tensor that lies in several parts, read through maps of their files."""

from __future__ import annotations

import functools
from bisect import bisect_right
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from jasper_store.formats.base import Parts
from jasper_store.native import gather
from jasper_store.native.gather import Jobs, Source, SourceGather
from jasper_store.paging import madvise as paging, residency
from jasper_store.paging.mapping import mappable, view
from jasper_store.paging.row_prefetcher import RowPrefetcher
from jasper_store.store.paged import LARGE_VIEW, SMALL_TENSOR, SMALL_VIEW, PagedTensor
from jasper_store.store.part_maps import PartMaps
from jasper_store.store.resident import empty_rows
from jasper_store.store.rows import refused
from jasper_store.store.tensors import byte_runs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from jasper_store.formats.base import TensorSpec
    from jasper_store.store.tensors import ByteRun

__all__ = ["PartedTensor"]

_ANYWHERE: Final = 2**63 - 1


class PartedTensor(PagedTensor):
    """Rows of a tensor in several parts: each row is found by a table, and gathered from its address.

    Slices within a part are views of its file; slices across parts, and the whole, are copies.

    Args:
        spec: the tensor; its location is :class:`~jasper_store.formats.base.Parts`.
        dtype: floating dtype of the rows that are returned, instead of the stored one.
    """

    def __init__(self, spec: TensorSpec, *, dtype: torch.dtype | None = None) -> None:
        place = spec.location
        assert isinstance(place, Parts)
        # What gathers read from is memory as a whole, by address; it is no tensor, and this one stands for its dtype.
        nothing = torch.empty((0, *spec.shape[1:]), dtype=spec.dtype, device="cpu")
        super().__init__(spec, nothing, "mmap", dtype=dtype)
        self._copies = True
        self._row_nbytes = spec.row_nbytes
        self._maps = PartMaps(spec.name, place.files, place.file_of, place.offsets, place.starts, spec.row_nbytes)
        self._memory = Source(nothing, tuple(self.row_shape), spec.row_nbytes, (0, _ANYWHERE, spec.row_nbytes, 1))
        large = spec.nbytes > SMALL_TENSOR
        self._prefetch_whole = not large
        self._prefetcher = (
            RowPrefetcher(0, 1, spec.row_nbytes, spec.n_rows, locate=self._locate, advise=self._maps.advise)
            if large
            else None
        )

    # ---- rows

    def _gather_now(self, source: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        if self._plain and (out is None or out.is_contiguous()) and self._all_mapped() is not None:
            return super()._gather_now(source, rows, out)
        direct = self._plain and out is not None and out.is_contiguous()
        found = out if direct else None
        if found is None:
            found = empty_rows((len(rows), *self.row_shape), source.dtype, len(rows) * self._row_nbytes)
        self._copy_rows(rows, found)
        if not self._plain:
            found = self._restore(found)
        return found if direct or out is None else out.copy_(found)

    def _copy_rows(self, rows: torch.Tensor, target: torch.Tensor) -> None:
        """Rows as they are stored, to contiguous memory."""
        kernel = self._all_mapped()
        if kernel is not None:
            if not kernel.run(rows, len(rows), target):
                raise refused(rows, self.n_rows, self.name)
            return
        where, bad, held = self._maps.locate(rows)
        if bad >= 0:
            raise refused(rows, self.n_rows, self.name)
        if gather.kernel() is None:
            self._copy_by_parts(rows, target)
            return
        jobs = Jobs()
        jobs.add(self._memory, where, target)
        jobs.run(mapped=True)
        del held  # until now the maps had to stay

    def _all_mapped(self) -> SourceGather | None:
        """What gathers from all parts, once all are mapped: they stay so until the tensor is closed."""
        if self._kernel is None:
            placed = self._maps.placed()
            if placed is not None and gather.kernel() is not None:
                source = self._memory._replace(numbers=placed.numbers)
                self._kernel = SourceGather(source, mapped=True, keep=placed)
        return self._kernel

    def _copy_by_parts(self, rows: torch.Tensor, target: torch.Tensor) -> None:
        """Without the kernel: part by part."""
        parts = torch.from_numpy(np.asarray(self._maps.table.parts_of(rows.numpy())))
        for part in set(parts.tolist()):
            places = (parts == part).nonzero().view(-1)
            first, last = self._rows_of(part)
            target[places] = self._slice(part, first, last).view(target.dtype)[rows[places] - first]

    def _locate(self, rows: np.ndarray) -> np.ndarray:
        """Addresses of rows for prefetching, which may be wrong if maps are released meanwhile."""
        addresses, _, _held = self._maps.locate(torch.from_numpy(rows))
        found: np.ndarray = addresses.numpy()
        return found

    # ---- slices

    def _rows_of(self, part: int) -> tuple[int, int]:
        starts = self._maps.table.starts
        return int(starts[part]), int(starts[part + 1])

    def _parts_between(self, start: int, stop: int) -> range:
        starts = self._maps.table.starts
        return range(bisect_right(starts, start) - 1, bisect_right(starts, stop - 1))

    def _slice(self, part: int, start: int, stop: int) -> torch.Tensor:
        """Rows of one part as they are stored: a view of its file, or a copy where there can be none."""
        fmap, offset = self._maps.mapped(part)
        first, _ = self._rows_of(part)
        shape, begin = (stop - start, *self.row_shape), offset + (start - first) * self._row_nbytes
        stored = self.spec.dtype
        if not self._row_nbytes:
            return torch.empty(shape, dtype=stored)
        if mappable(begin, stored) and fmap.writable:
            return view(fmap, begin, stored, shape)
        raw = view(fmap, begin, torch.uint8, ((stop - start) * self._row_nbytes,)).clone()
        return raw.view(stored).view(shape)

    def _part(self, start: int, stop: int) -> torch.Tensor:
        self._require_open()
        self._require_whole_file()
        if start >= stop:
            return torch.empty((0, *self.row_shape), dtype=self.dtype)
        found = self._parts_between(start, stop)
        if len(found) == 1:
            return self._slice(found[0], start, stop).to(self.dtype)
        out = empty_rows((stop - start, *self.row_shape), self.dtype, (stop - start) * self.row_nbytes)
        for part in found:
            first, last = self._rows_of(part)
            first, last = max(first, start), min(last, stop)
            out[first - start : last - start].copy_(self._slice(part, first, last))
        return out

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        length = (stop - start) * self._row_nbytes
        if SMALL_VIEW < length <= LARGE_VIEW:
            self._prefetch_bytes(start * self._row_nbytes, length)
        elif length > LARGE_VIEW and self._prefetcher is not None:
            self._prefetcher.advise("normal")
        return self._part(start, stop)

    # ---- pages

    def _require_whole_file(self) -> None:
        self._maps.check_next()

    def _path_at(self, address: int) -> Path:
        return self._maps.path_at(address)

    def _runs(self, begin: int, length: int) -> Iterator[tuple[int, int, object]]:
        """Address and length of the pieces of some bytes of the tensor, one for each part, and what keeps them valid."""
        if not length or not self._row_nbytes:
            return
        first_row, last_row = begin // self._row_nbytes, (begin + length - 1) // self._row_nbytes
        for part in self._parts_between(first_row, last_row + 1):
            first, last = (row * self._row_nbytes for row in self._rows_of(part))
            start, stop = max(first, begin), min(last, begin + length)
            fmap, offset = self._maps.mapped(part)
            yield fmap.address + offset + start - first, stop - start, fmap

    def _address_of(self, start: int) -> tuple[int, object]:
        address, _, held = next(self._runs(start, 1))
        return address, held

    def _prefetch_bytes(self, begin: int, length: int) -> None:
        for address, nbytes, _held in self._runs(begin, length):
            paging.madvise_batcher().prefetch(paging.span(address, nbytes))

    def _scan_ahead(self, start: int, stop: int) -> None:
        self._prefetch_bytes(start * self._row_nbytes, (stop - start) * self._row_nbytes)

    def _scan_behind(self, start: int, stop: int) -> None:
        for address, nbytes, _held in self._runs(start * self._row_nbytes, (stop - start) * self._row_nbytes):
            paging.drop(address, nbytes)

    def residency(self) -> int:
        """Bytes of its parts that are in the page cache."""
        self._require_open()
        return sum(residency.cached_bytes(*run) or 0 for run in self._byte_runs)

    def drop(self) -> None:
        """Ask the system to evict its pages from this process and from the page cache; see :class:`MappedTensor`."""
        self._require_open()
        # Only what this process has mapped is in its page table.
        for address, nbytes, _held in self._runs(0, self.spec.nbytes):
            paging.drop(address, nbytes)
        for path, offset, nbytes in self._byte_runs:
            residency.drop_cache(path, offset, nbytes)

    def drop_runs(self, starts: np.ndarray, stops: np.ndarray) -> None:
        """Ask the system to evict the pages of many runs of rows; see :class:`PagedTensor`."""
        self._require_open()
        starts, stops = np.clip(starts, 0, self.n_rows), np.clip(stops, 0, self.n_rows)
        starts, stops = starts[starts < stops], stops[starts < stops]
        if not len(starts):
            return
        # A run that crosses parts becomes one run in each.
        bounds = self._maps.table.starts
        first, last = self._maps.table.parts_of(starts), self._maps.table.parts_of(stops - 1)
        counts = last - first + 1
        which = np.repeat(np.arange(len(starts)), counts)
        parts = np.repeat(first, counts) + np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        begin, end = np.maximum(starts[which], bounds[parts]), np.minimum(stops[which], bounds[parts + 1])
        addresses, _, _held = self._maps.locate(torch.from_numpy(begin))
        where = addresses.numpy()
        paging.drop_ranges(where, where + (end - begin) * self._row_nbytes)

    @functools.cached_property
    def _byte_runs(self) -> list[ByteRun]:
        return list(byte_runs(self.spec))

    @property
    def mapped_nbytes(self) -> int:
        """Bytes of all parts."""
        return self.spec.nbytes

    @property
    def has_raw_rows(self) -> bool:
        """Whether a row's bytes in the file are those returned."""
        return self._plain and self._row_nbytes > 0

    def close(self) -> None:
        """Release the maps; existing views stay valid and keep theirs as long as they live."""
        super().close()
        self._maps.close()
