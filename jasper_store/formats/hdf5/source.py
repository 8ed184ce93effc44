"""The chunks of one dataset in an open file: read, inflated and unshuffled by threads, or read through the library."""

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

from jasper_store.errors import CorruptFileError
from jasper_store.formats.base import Chunked
from jasper_store.formats.files import open_for_reading, system_refusals
from jasper_store.formats.hdf5.deflate import InflateError, inflate
from jasper_store.formats.hdf5.index import GZIP, SHUFFLE, ChunkIndex, changed, identity_of, read_index
from jasper_store.formats.hdf5.library import open_dataset, open_file, translated

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from jasper_store.formats.base import TensorSpec

__all__ = ["Job", "OpenChunks"]

# Chunks of a block that are unshuffled together. Threads wait for each other at every small step.
_RUN_NBYTES = 1 << 20
# Chunks that are listed at once; a row may have millions.
_TASKS_AT_ONCE = 1 << 16
# Chunks beside each other that the library reads at once.
_COLUMNS_AT_ONCE = 1 << 10
# Bytes of the rows that the library reads at once, where more do not come from one row.
_SPAN_NBYTES = 64 << 20
# Bytes of a thread's buffer at first.
_BUFFER_NBYTES = 1 << 20

_Task = tuple["Job", int]  # and the chunk's number among those of the index


@dataclass(frozen=True, slots=True)
class Job:
    """Rows of one row of chunks: ``out[at] = dataset[first + local]``."""

    index: int
    local: slice | NDArray[np.int64]
    at: slice | NDArray[np.int64]


