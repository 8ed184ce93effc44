"""Memory in which a worker process makes batches that its parent reads, without a file, a copy or a message per tensor.

A worker owns its blocks and fills one after another. It sends the descriptor of a block once; from then on it sends the
block's number. Each block begins with two counters: how often the worker has sent it, and how often the parent has finished
with it. A block is free if both are equal and the worker itself holds no tensor over it. Each counter has one writer, so
nothing is locked, and a process that dies leaves nothing behind: the memory has no name (``memfd_create``), and belongs to
those that map it.

What a parent holds for long is copied out of the blocks, so that the worker does not run out of them. What it holds while it
forks, its child may read as long as it likes, so such a block is never filled again.
"""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from multiprocessing import reduction
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from jasper_store.paging.buffers import BufferPool

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BlockTicket", "SharedBlock", "SharedBlocks", "attach", "forget_dead_workers"]

_HEADER: Final = mmap.PAGESIZE
"""Bytes before the data: the counters, and the rest of their page."""
_SENT, _DONE = 0, 1
_RETIRED: Final = -1
"""In place of the second counter: the parent never reads the block again, and the worker must not fill it again."""
_MAX_BLOCKS: Final = 32
"""Blocks of a worker: those on their way (PyTorch's ``prefetch_factor``, 2 by default), and those that the parent holds."""
_MAX_HELD: Final = 4
"""Blocks of a worker that the parent holds; the tensors of further ones are copied."""
_GRANULARITY: Final = 64 << 10


def _counters(memory: mmap.mmap) -> memoryview:
    return memoryview(memory)[:16].cast("q")


class BlockKey(NamedTuple):
    """What names a block.

    Attributes:
        pid: the worker.
        token: a random number of the worker, because systems give numbers of processes again.
        number: the block's number in that worker.
    """

    pid: int
    token: int
    number: int


class BlockTicket(NamedTuple):
    """What a worker sends in place of a block's bytes.

    Attributes:
        key: the block.
        size: bytes of the block, the counters included.
        nbytes: bytes of data that were sent.
        file: the descriptor, the first time.
    """

    key: BlockKey
    size: int
    nbytes: int
    file: Any


# --- in the worker --------------------------------------------------------------------------------------------------


