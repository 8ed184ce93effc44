"""Gathers rows of tensors in memory, several tensors in one call, with the compiled gather kernel where it was built.

The kernel (``rows.c``) prefetches rows ahead of the one it copies: it is 1.5 times as fast as ``torch.index_select``
with the same threads, and twice as fast with one thread (docs/notes-paging.md). It is built together with the package
if there is a C compiler. It is optional: without it callers let torch gather tensor by tensor.
"""

from __future__ import annotations

import array
import math
from typing import Any, Final, NamedTuple

import torch

from jasper_store.native.library import library

__all__ = [
    "NUMBERS",
    "BegunGather",
    "Jobs",
    "MapFaultError",
    "Source",
    "SourceGather",
    "kernel",
    "run_packed",
    "source_of",
    "widening",
]

NUMBERS: Final = 10
"""64-bit numbers of a packed gather: the fields of ``struct gather`` in ``rows.c``."""
_ROWS, _ROWS_STEP, _N, _OUT = range(4, 8)
_THREADS = NUMBERS  # of a single gather, behind its fields
_BEGUN_NBYTES: Final = 16 * 8
"""Room for ``struct begun_gather`` in ``rows.c``."""
_UNREADABLE: Final = -1
"""As in ``rows.c``."""
_WIDENS: Final = {torch.uint8: -1, torch.int8: 1, torch.int16: 2, torch.int32: 4}


def kernel() -> Any:
    """The kernel's entry point; ``None`` if it was not built for this system."""
    found = library()
    return None if found is None else found.jasper_gather


class MapFaultError(OSError):
    """A page of a mapped file could not be read: the file was truncated, or its disk failed.

    Attributes:
        address: where the page is mapped.
    """

    def __init__(self, address: int) -> None:
        super().__init__(f"the page that is mapped at {address:#x} could not be read")
        self.address = address


class Source(NamedTuple):
    """A tensor to gather rows from, with what the kernel needs to know of it. Keeps the tensor alive.

    Attributes:
        tensor: [n_rows, ...].
        row_shape: sizes of a row.
        row_nbytes: bytes of a row.
        numbers: address of the first value, number of rows, bytes of a row, bytes from one row to the next; empty if
            the kernel cannot gather from it: it is on a device, its rows have gaps, or the kernel was not built.
    """

    tensor: torch.Tensor
    row_shape: tuple[int, ...]
    row_nbytes: int
    numbers: tuple[int, ...]


def source_of(tensor: torch.Tensor) -> Source:
    """A tensor [n_rows, ...] as a source of rows."""
    row_shape = tuple(tensor.shape[1:])
    item = tensor.element_size()
    row_nbytes = math.prod(row_shape) * item
    gatherable = tensor.device.type == "cpu" and tensor.numel() > 0 and tensor[0].is_contiguous()
    if not gatherable or kernel() is None:
        return Source(tensor, row_shape, row_nbytes, ())
    numbers = (tensor.data_ptr(), tensor.shape[0], row_nbytes, tensor.stride(0) * item)
    return Source(tensor, row_shape, row_nbytes, numbers)


def widening(stored: torch.dtype, wanted: torch.dtype) -> int | None:
    """The ``widen`` argument of :meth:`Jobs.add` that converts one dtype to another; ``None`` if the kernel cannot.

    It converts integers of up to 32 bits to int64; equal dtypes are copied (0).
    """
    return 0 if stored == wanted else _WIDENS.get(stored) if wanted == torch.int64 else None


