"""Files as memory: a private, writable, zero-copy map of a whole file, and torch views into it.

On Linux the map is ``MAP_PRIVATE | MAP_NORESERVE`` with read and write access. It opens files larger than RAM
(a plain private map is refused with ENOMEM under the default overcommit heuristic), needs no write permission,
and an in-place write through a view changes a private copy of the page: it can neither reach the file nor crash.
Elsewhere ``mmap.ACCESS_COPY`` does the same, except that the system may count the whole file against its commit limit.
If the system refuses a writable map (overcommit mode 2), the map is read-only and :attr:`FileMap.writable` is False:
writing through a view of such a map would end the process, so callers return copies instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import mmap
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from jasper_store.errors import (
    ClosedError,
    CorruptFileError,
    DatasetNotFoundError,
    IncompatibleOptionsError,
    InsufficientMemoryError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from jasper_store.errors import JasperStoreError

__all__ = ["MAP_NORESERVE", "FileMap", "MappedFile", "mappable", "memory_limits", "open_regular", "refusal", "view"]

MAP_NORESERVE = 0x4000  # Linux, every architecture torch runs on; mmap names it only from Python 3.13.


class FileMap:
    """One whole file as bytes in memory. No data is read by opening it.

    Views share its memory and stay valid when the map is deleted or closed: the file is unmapped when the map and all
    views are gone. Safe to read from several threads. Survives a fork: children share the page cache, and their
    writes are private. Pickles as its path and is mapped again where it is unpickled.

    Attributes:
        path: the file.
        nbytes: size of the file when it was opened; the map never covers more.
        address: address of byte 0, a multiple of the page size; 0 for an empty file.
        writable: False if the system allowed only a read-only map; writing through its views is not allowed.

    Raises:
        DatasetNotFoundError: there is no such file, or it may not be read.
        InsufficientMemoryError: the system refused the map; the message names the limits that can be the cause.
        IncompatibleOptionsError: the file system cannot map files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.nbytes = 0
        self.address = 0
        self.writable = True
        self._fd = open_regular(self.path)
        self._buffer: Any = None
        self._closed = False
        try:
            self.nbytes = os.fstat(self._fd).st_size
            if self.nbytes:
                self._map()
        except BaseException:
            self.close()
            raise

    def _map(self) -> None:
        mapped, self.writable = _map_file(self._fd, self.nbytes, self.path)
        self.address = int(np.frombuffer(mapped, dtype=np.uint8).__array_interface__["data"][0])
        self._buffer = mapped
        if not self.writable:
            # torch warns about read-only buffers, and silencing it would change the process-wide warning filters. A
            # ctypes array over the same memory carries no access flag, and keeps the map alive.
            holder = (ctypes.c_ubyte * self.nbytes).from_address(self.address)
            holder.mapped = mapped  # type: ignore[attr-defined]  # ctypes instances take attributes
            self._buffer = holder

    @property
    def bytes(self) -> torch.Tensor:
        """The whole file, uint8 [nbytes], zero-copy."""
        return view(self, 0, torch.uint8, (self.nbytes,))

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def buffer(self) -> Any:
        """The object whose memory the views share (buffer protocol).

        Raises:
            ClosedError: the map was closed.
        """
        if self._closed:
            msg = f"{self.path}: the file map is closed; open the store again to read from it"
            raise ClosedError(msg, path=self.path)
        return self._buffer

    def fileno(self) -> int:
        """File descriptor of the mapped file, also if its name refers to another file by now.

        Raises:
            ClosedError: the map was closed.
        """
        if self._closed:
            msg = f"{self.path}: the file map is closed; open the store again to read from it"
            raise ClosedError(msg, path=self.path)
        return self._fd

    # A class attribute: the last maps are deleted when the interpreter ends, and this module's names are gone by then.
    _close_fd = staticmethod(os.close)

    def close(self) -> None:
        """Close the map; existing views stay valid and keep the memory mapped. May be called twice."""
        if not self._closed:
            self._closed = True
            self._buffer = None
            self._close_fd(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Without the attribute the constructor failed before it opened anything.
        if not getattr(self, "_closed", True):
            self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.path,))

    def __repr__(self) -> str:
        state = "closed" if self._closed else "private copy-on-write" if self.writable else "read-only"
        return f"FileMap({str(self.path)!r}, {self.nbytes:,} bytes, {state})"


def open_regular(path: Path) -> int:
    """A descriptor of a regular file.

    Raises:
        DatasetNotFoundError: there is no such file, or it may not be read.
        IncompatibleOptionsError: too many files are open.
    """
    try:
        # Checked first: opening a named pipe would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            msg = f"{path}: expected a regular file, found a directory or device; give the path of the data file"
            raise DatasetNotFoundError(msg, path=path)
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as exc:
        if isinstance(exc, DatasetNotFoundError):
            raise
        if exc.errno in {errno.EMFILE, errno.ENFILE}:
            raise _too_many_files(path) from exc
        msg = f"{path}: the file cannot be read ({exc.strerror or exc}); check the path and its permissions"
        raise DatasetNotFoundError(msg, path=path) from exc