class SharedBlock:
    """A block that this process fills.

    Attributes:
        address: of its first byte of data.
        nbytes: bytes of data that it has room for.
    """

    def __init__(self, key: BlockKey, nbytes: int) -> None:
        self._key = key
        self._size = _HEADER + -(-nbytes // _GRANULARITY) * _GRANULARITY
        self._file = os.memfd_create("jasper_store", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._file, self._size)
            self._memory = mmap.mmap(self._file, self._size)
        except BaseException:
            os.close(self._file)
            raise
        self.nbytes = self._size - _HEADER
        self._counters = _counters(self._memory)
        self._used: Callable[[], memoryview | None] = _nothing
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.address = whole.data_ptr() + _HEADER

    @property
    def free(self) -> bool:
        """Whether nothing refers to its data, here or in the parent."""
        return self._used() is None and self._counters[_SENT] == self._counters[_DONE]

    @property
    def retired(self) -> bool:
        """Whether the parent has told that it must not be filled again."""
        return self._counters[_DONE] == _RETIRED

    def tensor(self, nbytes: int) -> torch.Tensor:
        """Its first bytes, uint8 [nbytes]; the block is in use until this tensor and its views are gone."""
        window = memoryview(self._memory)[_HEADER : _HEADER + nbytes]
        self._used = weakref.ref(window)
        return torch.frombuffer(window, dtype=torch.uint8)

    def send(self, nbytes: int) -> BlockTicket:
        """What the parent needs to read its first bytes; the parent has it from now on, until its tensors are gone."""
        first = self._counters[_SENT] == 0
        self._counters[_SENT] += 1
        # A block is sent again only after the parent has given it back, for which it has mapped it.
        return BlockTicket(self._key, self._size, nbytes, reduction.DupFd(self._file) if first else None)

    def close(self) -> None:
        """Close the descriptor; the memory goes with its last map."""
        os.close(self._file)


def _nothing() -> None:
    """Stands for a weak reference to nothing."""


class SharedBlocks:
    """The blocks of this worker. Batches are made by one thread; any thread may send them."""

    def __init__(self) -> None:
        self._blocks: list[SharedBlock] = []
        self._made = 0
        self._token = int.from_bytes(os.urandom(8), "little")

    def take(self, nbytes: int) -> SharedBlock | None:
        """A free block with room for so many bytes; ``None`` if there are too many already, or the system has none."""
        for block in [block for block in self._blocks if block.retired]:
            self._blocks.remove(block)
            block.close()
        for block in self._blocks:
            if block.nbytes >= nbytes and block.free:
                return block
        if len(self._blocks) >= _MAX_BLOCKS or not hasattr(os, "memfd_create"):
            return None
        try:
            block = SharedBlock(BlockKey(os.getpid(), self._token, self._made), nbytes)
        except OSError:  # no descriptor or no memory left: PyTorch's way may still work, or has an error that says it
            return None
        self._made += 1
        self._blocks.append(block)
        return block


# --- in its parent --------------------------------------------------------------------------------------------------


class _Attached:
    """A block of a worker that this process has mapped."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory = memory
        self.counters = _counters(memory)
        self.retired = False


_attached: dict[BlockKey, _Attached] = {}
_held: dict[int, tuple[BlockKey, weakref.ref[memoryview]]] = {}
"""Blocks over which this process has tensors, by the identity of the buffer that these share."""
_copies = BufferPool()


def attach(ticket: BlockTicket) -> Any:
    """The bytes that were sent, as a buffer of so many bytes; the block is the parent's while the buffer lives.

    Call it once for each ticket.

    Raises:
        RuntimeError: the ticket was opened in a process that has not got the block's first one.
    """
    key = ticket.key
    block = _attached.get(key)
    if block is None:
        forget_dead_workers(key)
        block = _attached[key] = _Attached(_mapped(ticket))
    if sum(held[0].pid == key.pid for held in tuple(_held.values())) >= _MAX_HELD:
        copy = _copies.empty((ticket.nbytes,), torch.uint8).numpy()
        copy[:] = memoryview(block.memory)[_HEADER : _HEADER + ticket.nbytes]
        block.counters[_DONE] += 1
        return copy
    window = memoryview(block.memory)[_HEADER : _HEADER + ticket.nbytes]
    identity = id(window)
    _held[identity] = (key, weakref.ref(window, lambda _: _done(identity)))
    return window


def _mapped(ticket: BlockTicket) -> mmap.mmap:
    if ticket.file is None:
        msg = (
            f"block {ticket.key.number} of worker {ticket.key.pid} is not known in this process: batches of a worker must all be"
            " received by the process that started it"
        )
        raise RuntimeError(msg)
    file = ticket.file.detach()
    try:
        return mmap.mmap(file, ticket.size)
    finally:
        os.close(file)


def _done(identity: int, ending: Callable[[], bool] = sys.is_finalizing) -> None:
    """Give a block back, once no tensor refers to it."""
    if ending():  # the names of this module may be gone, and the workers are
        return
    key, _ = _held.pop(identity)
    block = _attached.get(key)
    if block is None:
        return
    if block.retired:
        block.counters[_DONE] = _RETIRED
        del _attached[key]
    else:
        block.counters[_DONE] += 1
    if not _is_alive(key.pid):
        forget_dead_workers()


def forget_dead_workers(new: BlockKey | None = None) -> None:
    """Unmap the blocks of workers that have ended; those over which there are tensors go with them.

    Args:
        new: a block of a worker that is alive; another one that had its number is not.
    """
    for key in tuple(_attached):
        reused = new is not None and key.pid == new.pid and key.token != new.token
        if reused or not _is_alive(key.pid):
            _attached.pop(key, None)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# --- forks ----------------------------------------------------------------------------------------------------------


def _retire() -> None:
    """A child that is about to be forked may read what this process holds, for as long as it likes."""
    for key, _ in tuple(_held.values()):
        block = _attached.get(key)
        if block is not None:
            block.retired = True


def _forget() -> None:
    """In a forked child: what it has inherited is its parent's to give back."""
    _held.clear()
    _attached.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_retire, after_in_child=_forget)
