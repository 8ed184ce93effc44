"""Rows of mapped tensors read ahead past the page cache, into separate buffers.

A block order names the rows of a window beforehand, and they lie in runs. Through the page cache such a run costs far
more processor time than disk time: each page is allocated, prefetched, mapped by a fault and evicted, 5 us a page
where two cores also gather. Here runs are read directly (O_DIRECT), many at a time, without the interpreter. Only the
rows that are needed are copied out of them, so memory holds these rows alone.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from jasper_store.errors import CorruptFileError
from jasper_store.formats.base import Extent
from jasper_store.formats.parts import parts_of
from jasper_store.native.gather import Source, kernel
from jasper_store.native.parts import PartTable
from jasper_store.native.reads import IN_MEMORY, AsyncRowReader, RowLayout, UnreadableError
from jasper_store.store.mapped import MappedTensor
from jasper_store.store.paged import PagedTensor
from jasper_store.store.resident import empty_rows
from jasper_store.store.tensors import span_nbytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jasper_store.store.tensors import StoredTensor

__all__ = ["DirectRowReader", "direct_readers_for", "rows_anywhere"]

_ANYWHERE: Final = 2**63 - 1
_MAX_FILES: Final = 128
"""Files that a reader keeps open; a process may have 1024, and a loader has some readers."""


def direct_readers_for(tensors: Sequence[StoredTensor], count: int) -> list[DirectRowReader]:
    """Staging for tensors of one row shape and dtype, of which some are mapped and the others in memory.

    Returns:
        ``count`` of them; none where nothing is mapped, rows are no runs of bytes in the dtype that
        is served, the kernel was not built, or the file system does not read directly.
    """
    kinds = {(tensor.dtype, tensor.row_shape) for tensor in tensors}
    if kernel() is None or not hasattr(os, "O_DIRECT") or len(kinds) != 1:
        return []
    mapped = [isinstance(tensor, PagedTensor) and tensor.has_raw_rows for tensor in tensors]
    if not any(mapped) or not all(m or t.in_memory for m, t in zip(mapped, tensors, strict=True)):
        return []
    made: list[DirectRowReader] = []
    try:
        made.extend(DirectRowReader(tensors) for _ in range(count))
    except OSError:
        for staging in made:
            staging.close()
        return []
    return made


def rows_anywhere(row: torch.Tensor) -> Source:
    """Memory as a source of rows like this one, each named by its address."""
    return Source(row, tuple(row.shape), row.nbytes, (0, _ANYWHERE, row.nbytes, 1))


def _layouts(tensor: StoredTensor, undo: ExitStack) -> list[RowLayout]:
    """Where the rows of a tensor lie, part by part; files are opened, and closed by ``undo``."""
    if not isinstance(tensor, PagedTensor):
        assert tensor.in_memory is not None
        address, n_rows, _, stride = tensor.in_memory.numbers
        return [RowLayout(IN_MEMORY, address, stride, n_rows)]
    paths = tensor.spec.paths
    if len(paths) > _MAX_FILES:
        raise OSError(errno.EMFILE, f"{tensor.name} lies in {len(paths)} files, more than are kept open at once")
    files = {}
    for path in paths:
        files[path] = os.open(path, os.O_RDONLY | os.O_DIRECT)
        undo.callback(os.close, files[path])
    stride = tensor.row_stride if isinstance(tensor, MappedTensor) else tensor.row_nbytes
    layouts = []
    for part in parts_of(tensor.spec):
        assert isinstance(part.location, Extent)
        offset = part.location.offset
        layouts.append(RowLayout(files[part.path], offset, stride, part.n_rows, offset + span_nbytes(part)))
    return layouts


def _unreadable(exc: UnreadableError, path: Path, name: str) -> str:
    what = f"{path}: rows of {name} could not be read"
    if not exc.errno:
        return (
            f"{what}: the file was truncated or is being rewritten in place while it is read; write a new file and "
            "rename it over the old one, then open the dataset again"
        )
    return f"{what}: {exc.strerror}; look at the system's log for errors of the disk, and restore or convert the file"


class DirectRowReader:
    """Reads rows of several tensors of one row shape and dtype, as their files have them, while other work goes on.

    For one thread at a time.

    Args:
        tensors: the tensors; see :func:`direct_readers_for`. Those in memory need not be read.

    Attributes:
        anywhere: memory as a source: rows are named by their address.

    Raises:
        OSError: a file cannot be opened directly.
    """

    def __init__(self, tensors: Sequence[StoredTensor]) -> None:
        self.tensors = tuple(tensors)
        first = tensors[0]
        self.row_shape, self.dtype, self._row_nbytes = tuple(first.row_shape), first.dtype, first.row_nbytes
        self._zeros = self._memory = torch.zeros(self.row_shape, dtype=self.dtype, device="cpu")
        self.anywhere = rows_anywhere(self._zeros)
        with ExitStack() as undo:
            layouts = [_layouts(tensor, undo) for tensor in tensors]
            # By tensor number, the last for -1.
            self._from_files = np.array([places[0].file != IN_MEMORY for places in layouts] + [False])
            # The reader knows places, of which a tensor in parts has one for each part.
            self._first_places = np.cumsum([0] + [len(places) for places in layouts])
            self._tables = {
                number: PartTable(np.cumsum([0, *(place.n_rows for place in places)]), self._row_nbytes)
                for number, places in enumerate(layouts)
                if len(places) > 1
            }
            self._reader = AsyncRowReader([place for places in layouts for place in places], self._row_nbytes)
            undo.callback(self._reader.close)
            self._open = undo.pop_all()

    def begin(self, which: np.ndarray, rows: np.ndarray) -> None:
        """Begin to read rows into memory; call :meth:`finish` before the next.

        Args:
            which: tensor number of each, [n]; -1 is a row of zeros.
            rows: row of each, int64 [n]; none twice of one tensor.
        """
        count = int(np.count_nonzero(self._from_files[which]))
        self._memory = empty_rows((count, *self.row_shape), self.dtype, count * self._row_nbytes)
        if self._tables:
            which, rows = self._placed(which, rows)
        self._reader.begin(which, rows, self._zeros.data_ptr(), self._memory.data_ptr())

    def _placed(self, which: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of places, and rows counted from the first of each."""
        places = np.where(which >= 0, self._first_places[which], -1)
        rows = np.array(rows, np.int64)
        for number, table in self._tables.items():
            own = np.flatnonzero(which == number)
            wanted = rows[own]
            # A row that is not there is left to the reader to refuse.
            parts = table.parts_of(np.clip(wanted, 0, table.n_rows - 1))
            places[own] += parts
            rows[own] = wanted - table.starts[parts]
        return places, rows

    def finish(self) -> tuple[np.ndarray, torch.Tensor]:
        """Wait for the rows of :meth:`begin`.

        Returns:
            The address of each row, int64 [n], and the memory that has to be kept as long as it is used.

        Raises:
            CorruptFileError: a file ends before a row, or the disk cannot read it.
        """
        memory, self._memory = self._memory, self._zeros
        try:
            return self._reader.finish(), memory
        except UnreadableError as exc:
            number = int(np.searchsorted(self._first_places, exc.tensor, side="right")) - 1
            tensor = self.tensors[number]
            part = list(parts_of(tensor.spec))[exc.tensor - int(self._first_places[number])]
            raise CorruptFileError(
                _unreadable(exc, part.path, tensor.name), path=part.path, tensor=tensor.name
            ) from exc

    def close(self) -> None:
        """Close the files once the pending read is done. May be called twice."""
        self._open.close()

    # A class attribute, because this module's names are gone when the interpreter ends.
    _ending = staticmethod(sys.is_finalizing)

    def __del__(self) -> None:
        # Without the attribute the constructor failed, and has closed what it had opened.
        if hasattr(self, "_open") and not self._ending():
            self.close()
