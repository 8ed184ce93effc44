"""Prefetching of the rows of one mapped tensor: for its own gathers, and for callers that name rows ahead of them.

Two policies decide, because the two kinds of use learn different things. A gather prefetches its own rows and sees its
own page faults. A caller that prefetches ahead asks for rows of later batches, which another process may gather.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Final

from jasper_store.paging import madvise
from jasper_store.paging.prefetch_policy import PrefetchPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import torch

    from jasper_store.paging.madvise import Access

__all__ = ["CHUNK_ROWS", "RowPrefetcher"]

CHUNK_ROWS: Final = 256
"""Rows that are prefetched at once while prefetching alternates with gathers. A large batch that is prefetched at once
fills the disk's queue and waits for it, and while it is gathered, the queue runs empty: 2,048 rows at a time gave
101 k rows/s, alternating chunks 118 k, where single reads of the disk gave 97 k (docs/notes-paging.md)."""
# Prefetch calls that such a caller may be ahead of the gathers and still be relied on.
_MAX_CALLS_AHEAD: Final = 64
# If its gathers run in another process, evicted pages are detected by a prefetch now and then.
_PROBE_EVERY: Final = 64
# Rows between two reads of the fault counters, which cost as much as gathering a few rows.
_RECORD_ROWS: Final = 1024


class RowPrefetcher:
    """Decides which rows of a mapped tensor to prefetch, and when. Hints only: values do not depend on it.

    Per gather, call :meth:`before_gather`, gather, then :meth:`after_gather`; a caller that knows later rows calls
    :meth:`prefetch_ahead`. Calls of several threads may interleave; then some rows are prefetched twice or not at all.

    Args:
        address: address of row 0 in the map.
        row_stride: bytes from one row to the next.
        row_nbytes: bytes of a row.
        n_rows: number of rows.
        locate: addresses of rows that are in range, int64 [n]; by default they follow from ``address`` and ``row_stride``.
        advise: tells the kernel how the whole tensor will be accessed; by default, of the range that its rows span.
    """

    def __init__(
        self,
        address: int,
        row_stride: int,
        row_nbytes: int,
        n_rows: int,
        *,
        locate: Callable[[np.ndarray], np.ndarray] | None = None,
        advise: Callable[[Access], object] | None = None,
    ) -> None:
        self._address, self._row_stride, self._row_nbytes, self._n_rows = address, row_stride, row_nbytes, n_rows
        self._own = PrefetchPolicy()
        self._ahead: PrefetchPolicy | None = None  # from the first prefetch_ahead() on
        self._calls_ahead = 0  # calls of prefetch_ahead() whose rows were not gathered yet
        self._queue: deque[torch.Tensor] = deque()  # chunks of the last prefetch_ahead(), for the next gather
        self._gather_thread = 0  # thread of the last gather since the last prefetch_ahead(); 0: none
        self._unrecorded_rows = 0
        self._advice: Access = "normal"
        self._locate = locate
        self._advise = advise or self._advise_span
        self.advise("random")

    @property
    def advice(self) -> Access:
        """The access pattern that the kernel was told last."""
        return self._advice

    def advise(self, how: Access) -> None:
        """Tell the kernel how the tensor will be accessed.

        Around random rows the kernel's read-ahead reads mostly pages that are not needed, and scans prefetch what they
        need themselves; but code that walks through a large view depends on read-ahead.
        """
        if how != self._advice:
            self._advise(how)
            self._advice = how

    def _advise_span(self, how: Access) -> None:
        madvise.advise(self._address, (self._n_rows - 1) * self._row_stride + self._row_nbytes, how)

    @property
    def prefetching(self) -> bool:
        """Whether :meth:`prefetch_ahead` passes rows on: not if rows prefetched lately were cached already."""
        return self._ahead is None or self._ahead.prefetching

    @property
    def has_queue(self) -> bool:
        """Whether chunks wait for :meth:`prefetch_chunk`."""
        return bool(self._queue)

    def ranges(self, rows: torch.Tensor) -> np.ndarray:
        """Page ranges of those rows that are in range, as :func:`~jasper_store.paging.madvise.row_ranges`."""
        wanted: np.ndarray = rows.numpy()
        inside = (wanted >= 0) & (wanted < self._n_rows)
        if not inside.all():
            wanted = wanted[inside]
        if self._locate is not None:
            return madvise.row_ranges(0, 1, self._row_nbytes, self._locate(wanted))
        return madvise.row_ranges(self._address, self._row_stride, self._row_nbytes, wanted)

    def before_gather(self, rows: torch.Tensor) -> bool:
        """Prefetch the rows of a gather, unless :meth:`prefetch_ahead` has prefetched these rows, or rows like them.

        Returns:
            Whether the rows gathered lately came from the disk.
        """
        if self._calls_ahead:
            self._calls_ahead -= 1
        elif self._own.should_prefetch():
            self.advise("random")
            self._own.prefetch(self.ranges(rows))
        return (self._ahead or self._own).prefetching

    def after_gather(self, n_rows: int) -> None:
        """Record a gather of ``n_rows`` rows in the calling thread."""
        self._gather_thread = threading.get_ident()
        self._unrecorded_rows += n_rows
        if self._unrecorded_rows >= _RECORD_ROWS:
            self._own.record_gather(self._unrecorded_rows)
            if self._ahead is not None:
                self._ahead.record_gather(self._unrecorded_rows)
            self._unrecorded_rows = 0

    def prefetch_ahead(self, rows: torch.Tensor) -> None:
        """Prefetch rows of a later gather; rows out of range are skipped.

        If the same thread prefetches and gathers in turn, only the first chunk is prefetched now, and the rest
        is queued for :meth:`prefetch_chunk`.
        """
        ahead = self._ahead
        if ahead is None:
            ahead = self._ahead = PrefetchPolicy(probe_every=_PROBE_EVERY)
        if self._calls_ahead < _MAX_CALLS_AHEAD:
            self._calls_ahead += 1
        alternates = self._gather_thread == threading.get_ident()
        self._gather_thread = 0
        if not ahead.prefetching:
            self._queue.clear()
            if alternates:  # its own page faults tell when to start again
                return
        while self._queue:
            self.prefetch_chunk()
        if ahead.should_prefetch():
            self.advise("random")
            if alternates and len(rows) > CHUNK_ROWS:
                self._queue.extend(
                    rows[start : start + CHUNK_ROWS] for start in range(CHUNK_ROWS, len(rows), CHUNK_ROWS)
                )
                rows = rows[:CHUNK_ROWS]
            ahead.prefetch(self.ranges(rows))

    def prefetch_chunk(self) -> None:
        """Prefetch the oldest queued chunk, if there is one."""
        try:
            rows = self._queue.popleft()
        except IndexError:
            return
        if self._ahead is not None:
            self._ahead.prefetch(self.ranges(rows))
