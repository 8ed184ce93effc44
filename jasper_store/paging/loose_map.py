"""Files as memory without a descriptor each: for tensors that lie in more files than a process may have open."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from typing import TYPE_CHECKING, Any

from jasper_store.paging.mapping import MAP_NORESERVE, FileMap, open_regular, refusal

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["LooseMap"]

_PROT_READ, _PROT_WRITE, _MAP_PRIVATE, _FAILED = 1, 2, 2, 2**64 - 1


def _call(name: str, *kinds: Any) -> Any:
    """A function of the C library that takes an address first and returns one.

    By a separate prototype: types that are set on a function of a library apply to every user of the library.
    """
    if sys.platform != "linux":
        return None
    made = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, *kinds, use_errno=True)
    return made((name, ctypes.CDLL(None, use_errno=True)))


class LooseMap:
    """A private map of a whole file whose descriptor is closed; unmapped when it and its views are gone.

    Attributes:
        path: the file.
        name: the same as a text.
        nbytes: its size when it was mapped.
        address: address of byte 0.
        writable: False if the system allowed only a read-only map.
        buffer: the object whose memory views share.
        inode: number of the file in its file system.

    Raises:
        DatasetNotFoundError, InsufficientMemoryError, IncompatibleOptionsError: as
            :class:`~jasper_store.paging.mapping.FileMap`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.address, self.writable = path, str(path), 0, True
        if sys.platform != "linux":  # there, maps of the standard library; they keep a descriptor
            self._file: FileMap | None = FileMap(path)
            self.nbytes, self.address, self.writable = self._file.nbytes, self._file.address, self._file.writable
            self.buffer, self.inode = self._file.buffer, os.fstat(self._file.fileno()).st_ino
            return
        fd = open_regular(path)
        try:
            facts = os.fstat(fd)
            self.nbytes, self.inode = facts.st_size, facts.st_ino
            owner = _Mapped(fd, self.nbytes, path) if self.nbytes else None
        finally:
            os.close(fd)
        self.buffer: Any = None
        if owner is not None:
            self.address, self.writable = owner.address, owner.writable
            self.buffer = (ctypes.c_ubyte * self.nbytes).from_address(self.address)
            self.buffer.mapped = owner


class _Mapped:
    """Memory that is unmapped when nothing refers to it any more."""

    # Class attributes: the last maps are deleted when the interpreter ends, and this module's names are gone by then.
    _mmap = staticmethod(
        _call("mmap64", *(ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong))
    )
    _munmap = staticmethod(_call("munmap", ctypes.c_size_t))

    def __init__(self, fd: int, nbytes: int, path: Path) -> None:
        self.address, self.nbytes = 0, nbytes
        for protection in (_PROT_READ | _PROT_WRITE, _PROT_READ):
            address = self._mmap(None, nbytes, protection, _MAP_PRIVATE | MAP_NORESERVE, fd, 0)
            if address not in {None, _FAILED}:
                self.address, self.writable = address, bool(protection & _PROT_WRITE)
                return
            code = ctypes.get_errno()
            if code == errno.ENODEV:
                break
        raise refusal(OSError(code, os.strerror(code)), path, nbytes)

    def __del__(self) -> None:
        if self.address:
            self._munmap(self.address, self.nbytes)
            self.address = 0
