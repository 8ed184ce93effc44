"""What a file was at one moment, and whether it still is.

:class:`FileIdentity` is what the system says of a file: it costs a microsecond, and holds on this machine.
:class:`FileFingerprint` adds a sample of the content, so that a copy of a file is recognised; the manifest keeps it.
Chunked HDF5 has its own identity (``formats/hdf5/index.py``): formats import nothing of this package but errors.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash

__all__ = ["FileFingerprint", "FileIdentity"]

# O_NONBLOCK so that a named pipe opens, and is then refused, where it would otherwise wait for a writer.
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_WINDOWS = 16
_WINDOW_NBYTES = 64 << 10


class FileIdentity(NamedTuple):
    """What tells a file from another one, or from itself after a change, on this machine.

    Attributes:
        size: bytes.
        mtime_ns: modification time.
        inode: number of the file in its file system.
        device: number of the file system.
    """

    size: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> FileIdentity:
        """Identity of a file as it is now; reads nothing of it.

        Raises:
            OSError: there is no such file, or it cannot be reached.
        """
        facts = os.stat(path)  # noqa: PTH116 - of ten thousand parts, most of the time went into making paths
        return cls(facts.st_size, facts.st_mtime_ns, facts.st_ino, facts.st_dev)


@dataclass(frozen=True, slots=True)
class FileFingerprint:
    """What a file was at one moment.

    Attributes:
        size: bytes.
        mtime_ns: modification time.
        sample: hash of 16 windows of the content, in hex; ``None`` where only size and time are known.
    """

    size: int
    mtime_ns: int
    sample: str | None = None

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> FileFingerprint:
        """Fingerprint of a file as it is now; reads at most 1 MiB.

        Raises:
            OSError: there is no such file, or it cannot be read.
        """
        fd = os.open(path, _READ_FLAGS)
        try:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
            return cls(facts.st_size, facts.st_mtime_ns, _sample(fd, facts.st_size))
        finally:
            os.close(fd)

    def matches(self, path: str | os.PathLike[str]) -> bool:
        """Whether a file still is what it was: size and time equal, or size and sample equal.

        Raises:
            OSError: there is no such file, or it cannot be read.
        """
        found = FileIdentity.of(path)
        if found.size != self.size:
            return False
        if found.mtime_ns == self.mtime_ns:
            return True
        return self.sample is not None and FileFingerprint.of(path).sample == self.sample

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"size": self.size, "mtime_ns": self.mtime_ns, "sample": self.sample}


def _sample(fd: int, size: int) -> str:
    digest = xxhash.xxh3_128(size.to_bytes(8, "little"))
    if size <= _WINDOWS * _WINDOW_NBYTES:
        starts, length = [0], size
    else:
        starts, length = [(size - _WINDOW_NBYTES) * i // (_WINDOWS - 1) for i in range(_WINDOWS)], _WINDOW_NBYTES
    with open(fd, "rb", buffering=0, closefd=False) as file:
        for start in starts:
            file.seek(start)
            left = length
            while left > 0 and (data := file.read(left)):
                digest.update(data)
                left -= len(data)
    return digest.hexdigest()
