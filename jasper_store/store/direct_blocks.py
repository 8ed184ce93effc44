"""Blocks of several tensors read whole, past the page cache and without a copy: packed samples.

Tensors in parts whose parts lie side by side, block by block, are read in a few long runs a block instead of one read for
each row. The disk writes them to the memory that rows are then gathered from.
"""

from __future__ import annotations

import mmap
import os
import sys
from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from jasper_store.errors import CorruptFileError
from jasper_store.formats.base import Parts
from jasper_store.native.gather import kernel
from jasper_store.native.reads import AsyncRunReader, UnreadableError
from jasper_store.paging.preload import anonymous
from jasper_store.store.parted import PartedTensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jasper_store.store.tensors import StoredTensor

__all__ = ["BlockReader", "BlockTable", "block_table"]

_PAGE: Final = 4096
_MAX_GAP: Final = 64 << 10
"""Bytes between two columns of a block that are read together with them: a separate read would cost as much."""
_MAX_FILES: Final = 128
_DONTFORK: Final = getattr(mmap, "MADV_DONTFORK", None)


class BlockTable:
    """Where the blocks of some tensors lie, and how they are read. Immutable.

    Args:
        tensors: tensors in parts, which have the same number of rows in each part.

    Attributes:
        starts: first row of each block, and the number of rows, int64 [blocks + 1].
        nbytes: bytes of memory that each block takes, int64 [blocks].
    """

    def __init__(self, tensors: Sequence[PartedTensor]) -> None:
        self.tensors = tuple(tensors)
        places = [tensor.spec.location for tensor in tensors]
        first = places[0]
        assert isinstance(first, Parts)
        self.starts = first.starts
        paths = dict.fromkeys(path for place in places if isinstance(place, Parts) for path in place.files)
        self.paths = tuple(paths)
        numbers = {path: number for number, path in enumerate(paths)}
        rows = np.diff(self.starts)
        files, offsets, ends = [], [], []
        for place, tensor in zip(places, tensors, strict=True):
            assert isinstance(place, Parts)
            files.append(np.array([numbers[path] for path in place.files], np.int64)[place.file_of])
            offsets.append(place.offsets)
            ends.append(place.offsets + rows * tensor.spec.row_nbytes)
        self._offsets = np.stack(offsets)
        self._run_of, runs = _runs(np.stack(files), self._offsets, np.stack(ends))
        self._files = np.stack([np.stack(files)[run[0]] for run in runs])
        self._begins = np.stack([np.stack(offsets)[run].min(axis=0) for run in runs]) // _PAGE * _PAGE
        self._ends = np.stack([np.stack(ends)[run].max(axis=0) for run in runs])
        self._lengths = -(-(self._ends - self._begins) // _PAGE) * _PAGE
        self.nbytes = self._lengths.sum(axis=0)

    def place(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads of some blocks, and where their columns are in memory then, relative to its first byte.

        Returns:
            int64 [reads, 5] as :class:`~jasper_store.native.reads.AsyncRunReader` takes them, with the number of the file
            instead of its descriptor; and int64 [tensors, blocks].
        """
        lengths = self._lengths[:, blocks].T  # block by block
        targets = np.cumsum(lengths).reshape(lengths.shape) - lengths
        columns = (self._files, self._begins, self._lengths, self._ends - self._begins)
        reads = np.stack([column[:, blocks].T.reshape(-1) for column in columns] + [targets.reshape(-1)], axis=1)
        within = self._offsets[:, blocks] - self._begins[self._run_of][:, blocks]
        return reads, targets.T[self._run_of] + within


def _runs(files: np.ndarray, offsets: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """Columns that are read together: number of the run of each, and the columns of each run."""
    order = np.lexsort((offsets[:, 0], files[:, 0])).tolist()
    runs = [[order[0]]]
    for before, column in pairwise(order):
        gap = offsets[column] - ends[before]
        same = (files[column] == files[before]) & (gap >= 0) & (gap <= _MAX_GAP)
        if same.all():
            runs[-1].append(column)
        else:
            runs.append([column])
    run_of = np.empty(len(order), np.int64)
    for number, run in enumerate(runs):
        run_of[run] = number
    return run_of, runs


def block_table(tensors: Sequence[StoredTensor]) -> BlockTable | None:
    """The table of tensors that lie in blocks; ``None`` where they do not, or cannot be read directly."""
    if kernel() is None or not hasattr(os, "O_DIRECT") or not tensors:
        return None
    parted = [tensor for tensor in tensors if isinstance(tensor, PartedTensor) and tensor.has_raw_rows]
    if len(parted) < len(tensors):
        return None
    starts = [tensor.spec.location.starts for tensor in parted if isinstance(tensor.spec.location, Parts)]
    if not all(np.array_equal(starts[0], each) for each in starts[1:]):
        return None
    table = BlockTable(parted)
    return table if len(table.paths) <= _MAX_FILES else None


class BlockReader:
    """Reads blocks in the background, some at a time. For one thread at a time.

    Args:
        table: where they lie.
        count: requests that may be unfinished at a time.
        nbytes: memory of a request, at most.

    Raises:
        OSError: a file cannot be opened directly.
    """

    def __init__(self, table: BlockTable, count: int, nbytes: int) -> None:
        self._table, self._nbytes = table, -(-nbytes // _PAGE) * _PAGE
        self._free: list[mmap.mmap] = []
        with ExitStack() as undo:
            self._files = []
            for path in table.paths:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
                undo.callback(os.close, fd)
                self._files.append(fd)
            self._idle = [AsyncRunReader() for _ in range(count)]
            for reader in self._idle:
                undo.callback(reader.close)
            self._open = undo.pop_all()

    def begin(self, blocks: np.ndarray) -> tuple[AsyncRunReader, mmap.mmap, np.ndarray, np.ndarray]:
        """Begin to read blocks; pass what is returned to :meth:`finish`."""
        reads, addresses = self._table.place(blocks)
        memory = self._free.pop() if self._free else _memory(self._nbytes)
        base = np.frombuffer(memory, np.uint8).ctypes.data
        reads[:, 0] = np.array(self._files, np.int64)[reads[:, 0]]
        reads[:, 4] += base
        reader = self._idle.pop()
        reader.begin(reads)
        return reader, memory, addresses + base, blocks

    def finish(self, begun: tuple[AsyncRunReader, mmap.mmap, np.ndarray, np.ndarray]) -> tuple[np.ndarray, mmap.mmap]:
        """Wait for blocks.

        Returns:
            Address of each tensor's first row in each block, int64 [tensors, blocks]; and the memory, for
            :meth:`release`.

        Raises:
            CorruptFileError: a file cannot be read to the end of a block.
        """
        reader, memory, addresses, _ = begun
        try:
            reader.finish()
        except UnreadableError as exc:
            names = ", ".join(path.name for path in self._table.paths)
            msg = f"{self._table.paths[0].parent}: blocks of {names} could not be read; was a file cut, or is the disk faulty?"
            raise CorruptFileError(msg, path=self._table.paths[0]) from exc
        self._idle.append(reader)
        return addresses, memory

    def release(self, memory: mmap.mmap) -> None:
        """Take memory back, for a later request."""
        self._free.append(memory)

    def close(self) -> None:
        """Close the files once pending reads are done. May be called twice."""
        self._open.close()

    # A class attribute, because this module's names are gone when the interpreter ends.
    _ending = staticmethod(sys.is_finalizing)

    def __del__(self) -> None:
        # Without the attribute the constructor failed, and has closed what it had opened.
        if hasattr(self, "_open") and not self._ending():
            self.close()


def _memory(nbytes: int) -> mmap.mmap:
    """Memory that a disk writes to: a page of it must not become shared with a forked child, see open(2)."""
    memory = anonymous(nbytes)
    if _DONTFORK is not None:
        memory.madvise(_DONTFORK)
    return memory
