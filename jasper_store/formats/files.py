"""What the formats share: opening a file safely, checking what its header claims, and writing raw bytes.

Every format meets the operating system through this module, so a missing file, a directory, a named pipe or
a full disk gives the same error whatever the suffix.
"""

from __future__ import annotations

import math
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import torch

from jasper_store.errors import (
    ClosedError,
    CorruptFileError,
    DatasetNotFoundError,
    IncompatibleOptionsError,
    InsufficientMemoryError,
    IntegrityError,
    JasperStoreError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "DATA_START",
    "MAX_DIMENSIONS",
    "TensorBeingWritten",
    "check_name",
    "check_shape",
    "create_file",
    "dtype_name",
    "is_directory",
    "is_file",
    "open_for_reading",
    "read_at",
    "read_file",
    "require_open",
    "shown",
    "system_refusals",
    "tensor_bytes",
    "write_at",
]

DATA_START = 4096
"""Offset of the data in every file written here: one page, so that rows of the map begin on page boundaries."""

# The kernel makes its page-cache folios as large as the write. Where memory is fragmented, or a virtual machine has
# not touched it yet, folios of megabytes cost four times the processor time of these (docs/performance.md).
_WRITE_NBYTES = 256 << 10

MAX_DIMENSIONS = 64
_INT64_MAX = 2**63 - 1
# O_NONBLOCK so that a named pipe opens (and is then refused) where it would otherwise wait for a writer.
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def is_file(path: Path) -> bool:
    """Whether there is a regular file. ``False`` for a name that no file can have (too long, say), where pathlib may raise."""
    return os.path.isfile(path)  # noqa: PTH113


def is_directory(path: Path) -> bool:
    """Whether there is a directory; as :func:`is_file`."""
    return os.path.isdir(path)  # noqa: PTH112