class Jobs:
    """Gathers from several tensors for one call of the kernel, which must be available. Not for concurrent use."""

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        self._numbers: list[int] = []

    def add(self, source: Source, rows: torch.Tensor, out: torch.Tensor, widen: int = 0) -> None:
        """Add a gather that does not depend on the others.

        Args:
            source: the tensor to gather from; its ``numbers`` must not be empty.
            rows: int64 [n] in host memory, of any stride. The caller keeps it and ``out`` alive until :meth:`run`.
            out: contiguous, [n, *row_shape].
            widen: :func:`widening` of the dtypes of ``source`` and ``out``.
        """
        self._numbers += source.numbers
        self._numbers += (rows.data_ptr(), rows.stride(0), rows.shape[0], out.data_ptr(), widen, 0)

    def run(self, *, mapped: bool = False) -> int | None:
        """Run all gathers, with torch's number of threads.

        Args:
            mapped: sources are maps of files. A page that cannot be read is an error then, and ends the process
                otherwise.

        Returns:
            ``None``, or the number of the first gather with a row out of range; then nothing was written.

        Raises:
            MapFaultError: a page of a map could not be read.
        """
        jobs = array.array("q", self._numbers)
        if not mapped:
            return run_packed(jobs)
        bad = library().jasper_gather_mapped(jobs.buffer_info()[0], len(jobs) // NUMBERS, torch.get_num_threads())
        if bad == _UNREADABLE:
            raise MapFaultError(library().jasper_fault_address())
        return bad - 1 if bad else None


class SourceGather:
    """Gathers rows of one source, with the least work per call: only three addresses change. From several threads at once.

    Args:
        source: its ``numbers`` must not be empty.
        mapped: the source is a map of a file; see :meth:`Jobs.run`.
        keep: what keeps the addresses of ``source`` valid, where its tensor does not.
    """

    __slots__ = ("_keep", "_kernel", "_like", "_numbers", "_spare", "source")

    def __init__(self, source: Source, *, mapped: bool = False, keep: object = None) -> None:
        self.source = source
        self._keep = keep
        self._kernel = library().jasper_gather_one_mapped if mapped else library().jasper_gather_one
        self._numbers = array.array("q", (*source.numbers, 0, 1, 0, 0, 0, 0, 1))
        self._spare: list[tuple[array.array[int], int]] = []  # packed gathers that no thread uses, and their addresses
        self._like = (-1, source.tensor)

    def empty(self, n: int) -> torch.Tensor:
        """Uninitialised memory for n rows, from the C library: of a pattern in two thirds of the time."""
        known, like = self._like
        if known != n:
            like = torch.empty(1, dtype=self.source.tensor.dtype, device="cpu").expand(n, *self.source.row_shape)
            self._like = (n, like)
        return torch.empty_like(like)

    def run(self, rows: torch.Tensor, n: int, out: torch.Tensor) -> bool:
        """Gather with torch's number of threads.

        Args:
            rows: int64 [n] in host memory, of any stride.
            n: their number.
            out: contiguous, [n, *row_shape].

        Returns:
            False if a row is out of range; then nothing was written.

        Raises:
            MapFaultError: a page of a map could not be read.
        """
        try:
            jobs, address = self._spare.pop()
        except IndexError:  # the first time, or another thread is at it
            jobs = self._numbers[:]
            address = jobs.buffer_info()[0]
        jobs[_ROWS] = rows.data_ptr()
        jobs[_ROWS_STEP] = 1 if rows.is_contiguous() else rows.stride(0)
        jobs[_N] = n
        jobs[_OUT] = out.data_ptr()
        jobs[_THREADS] = torch.get_num_threads()
        bad = self._kernel(address)
        self._spare.append((jobs, address))
        if bad == _UNREADABLE:
            raise MapFaultError(library().jasper_fault_address())
        return not bad


class BegunGather:
    """Gathers that a helper thread runs while the caller does something else.

    Args:
        jobs: as :func:`run_packed` takes them; at least one.
        keep: what must stay alive while they run: sources, rows, and what is written.

    Attributes:
        bad: ``None``, or the number of the first gather with a row out of range; then its stage and later stages write
            nothing.
    """

    __slots__ = ("_address", "_jobs", "_keep", "_kernel", "_state", "bad")

    def __init__(self, jobs: array.array[int], keep: object) -> None:
        self._jobs, self._keep, self._kernel = jobs, keep, library()
        self._state = array.array("q", bytes(_BEGUN_NBYTES))
        self._address = self._state.buffer_info()[0]
        address, n = jobs.buffer_info()[0], len(jobs) // NUMBERS
        bad = self._kernel.jasper_gather_begin(self._address, address, n, torch.get_num_threads())
        self.bad = bad - 1 if bad else None

    def finish(self) -> None:
        """Run what is left, and wait for the rest; a second time there is nothing left."""
        self._kernel.jasper_gather_finish(self._address)

    def __del__(self) -> None:
        # Before the memory is freed that a helper reads and writes.
        self._kernel.jasper_gather_cancel(self._address)


def run_packed(jobs: array.array[int]) -> int | None:
    """Run gathers that are packed as the kernel expects them: :data:`NUMBERS` numbers each.

    Returns:
        ``None``, or the number of the first gather with a row out of range; then its stage and later stages have
        written nothing.
    """
    bad = kernel()(jobs.buffer_info()[0], len(jobs) // NUMBERS, torch.get_num_threads())
    return bad - 1 if bad else None
