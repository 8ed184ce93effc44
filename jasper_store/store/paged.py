"""Rows read through maps of files, gathered at the pace of the disk: what one extent and many parts have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch

from jasper_store.errors import CorruptFileError
from jasper_store.native.gather import MapFaultError
from jasper_store.paging import madvise as paging
from jasper_store.paging.row_prefetcher import CHUNK_ROWS, RowPrefetcher
from jasper_store.store.resident import HostTensor, empty_rows
from jasper_store.store.rows import host_rows, out_of_range

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from jasper_store.paging.madvise import Access
    from jasper_store.store.rows import Rows

__all__ = ["LARGE_VIEW", "SMALL_TENSOR", "SMALL_VIEW", "PagedTensor"]

SMALL_TENSOR = 1 << 20
"""Bytes up to which a tensor is prefetched once and whole."""
SMALL_VIEW = 64 << 10
"""Bytes up to which a view is left to page faults; larger ones up to :data:`LARGE_VIEW` are prefetched whole."""
LARGE_VIEW = 64 << 20


class PagedTensor(HostTensor):
    """Rows read through maps; the kernel decides which pages stay in memory.

    Its bytes count from the first value to the last as the file, or one part after another, has them.
    """

    _is_mapped = True
    _prefetcher: RowPrefetcher | None
    _prefetch_whole: bool

    def _gather(self, source: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        self._require_whole_file()
        prefetcher = self._prefetcher
        try:
            if prefetcher is None:
                self._prefetch_small()
                return self._gather_now(source, rows, out)
            if prefetcher.before_gather(rows):
                got = self._gather_at_disk_pace(prefetcher, source, rows, out)
            else:
                got = self._gather_now(source, rows, out)
        except MapFaultError as exc:
            self._require_whole_file()
            raise _unreadable(self._path_at(exc.address), self.name) from exc
        prefetcher.after_gather(rows.shape[0])
        return got

    def _gather_at_disk_pace(
        self, prefetcher: RowPrefetcher, source: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Gather with one thread.

        With several, those that wait at the end of a gather are woken late after waiting for the disk: 7 ms instead of 0.1
        to 1 ms a batch on two busy cores. The setting is per thread, 0.2 us.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            if prefetcher.has_queue:
                return self._gather_in_chunks(prefetcher, source, rows, out)
            return self._gather_now(source, rows, out)
        finally:
            torch.set_num_threads(threads)

    def _gather_in_chunks(
        self, prefetcher: RowPrefetcher, source: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Gather chunk by chunk, and prefetch a queued chunk before each."""
        if len(rows) <= CHUNK_ROWS or out_of_range(rows, self.n_rows, self.name) is not None:
            prefetcher.prefetch_chunk()
            return self._gather_now(source, rows, out)
        if out is None:
            out = empty_rows((len(rows), *self.row_shape), self.dtype, len(rows) * self.row_nbytes)
        for start in range(0, len(rows), CHUNK_ROWS):
            prefetcher.prefetch_chunk()
            chunk = slice(start, start + CHUNK_ROWS)
            self._gather_now(source, rows[chunk], out[chunk])
        return out

    @abstractmethod
    def _path_at(self, address: int) -> Path:
        """The file that is mapped at an address."""

    @abstractmethod
    def _require_whole_file(self) -> None:
        """Raise if a file was truncated since it was mapped: touching a page beyond its end would end the process.

        It cannot protect views returned before, nor detect a truncation after it.

        Raises:
            CorruptFileError: a file ends before the end of this tensor.
        """

    def _prefetch_small(self) -> None:
        """Prefetch a small tensor as a whole when it is first used."""
        if self._prefetch_whole:
            self._prefetch_whole = False
            self._prefetch_bytes(0, self.mapped_nbytes)

    @abstractmethod
    def _prefetch_bytes(self, begin: int, length: int) -> None:
        """Ask the kernel to read some bytes."""

    def prefetch(self, rows: Rows) -> None:
        """Ask the kernel to read these rows, and return without waiting for them.

        If one thread prefetches and takes in turn, only the first of many rows are requested now. The next ``take``
        requests the others in chunks between its gathers; with 1,000 rows ahead, enough reads are then in flight.

        Nothing is requested while rows prefetched lately turn out to be cached already. If one thread prefetches and
        takes in turn, its own page faults tell when that ends; else one call in 64 checks. The next ``take`` relies on
        this call and prefetches nothing itself.

        Rows out of range are skipped; ``take`` raises for them. Rows that are scattered over the file (see the plan)
        are not prefetched: that would need a range per value.

        Raises:
            ClosedError: the store was closed.
        """
        self._require_open()
        if self._prefetcher is None:
            self._prefetch_small()
        else:
            self._prefetcher.prefetch_ahead(host_rows(rows, self.name))

    @property
    def prefetching(self) -> bool:
        """Whether :meth:`prefetch` passes rows on now: not if rows prefetched lately were cached already."""
        return self._prefetcher is not None and self._prefetcher.prefetching

    @property
    def advice(self) -> Access:
        """The access pattern that the kernel was told: ``"random"`` for rows, ``"normal"`` for large views."""
        return "normal" if self._prefetcher is None else self._prefetcher.advice

    @property
    @abstractmethod
    def mapped_nbytes(self) -> int:
        """Bytes from the first value to the last."""

    @property
    @abstractmethod
    def has_raw_rows(self) -> bool:
        """Whether a row's bytes in the file are those returned: one run, in this machine's byte order and dtype."""

    @abstractmethod
    def drop_runs(self, starts: np.ndarray, stops: np.ndarray) -> None:
        """Ask the system to evict the pages of many runs of rows, in as few system calls as possible.

        Pages shared with rows outside of a run stay, and so do pages that were prefetched and never read.

        Raises:
            ClosedError: the store was closed.
        """

    @abstractmethod
    def _address_of(self, start: int) -> tuple[int, object]:
        """Address of a byte, and what keeps it valid."""

    def populate(self, start: int, stop: int, ahead: int) -> bool:
        """Bring bytes [start, stop) into memory and into this process's page table.

        Args:
            start: first byte, counted from the tensor's first.
            stop: end of the bytes to wait for; in the same file as ``start``, and without a gap.
            ahead: end of the bytes to prefetch without waiting; likewise.

        Returns:
            False if the system has no such call, or a page could not be read.

        Raises:
            ClosedError: the store was closed.
        """
        self._require_open()
        # Where read-ahead is off, populating alone would wait for one page after the other.
        self._prefetch_bytes(start, ahead - start)
        address, _held = self._address_of(start)
        return paging.populate(address, stop - start)


def _unreadable(path: Path, name: str) -> CorruptFileError:
    return CorruptFileError(
        f"{path}: a page of {name} could not be read: the file was truncated while its rows were copied, or the disk "
        "failed (the system's log says so); restore or convert the file, then open the dataset again",
        path=path,
        tensor=name,
    )