def _map_file(fd: int, nbytes: int, path: Path) -> tuple[mmap.mmap, bool]:
    """Map ``nbytes`` of a file; (map, writable)."""
    try:
        if sys.platform == "linux":
            flags = mmap.MAP_PRIVATE | MAP_NORESERVE
            return mmap.mmap(fd, nbytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE), True
        return mmap.mmap(fd, nbytes, access=mmap.ACCESS_COPY), True
    except (OSError, ValueError) as exc:
        # ValueError: the file shrank between fstat and here.
        if isinstance(exc, ValueError) or exc.errno in {errno.ENODEV, errno.EBADF}:
            raise refusal(exc, path, nbytes) from exc
    try:
        return mmap.mmap(fd, nbytes, access=mmap.ACCESS_READ), False
    except (OSError, ValueError) as exc:
        raise refusal(exc, path, nbytes) from exc


def _too_many_files(path: Path) -> IncompatibleOptionsError:
    msg = (
        f"{path}: too many files are open at once (a mapped file holds two descriptors); raise the limit (ulimit -n), "
        "preload (use_mmap=False), or keep several tensors in one file"
    )
    return IncompatibleOptionsError(msg, path=path)


def refusal(exc: OSError | ValueError, path: Path, nbytes: int) -> JasperStoreError:
    """The error that says why the system refused to map a file of so many bytes."""
    if isinstance(exc, ValueError):
        msg = f"{path}: expected {nbytes:,} bytes, and the file shrank while it was being opened ({exc}); open it again"
        return CorruptFileError(msg, path=path)
    if exc.errno in {errno.EMFILE, errno.ENFILE}:
        return _too_many_files(path)
    if exc.errno in {errno.ENODEV, errno.EINVAL}:
        msg = (
            f"{path}: this file system cannot map files ({exc.strerror}); "
            "preload instead (use_mmap=False), or copy the dataset to a local disk"
        )
        return IncompatibleOptionsError(msg, path=path)
    msg = (
        f"{path}: the system refused to map {nbytes:,} bytes ({exc.strerror or exc}). "
        f"Limits that can be the cause: {memory_limits()}. Raise the one that is reached, or use fewer, larger files"
    )
    return InsufficientMemoryError(msg, path=path, needed=nbytes)


def memory_limits() -> str:
    """The system's limits on maps and address space, for error messages; empty values are left out."""
    parts = []
    for name, file in (
        ("vm.overcommit_memory", "/proc/sys/vm/overcommit_memory"),
        ("vm.max_map_count", "/proc/sys/vm/max_map_count"),
    ):
        # The cause of the failed map may make this fail, too.
        with contextlib.suppress(OSError):
            parts.append(f"{name} = {Path(file).read_text().strip()}")
    with contextlib.suppress(OSError), Path("/proc/self/maps").open("rb") as maps:
        parts.append(f"maps in use = {sum(1 for _ in maps)}")
    if sys.platform != "win32":
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        parts.append(
            "RLIMIT_AS (ulimit -v) = " + ("unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,} bytes")
        )
    return ", ".join(parts) or "the commit limit (page file size)"


def mappable(offset: int, dtype: torch.dtype) -> bool:
    """Whether a tensor at this byte offset can be a view of the file: aligned to its elements, host little-endian."""
    return offset % dtype.itemsize == 0 and sys.byteorder == "little"


class MappedFile(Protocol):
    """What :func:`view` needs to know of a file that is mapped."""

    path: Path
    nbytes: int

    @property
    def buffer(self) -> Any:
        """The object whose memory views share."""


def view(
    fmap: MappedFile,
    offset: int,
    dtype: torch.dtype,
    shape: Sequence[int],
    strides: Sequence[int] | None = None,
) -> torch.Tensor:
    """A tensor over bytes of a mapped file; nothing is read or copied.

    Args:
        fmap: the file.
        offset: byte offset of element [0, 0, ...].
        dtype: element type as stored.
        shape: sizes; ``()`` for a scalar, any of them may be 0.
        strides: elements to step per dimension, none negative; ``None`` means C order.

    Returns:
        A view that keeps the map alive; its storage covers this tensor only. A tensor without elements owns
        its (empty) storage.

    Raises:
        CorruptFileError: the bytes are not all inside the file, or not aligned to the element.
        ClosedError: the map was closed.
    """
    buffer = fmap.buffer
    if offset < 0 or any(n < 0 for n in shape) or any(s < 0 for s in strides or ()):
        msg = f"{fmap.path}: expected offset, shape and strides of 0 or more, got {offset}, {tuple(shape)}, {strides}"
        raise CorruptFileError(msg, path=fmap.path)
    if math.prod(shape) == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    steps = ((n - 1) * s for n, s in zip(shape, strides or (), strict=strides is not None))
    count = math.prod(shape) if strides is None else 1 + sum(steps)
    end = offset + count * dtype.itemsize
    if end > fmap.nbytes:
        msg = (
            f"{fmap.path}: a tensor {dtype} {tuple(shape)} at byte {offset:,} needs the file to have {end:,} bytes, "
            f"found {fmap.nbytes:,}: it is truncated; copy or convert it again"
        )
        raise CorruptFileError(msg, path=fmap.path)
    if not mappable(offset, dtype):
        msg = (
            f"{fmap.path}: a tensor {dtype} at byte {offset:,} cannot be mapped, its elements need an offset divisible "
            f"by {dtype.itemsize}; convert the dataset (jasper-store convert), or preload it (use_mmap=False)"
        )
        raise CorruptFileError(msg, path=fmap.path)
    flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset)
    return flat.view(tuple(shape)) if strides is None else flat.as_strided(tuple(shape), tuple(strides))
