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
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from jasper_store.errors import ClosedError, CorruptFileError, IncompatibleOptionsError
from jasper_store.formats.base import Chunked
from jasper_store.formats.files import open_for_reading, tensor_bytes
from jasper_store.formats.hdf5.deflate import InflateError, inflate
from jasper_store.formats.hdf5.index import GZIP, SHUFFLE, ChunkIndex, changed, identity_of, read_index
from jasper_store.formats.hdf5.library import open_dataset, open_file, translated

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from jasper_store.formats.base import TensorSpec

__all__ = ["ChunkedReader"]

# Chunks of a block that are unshuffled together. Threads wait for each other at every small step.
_RUN_NBYTES = 1 << 20

_Task = tuple["_Job", int]  # and the chunk's place in C order of the grid


@dataclass(frozen=True, slots=True)
class _Job:
    """Rows of one row of chunks: ``out[at] = dataset[first + local]``."""

    index: int
    local: slice | NDArray[np.int64]
    at: slice | NDArray[np.int64]


class ChunkedReader:
    """Rows of one dataset. Opens lazily, once per process; pickles and forks without carrying a handle along.

    One reader may be used by several threads at once, except for :meth:`close`.
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
        self._open: _Open | None = None
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
        """
        source = self._source()
        wanted = rows.numpy()
        target = self._bytes_of(out, len(wanted))
        if not len(wanted) or not target.size:
            return
        if wanted.min() < 0 or wanted.max() >= self.spec.n_rows:
            bad = wanted[(wanted < 0) | (wanted >= self.spec.n_rows)][0]
            raise IndexError(f"{self.spec.name}: row {bad} is outside [0, {self.spec.n_rows}).")
        source.run(_jobs_for_rows(wanted, source.chunk[0]), target)

    def read_block(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Read rows ``start`` up to ``stop``; otherwise as :meth:`read_rows`."""
        source = self._source()
        if not 0 <= start <= stop <= self.spec.n_rows:
            raise IndexError(f"{self.spec.name}: rows {start}:{stop} are outside [0, {self.spec.n_rows}].")
        target = self._bytes_of(out, stop - start)
        if target.size:
            source.run(_jobs_for_block(start, stop, source.chunk[0]), target)

    def close(self) -> None:
        """Close the file; reading afterwards raises ClosedError. Safe to call twice."""
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

    def _source(self) -> _Open:
        if self._closed:
            raise ClosedError(f"{self.spec.path}: {self.spec.name!r} was closed.", tensor=self.spec.name)
        source = self._open
        if source is None or source.pid != os.getpid():
            with self._lock:
                source = self._open
                if source is None or source.pid != os.getpid():
                    # In a forked child the parent's handles are dropped, never used.
                    source = self._open = _Open(self.spec, None if source is None else source.index)
        return source


def _jobs_for_rows(rows: NDArray[np.int64], chunk_rows: int) -> Iterator[_Job]:
    """One job per row of chunks that holds any of the rows."""
    index = rows // chunk_rows
    order = np.argsort(index, kind="stable")
    index = index[order]
    bounds = np.flatnonzero(np.concatenate([[True], index[1:] != index[:-1], [True]]))
    for begin, end in itertools.pairwise(bounds.tolist()):
        at = order[begin:end]
        first = int(index[begin])
        yield _Job(first, rows[at] - first * chunk_rows, at)


def _jobs_for_block(start: int, stop: int, chunk_rows: int) -> Iterator[_Job]:
    for index in range(start // chunk_rows, -(-stop // chunk_rows)):
        first = index * chunk_rows
        low, high = max(start, first), min(stop, first + chunk_rows)
        yield _Job(index, slice(low - first, high - first), slice(low - start, high - start))


class _Open:
    """The file, opened in one process: a plain descriptor where chunks are read directly, else through h5py."""

    def __init__(self, spec: TensorSpec, index: ChunkIndex | None) -> None:
        assert isinstance(spec.location, Chunked)
        self.pid = os.getpid()
        self.spec = spec
        self.key = spec.location.key
        self.pool: ThreadPoolExecutor | None = None
        self.pool_lock = threading.Lock()
        self.buffers = threading.local()
        self.handles = ExitStack()
        with ExitStack() as handles:
            file, _ = handles.enter_context(open_for_reading(spec.path))
            self.fd = file.fileno()
            identity = identity_of(os.fstat(self.fd))
            # A child process inherits the parent's index, and needs the library not at all.
            self.index = index if index is not None and index.identity == identity else read_index(spec)
            if self.index.identity != identity:
                raise changed(spec)
            if self.index.places is None:
                h5, _ = handles.enter_context(open_file(spec.path))
                self.dataset, _ = open_dataset(h5, spec.path, self.key)
            self.handles = handles.pop_all()
        self.chunk = self.index.chunk
        self.itemsize = spec.dtype.itemsize
        self.chunk_nbytes = math.prod(self.chunk) * self.itemsize
        self.columns = list(itertools.product(*(range(n) for n in self.index.grid[1:])))
        self.whole_rows = self.chunk[1:] == spec.shape[1:]

    def close(self) -> None:
        if self.pid == os.getpid():
            if self.pool is not None:
                self.pool.shutdown()
            self.handles.close()

    def corrupt(self, what: str, cause: BaseException | None = None) -> NoReturn:
        raise CorruptFileError(f"{self.spec.path}: {what}", path=self.spec.path, tensor=self.spec.name) from cause

    def run(self, jobs: Iterable[_Job], out: NDArray[np.uint8]) -> None:
        if self.index.places is None:
            with translated(self.spec.path):
                for job in jobs:
                    self.through_library(job, out)
            return
        n_columns = len(self.columns)
        tasks: list[_Task] = [(job, job.index * n_columns + i) for job in jobs for i in range(n_columns)]
        self._announce(np.array([flat for _, flat in tasks]))

        def decode(part: list[_Task]) -> None:
            for run in self._runs(part):
                if len(run) > 1:
                    self.decode_run(run, out)
                else:
                    self.decode(*run[0], out)

        # torch's own number of threads: all cores in the main process, one in a DataLoader worker.
        threads = min(torch.get_num_threads(), len(tasks))
        if threads < 2:
            decode(tasks)
            return
        with self.pool_lock:
            if self.pool is None:
                self.pool = ThreadPoolExecutor(max(torch.get_num_threads() - 1, 1), "jasper-chunks")
            pool = self.pool
        # Equal shares at once, without a queue's cost per chunk; neighbours stay together, and this thread has one.
        bounds = [len(tasks) * i // threads for i in range(threads + 1)]
        own, *others = (tasks[i:j] for i, j in itertools.pairwise(bounds))
        futures = [pool.submit(decode, part) for part in others]
        try:
            decode(own)
        finally:
            # They write into the caller's memory, so none may go on after this.
            wait(futures)
        for future in futures:
            future.result()

    def _runs(self, tasks: list[_Task]) -> Iterator[list[_Task]]:
        """The tasks in order; whole neighbouring chunks that lie in one piece in the file come together."""
        assert self.index.places is not None
        most = _RUN_NBYTES // self.chunk_nbytes
        if most < 2 or not self.whole_rows or self.index.filters != (SHUFFLE, GZIP):
            yield from ([task] for task in tasks)
            return
        offsets, sizes, masks = self.index.places
        run: list[_Task] = []
        end = -1  # of what the run holds in the file; -1 where nothing can follow
        for job, flat in tasks:
            offset, size = int(offsets[flat]), int(sizes[flat])
            whole = isinstance(job.local, slice) and job.local.stop - job.local.start == self.chunk[0]
            simple = whole and size > 0 and not masks[flat]
            if run and not (simple and offset == end and len(run) < most):
                yield run
                run = []
            run.append((job, flat))
            end = offset + size if simple else -1
        if run:
            yield run

    def decode_run(self, run: list[_Task], out: NDArray[np.uint8]) -> None:
        """Read whole chunks by one call, inflate each, and unshuffle them all into their rows of ``out``."""
        assert self.index.places is not None
        offsets, sizes, _ = (place[[flat for _, flat in run]].tolist() for place in self.index.places)
        raw = self.read(offsets[0], sum(sizes))
        parts = []
        for size in sizes:
            parts.append(self.inflated(raw[:size]))
            raw = raw[size:]
        planes = self.buffer("planes", len(run) * self.chunk_nbytes).reshape(len(run), self.itemsize, -1)
        np.concatenate(parts, out=planes.reshape(-1))
        first, last = run[0][0].at, run[-1][0].at
        assert isinstance(first, slice)
        assert isinstance(last, slice)
        _unshuffle(planes, out[first.start : last.stop])

    def _announce(self, flat: NDArray[np.int64]) -> None:
        """Let the disk work on all chunks at once, ahead of the threads that will wait for them one by one."""
        assert self.index.places is not None
        if len(flat) > 1 and hasattr(os, "posix_fadvise"):
            offsets, sizes, _ = self.index.places
            for offset, size in zip(offsets[flat].tolist(), sizes[flat].tolist(), strict=True):
                if size:
                    os.posix_fadvise(self.fd, offset, size, os.POSIX_FADV_WILLNEED)

    def decode(self, job: _Job, flat: int, out: NDArray[np.uint8]) -> None:
        """Read one chunk, undo its filters for the wanted rows alone, and put them into ``out``."""
        places = self.index.places
        assert places is not None
        c0, inner = self.chunk[0], math.prod(self.chunk[1:])
        offset, size = int(places[0][flat]), int(places[1][flat])
        if size == 0:
            n = len(range(c0)[job.local]) if isinstance(job.local, slice) else len(job.local)
            rows = np.broadcast_to(self.index.fill, (n, inner, self.itemsize))
        else:
            data, shuffled = self.unfiltered(offset, size, int(places[2][flat]))
            if shuffled:
                rows = data.reshape(self.itemsize, c0, inner)[:, job.local].transpose(1, 2, 0)
            else:
                rows = data.reshape(c0, inner, self.itemsize)[job.local]
        if self.whole_rows:
            _copy(out, job.at, rows)
            return
        # Chunks that split the rows, or reach beyond them: only the part within, at its place.
        shape = self.spec.shape[1:]
        corner = [i * c for i, c in zip(self.columns[flat % len(self.columns)], self.chunk[1:], strict=True)]
        cut = [min(c, n - at) for c, n, at in zip(self.chunk[1:], shape, corner, strict=True)]
        target = out.reshape(len(out), *shape, self.itemsize)
        source = rows.reshape(len(rows), *self.chunk[1:], self.itemsize)
        within = tuple(slice(n) for n in cut)
        place = tuple(slice(at, at + n) for at, n in zip(corner, cut, strict=True))
        at: tuple[Any, ...] = (job.at, *place)
        everywhere: tuple[Any, ...] = (slice(None), *within)
        target[at] = source[everywhere]

    def unfiltered(self, offset: int, size: int, mask: int) -> tuple[NDArray[np.uint8], bool]:
        """A chunk's bytes after inflating, and whether they are still shuffled. A mask's bits are filters skipped."""
        raw = self.read(offset, size)
        applied = [code for i, code in enumerate(self.index.filters) if not mask >> i & 1]
        if GZIP in applied:
            return self.inflated(raw), SHUFFLE in applied
        if size != self.chunk_nbytes:
            self.corrupt(f"a chunk of {self.key!r} should have {self.chunk_nbytes} bytes, found {size}.")
        return raw, SHUFFLE in applied

    def read(self, offset: int, size: int) -> NDArray[np.uint8]:
        """Bytes of the file, valid until this thread reads again."""
        raw = self.buffer("raw", size)
        if os.preadv(self.fd, [raw.data], offset) != size:
            self.corrupt(f"a chunk of {self.key!r} ends beyond the file (was it truncated?).")
        return raw

    def inflated(self, raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
        try:
            data = inflate(raw.data, self.chunk_nbytes)
        except InflateError as exc:
            self.corrupt(f"a chunk of {self.key!r} is damaged: {exc}. Convert the file again.", exc)
        return np.frombuffer(data, dtype=np.uint8)

    def buffer(self, name: str, size: int) -> NDArray[np.uint8]:
        """Memory that each thread keeps: a new one for every chunk would cost more page faults than the read itself."""
        kept: NDArray[np.uint8] | None = getattr(self.buffers, name, None)
        if kept is None or len(kept) < size:
            kept = np.empty(max(size, self.chunk_nbytes), dtype=np.uint8)
            setattr(self.buffers, name, kept)
        return kept[:size]

    def through_library(self, job: _Job, out: NDArray[np.uint8]) -> None:
        """The same through h5py: the span of one chunk that holds the rows, then the rows out of it."""
        first = job.index * self.chunk[0]
        low = int(job.local.start if isinstance(job.local, slice) else job.local.min())
        high = int(job.local.stop if isinstance(job.local, slice) else job.local.max() + 1)
        values = np.ascontiguousarray(self.dataset[first + low : first + high])
        rows = values.reshape(-1).view(np.uint8).reshape(high - low, *out.shape[1:])
        out[job.at] = rows if isinstance(job.local, slice) else rows[job.local - low]


def _copy(out: NDArray[np.uint8], at: slice | NDArray[np.int64], rows: NDArray[np.uint8]) -> None:
    if isinstance(at, slice) and not rows.flags.c_contiguous:
        # Byte plane by byte plane: three times faster than numpy's own walk over a transposed array.
        target = out[at]
        for k in range(out.shape[2]):
            target[:, :, k] = rows[:, :, k]
    else:
        out[at] = rows


def _unshuffle(planes: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Chunks [n, itemsize, elements] as the bytes of their rows; plane by plane as in :func:`_copy`."""
    elements = out.reshape(len(planes), planes.shape[2], planes.shape[1])
    for k in range(planes.shape[1]):
        elements[:, :, k] = planes[:, k]
