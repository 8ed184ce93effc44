"""Reads rows of chunked or compressed HDF5 datasets, each needed chunk once per call, in parallel.

h5py reads one selection at a time under one lock, inflating on one core. Here the library is only asked where a
chunk lies; its bytes are read, inflated and unshuffled by threads outside the lock, and only the wanted rows are
unshuffled. That works for shuffle and gzip, alone or together, which is what nearly all files use; any other
filter, and layouts without chunks, go through h5py, still reading each chunk once.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jasper_store.errors import ClosedError, IncompatibleOptionsError
from jasper_store.formats.base import Chunked
from jasper_store.formats.files import tensor_bytes
from jasper_store.formats.hdf5.source import Job, OpenChunks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from jasper_store.formats.base import TensorSpec

__all__ = ["ChunkedReader"]


class ChunkedReader:
    """Rows of one dataset. Opens lazily, once per process; pickles and forks without carrying a handle along.

    One reader may be used by several threads at once. A call that runs while another thread closes the reader ends
    as if it had not been closed; the file is closed when the last one has ended.
    """

    def __init__(self, spec: TensorSpec) -> None:
        """Remember what to read; nothing is opened.

        Raises:
            IncompatibleOptionsError: the tensor has an extent, and is read without this class.
        """
        if not isinstance(spec.location, Chunked) or not spec.shape:
            raise IncompatibleOptionsError(f"{spec.path}: {spec.name!r} is not stored in chunks.", tensor=spec.name)
        self.spec = spec
        self._lock = threading.Lock()
        self._open: OpenChunks | None = None
        self._closed = False

    def __getstate__(self) -> dict[str, Any]:
        return {"spec": self.spec, "closed": self._closed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.spec = state["spec"]
        self._lock = threading.Lock()
        self._open = None
        self._closed = state["closed"]

    def read_rows(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Gather rows in any order, repeats allowed.

        Args:
            rows: int64 [n].
            out: [n, *row_shape] of the spec's dtype, contiguous, in host memory; filled in place.

        Raises:
            IndexError: a row outside ``[0, n_rows)``.
            CorruptFileError: a chunk is damaged, or the file changed under the reader.
            ClosedError: the reader was closed before.
        """
        wanted = rows.numpy()
        with self._source() as source:
            target = self._bytes_of(out, len(wanted))
            if not len(wanted) or not target.size:
                return
            if wanted.min() < 0 or wanted.max() >= self.spec.n_rows:
                bad = wanted[(wanted < 0) | (wanted >= self.spec.n_rows)][0]
                raise IndexError(f"{self.spec.name}: row {bad} is outside [0, {self.spec.n_rows}).")
            source.run(_jobs_for_rows(wanted, source.chunk[0]), target)

    def read_block(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Read rows ``start`` up to ``stop``; otherwise as :meth:`read_rows`."""
        with self._source() as source:
            if not 0 <= start <= stop <= self.spec.n_rows:
                raise IndexError(f"{self.spec.name}: rows {start}:{stop} are outside [0, {self.spec.n_rows}].")
            target = self._bytes_of(out, stop - start)
            if target.size:
                source.run(_jobs_for_block(start, stop, source.chunk[0]), target)

    def close(self) -> None:
        """Close the file once no call reads from it; reading afterwards raises ClosedError. Safe to call twice."""
        # In this order: a thread that is opening the file checks _closed after it has set _open.
        self._closed = True
        source, self._open = self._open, None
        if source is not None:
            source.close()

    def _bytes_of(self, out: torch.Tensor, rows: int) -> NDArray[np.uint8]:
        """``out`` as bytes [rows, elements of a row, itemsize]."""
        shape, dtype = (rows, *self.spec.shape[1:]), self.spec.dtype
        if tuple(out.shape) != shape or out.dtype != dtype or not out.is_contiguous() or out.device.type != "cpu":
            raise IncompatibleOptionsError(
                f"{self.spec.name}: out must be contiguous host memory of {dtype} {list(shape)}, "
                f"found {out.dtype} {list(out.shape)} on {out.device}.",
                tensor=self.spec.name,
            )
        return tensor_bytes(out).reshape(rows, math.prod(shape[1:]), dtype.itemsize)

    @contextmanager
    def _source(self) -> Iterator[OpenChunks]:
        """The file, which stays open inside the ``with`` block."""
        source = self._opened()
        if not source.acquire():
            raise self._was_closed()
        try:
            yield source
        finally:
            source.release()

    def _opened(self) -> OpenChunks:
        source = self._open
        if not self._closed and (source is None or source.pid != os.getpid()):
            with self._lock:
                source = self._open
                if source is None or source.pid != os.getpid():
                    # In a forked child the parent's handles are dropped, never used.
                    source = self._open = OpenChunks(self.spec, None if source is None else source.index)
        if self._closed:
            self.close()
            raise self._was_closed()
        assert source is not None
        return source

    def _was_closed(self) -> ClosedError:
        return ClosedError(f"{self.spec.path}: {self.spec.name!r} was closed.", tensor=self.spec.name)


def _jobs_for_rows(rows: NDArray[np.int64], chunk_rows: int) -> Iterator[Job]:
    """One job per row of chunks that holds any of the rows."""
    index = rows // chunk_rows
    order = np.argsort(index, kind="stable")
    index = index[order]
    bounds = np.flatnonzero(np.concatenate([[True], index[1:] != index[:-1], [True]]))
    for begin, end in itertools.pairwise(bounds.tolist()):
        at = order[begin:end]
        first = int(index[begin])
        yield Job(first, rows[at] - first * chunk_rows, at)


def _jobs_for_block(start: int, stop: int, chunk_rows: int) -> Iterator[Job]:
    for index in range(start // chunk_rows, -(-stop // chunk_rows)):
        first = index * chunk_rows
        low, high = max(start, first), min(stop, first + chunk_rows)
        yield Job(index, slice(low - first, high - first), slice(low - start, high - start))