@contextmanager
def open_for_reading(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file unbuffered and yield it with its size in bytes.

    Raises:
        DatasetNotFoundError: there is no such file, or it may not be read.
        CorruptFileError: it is not a regular file (a pipe would block for ever), or a read within fails.
    """
    try:
        fd = os.open(path, _READ_FLAGS)
    except FileNotFoundError as exc:
        msg = f"{path}: no such file."
        raise DatasetNotFoundError(msg, path=path) from exc
    except OSError as exc:
        msg = f"{path}: cannot be opened for reading: {exc.strerror}. Check the path and its permissions."
        raise DatasetNotFoundError(msg, path=path) from exc
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            msg = f"{path}: expected a regular file, found a {_kind(status.st_mode)}."
            raise CorruptFileError(msg, path=path)
        with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
            yield file, status.st_size
    except JasperStoreError:
        raise
    except OSError as exc:
        msg = f"{path}: reading it failed: {exc.strerror or exc}. Check the disk, or write the file again."
        raise CorruptFileError(msg, path=path) from exc
    finally:
        os.close(fd)


@contextmanager
def system_refusals(what: object) -> Iterator[None]:
    """Say of what it was that the system refused memory or a thread; Python's own errors do not.

    Raises:
        InsufficientMemoryError: it did.
    """
    try:
        yield
    except JasperStoreError:
        raise
    except MemoryError as exc:
        msg = (
            f"{what}: the system refused the memory for it. Raise the limit of this process (ulimit -v, the container)."
        )
        raise InsufficientMemoryError(msg) from exc
    except RuntimeError as exc:
        if "can't start new thread" not in str(exc):
            raise
        msg = (
            f"{what}: the system refused a thread for it. Raise the limit of processes (ulimit -u, pids.max of the "
            "container) or of memory (ulimit -v), or end other processes."
        )
        raise InsufficientMemoryError(msg) from exc


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "directory"
    return "named pipe" if stat.S_ISFIFO(mode) else "special file"


def shown(value: object, width: int) -> str:
    """``repr`` of what a header holds, cut; Python refuses to write out ints of thousands of digits."""
    try:
        return repr(value)[:width]
    except ValueError:
        return f"a {type(value).__name__} with an int of too many digits"


def check_shape(shape: Sequence[object], itemsize: int, *, path: Path, tensor: str) -> tuple[tuple[int, ...], int]:
    """Check sizes that a header claims, before anything is computed from them in 64-bit integers.

    Returns:
        The sizes as a tuple of ints, and the bytes that the tensor takes in C order.

    Raises:
        CorruptFileError: not whole numbers, negative, too many, or more bytes than 64 bits can count.
    """
    sizes: list[int] = []
    for size in shape:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _INT64_MAX:
            msg = (
                f"{path}: tensor {tensor!r}: a size must be a whole number within [0, 2**63), found {shown(size, 80)}."
            )
            raise CorruptFileError(msg, path=path, tensor=tensor)
        sizes.append(size)
    if len(sizes) > MAX_DIMENSIONS:
        msg = f"{path}: tensor {tensor!r}: at most {MAX_DIMENSIONS} dimensions are possible, found {len(sizes)}."
        raise CorruptFileError(msg, path=path, tensor=tensor)
    # Strides count empty dimensions as one, so they too must stay within 64 bits.
    if math.prod(max(size, 1) for size in sizes) * itemsize > _INT64_MAX:
        msg = f"{path}: tensor {tensor!r}: the shape {tuple(sizes)} needs more bytes than 64 bits can count."
        raise CorruptFileError(msg, path=path, tensor=tensor)
    return tuple(sizes), math.prod(sizes) * itemsize


def check_name(name: str) -> None:
    """Refuse a tensor name that could not safely be part of a file name.

    Raises:
        IncompatibleOptionsError: empty, hidden, with a path separator or a control character, or over 200 bytes.
    """
    bad = not name or name[0] in "._" or any(c in "/\\:" or ord(c) < ord(" ") for c in name)
    # Longer names could not carry a suffix and a temporary prefix within the 255 bytes of a file name.
    if bad or len(name.encode("utf-8", "surrogatepass")) > 200:
        msg = (
            f"{name!r:.240} cannot name a tensor that is written: expected 1 to 200 bytes that do not begin with "
            "'.' or '_' and hold no '/', '\\', ':' or control character. Choose another name."
        )
        raise IncompatibleOptionsError(msg, tensor=name)


def tensor_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor in C order as a 1-D uint8 array; a view where the tensor is contiguous in host memory."""
    dense = tensor.detach().cpu().contiguous()
    # Strides of dimensions of size 0 and 1 may be anything, and then refuse to be viewed as bytes.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy()


def read_at(file: BinaryIO, offset: int, nbytes: int) -> bytes:
    """Up to ``nbytes`` bytes from ``offset``; fewer only where the file ends."""
    file.seek(offset)
    parts = []
    while nbytes > 0 and (part := file.read(nbytes)):
        parts.append(part)
        nbytes -= len(part)
    return b"".join(parts)


def read_file(path: Path) -> bytes:
    """The whole content of a small regular file; errors as :func:`open_for_reading`."""
    with open_for_reading(path) as (file, size):
        return read_at(file, 0, size)


def write_at(file: BinaryIO, offset: int, data: bytes | memoryview) -> None:
    """Write every byte at ``offset``; ``OSError`` (a full disk, say) is the caller's to explain."""
    file.seek(offset)
    view = memoryview(data).cast("B")
    while len(view):
        view = view[file.write(view[:_WRITE_NBYTES]) :]


def create_file(path: Path) -> BinaryIO:
    """Create a new file for writing, unbuffered; ``FileExistsError`` if it is there already."""
    return path.open("xb+", buffering=0)


class TensorBeingWritten:
    """The tensor between ``begin`` and ``end``: what was promised, and how much of it has come.

    Attributes:
        name: its name.
        dtype: torch dtype of every block.
        row_shape: ``None`` for a scalar.
        rows: promised rows, or ``None`` if unknown.
        done: rows that have come.
    """

    def __init__(self, name: str, dtype: torch.dtype, row_shape: tuple[int, ...] | None, rows: int | None) -> None:
        check_name(name)
        self.name = name
        self.dtype = dtype
        self.row_shape = row_shape
        self.rows = 1 if row_shape is None else rows
        self.done = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what has come so far."""
        return () if self.row_shape is None else (self.done, *self.row_shape)

    @property
    def promised_shape(self) -> tuple[int, ...]:
        """Shape that was promised; only for a known number of rows."""
        if self.row_shape is None:
            return ()
        return (self.done if self.rows is None else self.rows, *self.row_shape)

    def take(self, block: torch.Tensor) -> torch.Tensor:
        """Check one appended block and count its rows.

        Raises:
            IntegrityError: its dtype or shape is not what was promised, or there are too many rows.
        """
        expected = "[]" if self.row_shape is None else f"[n, {', '.join(map(str, self.row_shape))}]"
        fits = block.shape == () if self.row_shape is None else tuple(block.shape[1:]) == self.row_shape
        if block.dtype != self.dtype or not fits or (self.row_shape is not None and block.ndim == 0):
            msg = (
                f"tensor {self.name!r}: expected a block of {dtype_name(self.dtype)} {expected}, "
                f"found {dtype_name(block.dtype)} {list(block.shape)}."
            )
            raise IntegrityError(msg, tensor=self.name)
        self.done += 1 if self.row_shape is None else block.shape[0]
        if self.rows is not None and self.done > self.rows:
            msg = f"tensor {self.name!r}: {self.rows} rows were promised, {self.done} came."
            raise IntegrityError(msg, tensor=self.name)
        return block

    def finish(self) -> None:
        """Check that every promised row came.

        Raises:
            IntegrityError: rows are missing.
        """
        if self.rows is not None and self.done != self.rows:
            msg = f"tensor {self.name!r}: {self.rows} rows were promised, only {self.done} came."
            raise IntegrityError(msg, tensor=self.name)


def require_open(open_: bool, path: Path) -> None:
    """Raise ClosedError unless a writer is still open."""
    if not open_:
        msg = f"{path}: this writer was closed or abandoned; make a new one."
        raise ClosedError(msg, path=path)
