"""Rows read through a private map of their file, wherever the format put them."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from jasper_store.errors import CorruptFileError
from jasper_store.formats.base import Extent, contiguous_strides
from jasper_store.paging import madvise as paging
from jasper_store.paging.mapping import mappable, view
from jasper_store.paging.prefetch_policy import PrefetchPolicy
from jasper_store.store.resident import HostTensor, empty_rows
from jasper_store.store.rows import as_rows, out_of_range
from jasper_store.store.tensors import span_nbytes

if TYPE_CHECKING:
    from jasper_store.formats.base import TensorSpec
    from jasper_store.paging.madvise import Access
    from jasper_store.paging.mapping import FileMap
    from jasper_store.store.rows import Rows

__all__ = ["MappedTensor", "rows_are_runs", "why_not_mappable"]

# Tensors up to this size are announced once and whole.
_SMALL_TENSOR = 1 << 20
# Batches that a look-ahead can be ahead of the gathers and still be relied on.
_MAX_AHEAD = 64
# A look-ahead whose gathers happen in another process learns of pages that were evicted by announcing now and then.
_PROBE_EVERY = 64
# Gathers are accounted for in portions of this many rows.
_WATCH_ROWS = 1024
_TURN: Final = 256
"""Rows of a batch that are gathered before more are announced. A large batch that is announced at once fills the
disk's queue and waits for it, and while it is gathered then, the queue runs empty: 2 048 rows at a time, 101 k rows/s
so and 118 k by turns, where single reads of the disk gave 97 k (docs/notes-paging.md)."""
# Views of up to this many bytes are left to page faults; of more than that are not announced in one go.
_SMALL_VIEW = 64 << 10
_LARGE_VIEW = 64 << 20


def rows_are_runs(spec: TensorSpec) -> bool:
    """Whether each row is one run of bytes in the file, so that reading it touches as few pages as it can."""
    if not isinstance(spec.location, Extent):
        return False
    strides, shape = spec.location.strides, spec.shape
    if strides is None or not shape or 0 in shape:
        return True
    inner = contiguous_strides(shape[1:])
    return all(s == e for s, e, n in zip(strides[1:], inner, shape[1:], strict=True) if n > 1)


def why_not_mappable(spec: TensorSpec) -> str:
    """Why rows cannot be read through a map; ``""`` if they can."""
    if not isinstance(spec.location, Extent):
        return "it has no single place in its file"
    if sys.byteorder != "little":
        return "this machine is big-endian, and the files are little-endian"
    if not mappable(spec.location.offset, spec.dtype) and not spec.contiguous:
        return "it is neither aligned nor contiguous in its file"
    return ""


class MappedTensor(HostTensor):
    """Rows read through a map of the file; the pages are the kernel's, to keep or to take back.

    Data that lies unaligned in its file is gathered as bytes, and data that is narrowed to another dtype is
    converted after the gather: both cost a pass over the rows taken, and have no views.

    Args:
        spec: what the file's header says; its location is an :class:`~jasper_store.formats.base.Extent`.
        fmap: the map of its file.
        dtype: floating dtype to hand out instead of the stored one.
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
        # Tensors that are a few pages, and rows that are not runs, are read in whole or left to page faults.
        self._watch = PrefetchPolicy() if self._runs and self._span > _SMALL_TENSOR else None
        self._ahead = PrefetchPolicy(probe_every=_PROBE_EVERY)
        self._looks_ahead = False
        self._announced = 0
        # What was named ahead and is handed over by turns with what is gathered, in pieces; see announce().
        self._later: deque[torch.Tensor] = deque()
        self._taken_by = 0  # the thread of the last gather since rows were named; 0: none
        self._unwatched = 0
        self._settled = self._span > _SMALL_TENSOR
        self._advice: Access = "normal"
        if self._watch is not None:
            self._advise("random")

    def _advise(self, how: Access) -> None:
        # Around random rows the kernel's read-ahead reads mostly what nobody asked for, and scans announce what
        # they need; but whoever walks through a large view has nothing else.
        if self._span and how != self._advice:
            paging.advise(self._address, self._span, how)
            self._advice = how

    def _gather(self, source: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        self._require_whole_file()
        watch = self._watch
        if watch is None:
            self._settle()
            return super()._gather(source, rows, out)
        if self._announced:
            # Somebody looks ahead and has announced these rows, or rows like them.
            self._announced -= 1
        elif watch.should_prefetch():
            self._advise("random")
            watch.announce(self._ranges(rows))
        if (self._ahead if self._looks_ahead else watch).prefetching:
            # The disk sets the pace. Threads that wait for each other at the end of a gather are woken late after
            # such waits: 7 ms instead of 0.1 to 1 ms a batch on two busy cores. Of this thread's own setting, 0.2 us.
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                got = self._by_turns(source, rows, out) if self._later else super()._gather(source, rows, out)
            finally:
                torch.set_num_threads(threads)
        else:
            got = super()._gather(source, rows, out)
        self._taken_by = threading.get_ident()
        self._unwatched += len(rows)
        if self._unwatched >= _WATCH_ROWS:
            # Asking for the fault counters costs as much as gathering a few rows.
            watch.after(self._unwatched)
            if self._looks_ahead:
                self._ahead.after(self._unwatched)
            self._unwatched = 0
        return got

    def _by_turns(self, source: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """Gather a batch a piece at a time, and hand over a piece of what was named ahead before each."""
        if len(rows) <= _TURN or out_of_range(rows, self.n_rows, self.name) is not None:
            self._hand_over()
            return super()._gather(source, rows, out)
        if out is None:
            out = empty_rows((len(rows), *self.row_shape), self.dtype, len(rows) * self.row_nbytes)
        for start in range(0, len(rows), _TURN):
            self._hand_over()
            turn = slice(start, start + _TURN)
            super()._gather(source, rows[turn], out[turn])
        return out

    def _hand_over(self) -> None:
        try:
            rows = self._later.popleft()
        except IndexError:
            return
        self._ahead.announce(self._ranges(rows))

    def _require_whole_file(self) -> None:
        """Refuse to touch pages beyond the end of a file that was cut since it was mapped: that ends the process.

        Half a microsecond; it cannot help views handed out before, nor a file that is cut in this very moment.

        Raises:
            CorruptFileError: the file no longer reaches to the end of this tensor.
        """
        fmap = self._fmap
        if fmap is not None and os.fstat(fmap.fileno()).st_size < self._offset + self._span:
            msg = (
                f"{self.path}: the file was truncated or is being rewritten in place while {self.name} is mapped; "
                "write a new file and rename it over the old one (as torch.save to a temporary name and os.replace "
                "do), then open the dataset again"
            )
            raise CorruptFileError(msg, path=self.path, tensor=self.name)

    def _settle(self) -> None:
        """Have a small tensor read in whole when it is first needed; it is not worth watching afterwards."""
        if not self._settled:
            self._settled = True
            if self._span:
                paging.madvise_batcher().announce(paging.span(self._address, self._span))

    def _ranges(self, rows: torch.Tensor) -> np.ndarray:
        wanted = rows.numpy()
        inside = (wanted >= 0) & (wanted < self.n_rows)
        if not inside.all():
            wanted = wanted[inside]
        return paging.row_ranges(self._address, self._row_stride, self._row_nbytes, wanted)

    def announce(self, rows: Rows) -> None:
        """Ask the kernel to read these rows in, and return at once.

        Where announcing and taking alternate in one thread, only the first of many rows are asked for now, and the
        others by turns with the gathers of the next ``take``. Enough are on their way then with 1,000 rows ahead.

        Nothing is asked while rows announced lately turned out to be in memory already; one call in 64 makes
        sure that this is still so. The next ``take`` relies on it and announces nothing of its own.

        Rows out of range are left out: it is ``take`` that complains. Rows that are scattered over the file (see
        the plan) are not announced: that would be a range per value.

        Raises:
            ClosedError: the store was closed.
        """
        self._require_open()
        named = as_rows(rows, self.name).cpu()
        if self._watch is None:
            self._settle()
            return
        self._looks_ahead = True
        self._announced = min(self._announced + 1, _MAX_AHEAD)
        if not self._ahead.prefetching:
            self._later.clear()
        while self._later:
            self._hand_over()
        by_turns = self._taken_by == threading.get_ident()
        self._taken_by = 0
        if self._ahead.should_prefetch():
            self._advise("random")
            if by_turns and len(named) > _TURN:
                self._later.extend(named[start : start + _TURN] for start in range(_TURN, len(named), _TURN))
                named = named[:_TURN]
            self._ahead.announce(self._ranges(named))

    @property
    def prefetching(self) -> bool:
        """Whether announced rows are passed on now: not once those announced lately were in memory already."""
        return self._watch is not None and self._ahead.prefetching

    def residency(self) -> int:
        """Bytes of its file range that are in the page cache now."""
        fmap = self._open_map()
        return paging.residency(self._address, self._span, fmap.fileno(), self._offset)

    def drop(self) -> None:
        """Ask the system to take its pages back, out of this process and out of the page cache.

        They are read again when needed; private writes through views survive.
        """
        fmap = self._open_map()
        paging.drop(self._address, self._span, fmap.fileno(), self._offset)

    def drop_runs(self, starts: np.ndarray, stops: np.ndarray) -> None:
        """Let the system have the pages of many runs of rows again, in as few calls as there may be.

        Pages shared with rows outside of a run stay, and so do pages that were announced and never read.

        Raises:
            ClosedError: the store was closed.
        """
        self._require_open()
        starts, stops = np.clip(starts, 0, self.n_rows), np.clip(stops, 0, self.n_rows)
        if self._runs:
            ends = (stops - 1) * self._row_stride + self._row_nbytes
            paging.drop_ranges(self._address + starts * self._row_stride, self._address + ends)

    @property
    def advice(self) -> Access:
        """How the kernel was told that its pages will be touched: ``"random"``, or ``"normal"`` for large views."""
        return self._advice

    @property
    def byte_range(self) -> tuple[int, int]:
        """Offset in the file, and length, of the bytes from its first value to its last."""
        return self._offset, self._span

    @property
    def row_stride(self) -> int:
        """Bytes from one row of the file to the next."""
        return self._row_stride

    @property
    def stageable(self) -> bool:
        """Whether a row's bytes in the file are what is handed out: a run, in this machine's order and dtype."""
        return self._runs and self._plain

    def populate(self, start: int, stop: int, ahead: int) -> bool:
        """Bring bytes [start, stop) of its range into memory and into this process's page table.

        Args:
            start: first byte, counted from the tensor's first.
            stop: end of the bytes to wait for.
            ahead: end of the bytes to ask for without waiting.

        Returns:
            False where the system has no such call, or a page could not be read.

        Raises:
            ClosedError: the store was closed.
        """
        self._require_open()
        # Where read-ahead is off, populating alone would wait for one page after the other.
        paging.madvise_batcher().announce(paging.span(self._address + start, ahead - start))
        return paging.populate(self._address + start, stop - start)

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        if self._runs and start < stop:
            begin, length = self._byte_range(start, stop)
            if length > _LARGE_VIEW:
                self._advise("normal")
            elif length > _SMALL_VIEW:
                paging.madvise_batcher().announce(paging.span(self._address + begin, length))
        return super()._rows(start, stop)

    def _part(self, start: int, stop: int) -> torch.Tensor:
        self._require_whole_file()
        return super()._part(start, stop)

    def _scan_ahead(self, start: int, stop: int) -> None:
        if self._runs:
            begin, length = self._byte_range(start, stop)
            paging.madvise_batcher().announce(paging.span(self._address + begin, length))

    def _scan_behind(self, start: int, stop: int) -> None:
        if self._runs:
            begin, length = self._byte_range(start, stop)
            paging.drop(self._address + begin, length, self._open_map().fileno(), self._offset + begin)

    def _byte_range(self, start: int, stop: int) -> tuple[int, int]:
        """Offset from the tensor's first byte, and length, of rows start to stop, which are runs."""
        return start * self._row_stride, (stop - 1 - start) * self._row_stride + self._row_nbytes

    def _open_map(self) -> FileMap:
        if self._fmap is None:
            raise self._closed_error()
        return self._fmap

    def close(self) -> None:
        """Let go of the map; views stay valid and hold it as long as they live."""
        super().close()
        self._fmap = None