class OpenChunks:
    """The file, opened in one process: a plain descriptor where chunks are read directly, else through h5py."""

    def __init__(self, spec: TensorSpec, index: ChunkIndex | None) -> None:
        assert isinstance(spec.location, Chunked)
        self.pid = os.getpid()
        self.spec = spec
        self.key = spec.location.key
        self.pool: ThreadPoolExecutor | None = None
        self.lock = threading.Lock()
        self.users = 0
        self.retired = False
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
            if not self.index.direct:
                h5, _ = handles.enter_context(open_file(spec.path))
                self.dataset, _ = open_dataset(h5, spec.path, self.key)
            self.handles = handles.pop_all()
        self.chunk = self.index.chunk
        self.itemsize = spec.dtype.itemsize
        self.chunk_nbytes = math.prod(self.chunk) * self.itemsize
        self.n_columns = math.prod(self.index.grid[1:])
        self.whole_rows = self.chunk[1:] == spec.shape[1:]

    def acquire(self) -> bool:
        """Keep the file open until :meth:`release`; false if it is closed, or about to be."""
        with self.lock:
            self.users += not self.retired
            return not self.retired

    def release(self) -> None:
        """Undo one :meth:`acquire`, and close the file if that was waited for."""
        with self.lock:
            self.users -= 1
            last = self.retired and not self.users
        if last:
            self._close_handles()

    def close(self) -> None:
        """Close the file now, or with the last :meth:`release`. A raw descriptor's number may soon be another file's."""
        if self.pid != os.getpid():
            return
        with self.lock:
            idle = not self.users and not self.retired
            self.retired = True
        if idle:
            self._close_handles()

    def _close_handles(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
        self.handles.close()

    def corrupt(self, what: str, cause: BaseException | None = None) -> NoReturn:
        """Raise CorruptFileError about the dataset."""
        raise CorruptFileError(f"{self.spec.path}: {what}", path=self.spec.path, tensor=self.spec.name) from cause

    def run(self, jobs: Iterable[Job], out: NDArray[np.uint8]) -> None:
        """Fill ``out`` [rows, elements of a row, itemsize] with the rows of all jobs.

        Raises:
            CorruptFileError: a chunk is damaged.
        """
        if not self.index.direct:
            with translated(self.spec.path):
                self._run_through_library(jobs, out)
            return
        tasks = ((job, number) for job, begin, end in self._written(jobs, out) for number in range(begin, end))
        while piece := list(itertools.islice(tasks, _TASKS_AT_ONCE)):
            self._run_tasks(piece, out)

    def _written(self, jobs: Iterable[Job], out: NDArray[np.uint8]) -> Iterator[tuple[Job, int, int]]:
        """First and last number, in the index, of the chunks of each job. Rows that lack any are filled before."""
        assert self.index.places is not None
        flat = self.index.places[0]
        jobs = list(jobs)
        indices = np.array([job.index for job in jobs], dtype=np.int64)
        begins = np.searchsorted(flat, indices * self.n_columns).tolist()
        ends = np.searchsorted(flat, (indices + 1) * self.n_columns).tolist()
        for job, begin, end in zip(jobs, begins, ends, strict=True):
            if end - begin < self.n_columns:
                out[job.at] = self.index.fill
            yield job, begin, end

    def _run_tasks(self, tasks: list[_Task], out: NDArray[np.uint8]) -> None:
        self._announce(np.array([number for _, number in tasks]))

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
        with self.lock:
            if self.pool is None:
                self.pool = ThreadPoolExecutor(max(torch.get_num_threads() - 1, 1), "jasper-chunks")
            pool = self.pool
        # Equal shares at once, without a queue's cost per chunk; neighbours stay together, and this thread has one.
        bounds = [len(tasks) * i // threads for i in range(threads + 1)]
        own, *others = (tasks[i:j] for i, j in itertools.pairwise(bounds))
        with system_refusals(self.spec.path):
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
        _, offsets, sizes, masks = self.index.places
        run: list[_Task] = []
        end = -1  # of what the run holds in the file; -1 where nothing can follow
        for job, number in tasks:
            offset, size = int(offsets[number]), int(sizes[number])
            whole = isinstance(job.local, slice) and job.local.stop - job.local.start == self.chunk[0]
            simple = whole and not masks[number]
            if run and not (simple and offset == end and len(run) < most):
                yield run
                run = []
            run.append((job, number))
            end = offset + size if simple else -1
        if run:
            yield run

    def decode_run(self, run: list[_Task], out: NDArray[np.uint8]) -> None:
        """Read whole chunks by one call, inflate each, and unshuffle them all into their rows of ``out``."""
        assert self.index.places is not None
        offsets, sizes = (place[[number for _, number in run]].tolist() for place in self.index.places[1:3])
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

    def _announce(self, numbers: NDArray[np.int64]) -> None:
        """Let the disk work on all chunks at once, ahead of the threads that will wait for them one by one."""
        assert self.index.places is not None
        if len(numbers) > 1 and hasattr(os, "posix_fadvise"):
            _, offsets, sizes, _ = self.index.places
            for offset, size in zip(offsets[numbers].tolist(), sizes[numbers].tolist(), strict=True):
                os.posix_fadvise(self.fd, offset, size, os.POSIX_FADV_WILLNEED)

    def decode(self, job: Job, number: int, out: NDArray[np.uint8]) -> None:
        """Read one chunk, undo its filters for the wanted rows alone, and put them into ``out``."""
        places = self.index.places
        assert places is not None
        c0, inner = self.chunk[0], math.prod(self.chunk[1:])
        flat, offset, size, mask = (int(place[number]) for place in places)
        data, shuffled = self.unfiltered(offset, size, mask)
        if shuffled:
            rows = data.reshape(self.itemsize, c0, inner)[:, job.local].transpose(1, 2, 0)
        else:
            rows = data.reshape(c0, inner, self.itemsize)[job.local]
        if self.whole_rows:
            _copy(out, job.at, rows)
            return
        # Chunks that split the rows, or reach beyond them: only the part within, at its place.
        place = self._place(flat)
        source = rows.reshape(len(rows), *self.chunk[1:], self.itemsize)
        everywhere: tuple[Any, ...] = (slice(None), *(slice(part.stop - part.start) for part in place))
        at: tuple[Any, ...] = (job.at, *place)
        self._by_dimension(out)[at] = source[everywhere]

    def _by_dimension(self, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return out.reshape(len(out), *self.spec.shape[1:], self.itemsize)

    def _place(self, flat: int) -> tuple[slice, ...]:
        """Where in the rows a chunk lies that has this place in C order of the grid."""
        place = []
        for size, chunk, n in zip(self.spec.shape[:0:-1], self.chunk[:0:-1], self.index.grid[:0:-1], strict=True):
            flat, i = divmod(flat, n)
            place.append(slice(i * chunk, min((i + 1) * chunk, size)))
        return tuple(reversed(place))

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
        """The bytes of a chunk from its zlib stream."""
        try:
            data = inflate(raw.data, self.chunk_nbytes)
        except InflateError as exc:
            self.corrupt(f"a chunk of {self.key!r} is damaged: {exc}. Convert the file again.", exc)
        return np.frombuffer(data, dtype=np.uint8)

    def buffer(self, name: str, size: int) -> NDArray[np.uint8]:
        """Memory that each thread keeps: a new one for every chunk would cost more page faults than the read itself."""
        kept: NDArray[np.uint8] | None = getattr(self.buffers, name, None)
        if kept is None or len(kept) < size:
            kept = np.empty(max(size, min(self.chunk_nbytes, _BUFFER_NBYTES)), dtype=np.uint8)
            setattr(self.buffers, name, kept)
        return kept[:size]

    def _run_through_library(self, jobs: Iterable[Job], out: NDArray[np.uint8]) -> None:
        """The same through h5py, which makes 200 bytes for each chunk of a call whether it was written or not."""
        everything = tuple(slice(0, n) for n in self.spec.shape[1:])
        if self.index.places is None:
            for job in jobs:
                self.through_library(job, everything, out)
            return
        for job, begin, end in self._written(jobs, out):
            if end - begin == self.n_columns <= _COLUMNS_AT_ONCE:
                self.through_library(job, everything, out)
            else:
                for flat in self.index.places[0][begin:end].tolist():
                    self.through_library(job, self._place(flat), out)

    def through_library(self, job: Job, place: tuple[slice, ...], out: NDArray[np.uint8]) -> None:
        """The span of one row of chunks that holds the rows, then the rows out of it; of each the part at ``place``."""
        target = self._by_dimension(out)
        row_nbytes = math.prod(part.stop - part.start for part in place) * self.itemsize
        step = max(1, _SPAN_NBYTES // max(1, row_nbytes))
        if isinstance(job.local, slice):
            assert isinstance(job.at, slice)
            for low in range(job.local.start, job.local.stop, step):
                high = min(low + step, job.local.stop)
                begin = job.at.start + low - job.local.start
                rows: tuple[Any, ...] = (slice(begin, begin + high - low), *place)
                target[rows] = self.span(job.index, low, high, place)
            return
        assert not isinstance(job.at, slice)
        spans = job.local // step
        for span in np.unique(spans):  # one, unless the rows are long
            local, at = job.local[spans == span], job.at[spans == span]
            low = int(local.min())
            rows = (at, *place)
            target[rows] = self.span(job.index, low, int(local.max()) + 1, place)[local - low]

    def span(self, index: int, low: int, high: int, place: tuple[slice, ...]) -> NDArray[np.uint8]:
        """Part of rows of one row of chunks as bytes [rows, sizes of the part, itemsize]."""
        first = index * self.chunk[0]
        part = (slice(first + low, first + high), *place)
        values = np.ascontiguousarray(self.dataset[part])
        return values.reshape(-1).view(np.uint8).reshape(*values.shape, self.itemsize)


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
