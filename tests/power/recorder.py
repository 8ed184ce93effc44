"""A file system in memory, mounted through /dev/fuse, that keeps a list of everything that was done to it.

The kernel itself reports each operation, so nothing escapes: writes through a map, O_DIRECT, io_uring,
copy_file_range, a system call that no library makes. It needs root, Linux and /dev/fuse, and no package.

Run as a script: ``recorder.py MOUNTPOINT LOG``. It prints ``ready`` when the directory is mounted, and writes the list of
:mod:`tests.power.operations` to LOG, pickled, when it was unmounted.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import stat
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = 1
_HEADER = struct.Struct("<IIQQIIIHH")
_ATTR = struct.Struct("<6Q10I")
_ENTRY = struct.Struct("<4Q2I")
_MAX_WRITE = 1 << 20
_LONG = 3600  # seconds that the kernel may keep a name: nothing else changes this file system
_EXCHANGE = 2
_NOREPLACE = 1
_BIG_WRITES, _MAX_PAGES = 1 << 5, 1 << 22


@dataclass
class Node:
    """A file, a directory or a symbolic link."""

    number: int
    mode: int
    data: bytearray = field(default_factory=bytearray)
    names: dict[bytes, int] = field(default_factory=dict)  # of a directory, in the order in which they came
    links: int = 1
    mtime: int = 0


class RefusedError(Exception):
    """An operation that ends with an error number."""

    def __init__(self, code: int) -> None:
        super().__init__(os.strerror(code))
        self.code = code


class Recorder:
    """The file system: a method for each operation of the protocol, which returns the bytes of the answer."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.nodes = {ROOT: Node(ROOT, stat.S_IFDIR | 0o755, mtime=time.time_ns())}
        self.operations: list[tuple[Any, ...]] = []
        self.listings: dict[int, list[tuple[bytes, int]]] = {}
        self.numbers = iter(range(ROOT + 1, 1 << 62))
        self.handlers: dict[int, Callable[[int, bytes], bytes]] = {
            1: self.lookup, 3: self.getattr, 4: self.setattr, 5: self.readlink, 6: self.symlink, 8: self.mknod, 9: self.mkdir,
            10: self.unlink, 11: self.rmdir, 12: self.rename, 13: self.link, 14: self.open, 15: self.read, 16: self.write,
            17: self.statfs, 18: self.release, 20: self.fsync, 26: self.init, 27: self.opendir, 28: self.readdir,
            29: self.releasedir, 30: self.fsync, 45: self.rename2,
        }  # fmt: skip

    def serve(self) -> None:
        """Answer until the directory is unmounted."""
        while True:
            try:
                request = os.read(self.fd, _MAX_WRITE + 4096)
            except OSError as exc:
                if exc.errno == errno.ENODEV:
                    return
                if exc.errno in {errno.EINTR, errno.ENOENT}:
                    continue
                raise
            _, code, unique, node, *_ = _HEADER.unpack_from(request)
            if code in {2, 36, 42}:  # FORGET, INTERRUPT, BATCH_FORGET have no answer
                continue
            error, body = 0, b""
            try:
                body = self.handlers.get(code, self.unknown)(node, request[_HEADER.size :])
            except RefusedError as exc:
                error = -exc.code
            os.write(self.fd, struct.pack("<IiQ", 16 + len(body), error, unique) + body)

    def unknown(self, number: int, body: bytes) -> bytes:
        """What the kernel can do without: it then asks in another way, or tells the caller."""
        raise RefusedError(errno.ENOSYS)

    # ---- attributes

    def attributes(self, node: Node) -> bytes:
        size, seconds, rest = len(node.data), *divmod(node.mtime, 10**9)
        times = (seconds, seconds, seconds, rest, rest, rest)
        return _ATTR.pack(node.number, size, -(-size // 512), *times, node.mode, node.links, 0, 0, 0, 4096, 0)

    def entry(self, node: Node) -> bytes:
        return _ENTRY.pack(node.number, 1, _LONG, 0, 0, 0) + self.attributes(node)

    def getattr(self, number: int, _: bytes) -> bytes:
        return struct.pack("<QII", 0, 0, 0) + self.attributes(self.nodes[number])

    def setattr(self, number: int, body: bytes) -> bytes:
        valid, _, _, size, _, _, mtime, _, _, mtime_ns, _, mode = struct.unpack_from("<II6Q4I", body)
        node = self.nodes[number]
        if valid & 1:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
        if valid & 8:
            if size < len(node.data):
                del node.data[size:]
            else:
                node.data.extend(bytes(size - len(node.data)))
            self.operations.append(("size", number, size))
            self.touch(node)
        if valid & 32:
            self.touch(node, time.time_ns() if valid & 256 else mtime * 10**9 + mtime_ns)
        return self.getattr(number, b"")

    def touch(self, node: Node, when: int | None = None) -> None:
        node.mtime = time.time_ns() if when is None else when
        self.operations.append(("time", node.number, node.mtime))

    def statfs(self, number: int, _: bytes) -> bytes:
        return struct.pack("<5Q4I24x", 1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20, 4096, 255, 4096, 0)

    # ---- names

    def child(self, number: int, name: bytes) -> Node:
        found = self.nodes[number].names.get(name)
        if found is None:
            raise RefusedError(errno.ENOENT)
        return self.nodes[found]

    def lookup(self, number: int, body: bytes) -> bytes:
        return self.entry(self.child(number, body.rstrip(b"\0")))

    def make(self, number: int, name: bytes, mode: int, data: bytes = b"") -> bytes:
        if name in self.nodes[number].names:
            raise RefusedError(errno.EEXIST)
        node = Node(
            next(self.numbers), mode, bytearray(data), links=2 if stat.S_ISDIR(mode) else 1, mtime=time.time_ns()
        )
        self.nodes[node.number] = node
        self.nodes[number].names[name] = node.number
        kind = "directory" if stat.S_ISDIR(mode) else "link" if stat.S_ISLNK(mode) else "file"
        self.operations.append(("make", number, name, node.number, kind, bytes(data)))
        return self.entry(node)

    def mknod(self, number: int, body: bytes) -> bytes:
        (mode,) = struct.unpack_from("<I", body)
        return self.make(number, body[16:].rstrip(b"\0"), mode)

    def mkdir(self, number: int, body: bytes) -> bytes:
        (mode,) = struct.unpack_from("<I", body)
        return self.make(number, body[8:].rstrip(b"\0"), stat.S_IFDIR | stat.S_IMODE(mode))

    def symlink(self, number: int, body: bytes) -> bytes:
        name, target = body.split(b"\0")[:2]
        return self.make(number, name, stat.S_IFLNK | 0o777, target)

    def readlink(self, number: int, _: bytes) -> bytes:
        return bytes(self.nodes[number].data)

    def link(self, number: int, body: bytes) -> bytes:
        (old,) = struct.unpack_from("<Q", body)
        name, node = body[8:].rstrip(b"\0"), self.nodes[old]
        if name in self.nodes[number].names:
            raise RefusedError(errno.EEXIST)
        self.nodes[number].names[name] = old
        node.links += 1
        self.operations.append(("link", number, name, old))
        return self.entry(node)

    def unlink(self, number: int, body: bytes) -> bytes:
        name = body.rstrip(b"\0")
        node = self.child(number, name)
        del self.nodes[number].names[name]
        node.links -= 1
        self.operations.append(("unlink", number, name))
        return b""

    def rmdir(self, number: int, body: bytes) -> bytes:
        if self.child(number, body.rstrip(b"\0")).names:
            raise RefusedError(errno.ENOTEMPTY)
        return self.unlink(number, body)

    def rename(self, number: int, body: bytes) -> bytes:
        (other,) = struct.unpack_from("<Q", body)
        return self.renamed(number, other, 0, body[8:])

    def rename2(self, number: int, body: bytes) -> bytes:
        other, flags = struct.unpack_from("<QI", body)
        return self.renamed(number, other, flags, body[16:])

    def renamed(self, number: int, other: int, flags: int, names: bytes) -> bytes:
        old, new = names.split(b"\0")[:2]
        source, target = self.nodes[number].names, self.nodes[other].names
        moved, replaced = self.child(number, old), target.get(new)
        if flags & _EXCHANGE:
            if replaced is None:
                raise RefusedError(errno.ENOENT)
            source[old] = replaced
        else:
            if replaced is not None and flags & _NOREPLACE:
                raise RefusedError(errno.EEXIST)
            if replaced is not None and self.nodes[replaced].names:
                raise RefusedError(errno.ENOTEMPTY)
            if replaced is not None:
                self.nodes[replaced].links -= 1
            del source[old]
        target[new] = moved.number
        kind = "exchange" if flags & _EXCHANGE else "rename"
        self.operations.append((kind, number, old, other, new))
        return b""

    # ---- content

    def open(self, number: int, _: bytes) -> bytes:
        return struct.pack("<QIi", 0, 0, 0)

    def release(self, number: int, _: bytes) -> bytes:
        return b""

    def read(self, number: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        return bytes(memoryview(self.nodes[number].data)[offset : offset + size])

    def write(self, number: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        data, node = body[40 : 40 + size], self.nodes[number]
        if offset > len(node.data):
            node.data.extend(bytes(offset - len(node.data)))
        node.data[offset : offset + size] = data
        self.operations.append(("write", number, offset, data))
        self.touch(node)
        return struct.pack("<II", size, 0)

    def fsync(self, number: int, _: bytes) -> bytes:
        self.operations.append(("sync", number))
        return b""

    # ---- listings

    def opendir(self, number: int, _: bytes) -> bytes:
        handle = next(self.numbers)
        self.listings[handle] = list(self.nodes[number].names.items())
        return struct.pack("<QIi", handle, 0, 0)

    def releasedir(self, number: int, body: bytes) -> bytes:
        (handle,) = struct.unpack_from("<Q", body)
        del self.listings[handle]
        return b""

    def readdir(self, number: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        answer = b""
        for position, (name, child) in enumerate(self.listings[handle][offset:], offset + 1):
            kind = stat.S_IFMT(self.nodes[child].mode) >> 12
            record = struct.pack("<QQII", child, position, len(name), kind) + name
            record += bytes(-len(record) % 8)
            if len(answer) + len(record) > size:
                break
            answer += record
        return answer

    def init(self, number: int, body: bytes) -> bytes:
        _, minor, readahead, flags = struct.unpack_from("<4I", body)
        kept = flags & (_BIG_WRITES | _MAX_PAGES)
        return struct.pack("<4IHHIIHH32x", 7, min(minor, 31), readahead, kept, 16, 12, _MAX_WRITE, 1, 256, 0)


def main(mountpoint: str, log: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"recorder", os.fsencode(mountpoint), b"fuse", 0, options) != 0:
        raise OSError(ctypes.get_errno(), "mount", mountpoint)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    recorder = Recorder(fd)
    recorder.serve()
    Path(log).write_bytes(pickle.dumps(recorder.operations))


if __name__ == "__main__":
    main(*sys.argv[1:])
