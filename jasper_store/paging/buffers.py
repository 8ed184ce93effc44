"""A pool of memory for tensors that are allocated and freed again and again, as batches are.

The C library returns a block of some megabytes to the kernel as soon as it is freed. Allocating the next one costs a
page fault and a page of zeros for each 4 KiB, more than the gather that fills it (measured in docs/notes-paging.md).
The pool keeps the block and reuses it once nothing refers to it: neither the tensor, nor a view of it, nor a NumPy
array that shares its memory. A block whose size does not come again is given back after a while, and all free ones when
a store is closed: a process that trains for days holds what its present loaders use.
"""

from __future__ import annotations

import math
import mmap
import sys
import weakref
from collections import deque
from typing import TYPE_CHECKING, Final

import torch

from jasper_store.paging.preload import anonymous

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["BufferPool"]

_GRANULARITY: Final = 256 << 10
"""Block sizes are multiples of this many bytes."""
_MIN_NBYTES: Final = 512 << 10
"""Below this the C library is faster."""
_MAX_NBYTES: Final = 256 << 20
"""Above this the memory is worth more than the time to allocate it again."""
_MAX_FREE_NBYTES: Final = 128 << 20
"""Bytes of free blocks that are kept, the ones released last: a loader fills one batch while the trainer uses
another."""
_MAX_IDLE_NBYTES: Final = 2 << 30
"""A free block is given back once so many bytes were allocated since its release: to allocate it anew then costs little
beside them."""


class BufferPool:
    """Allocates tensors over reused memory. Safe to use from several threads.

    Args:
        max_free_nbytes: bytes of free blocks to keep, at most.
        max_idle_nbytes: bytes that are allocated after a block was released, until it is given back unused.
    """

    def __init__(self, max_free_nbytes: int = _MAX_FREE_NBYTES, max_idle_nbytes: int = _MAX_IDLE_NBYTES) -> None:
        # In the order of their release, each with the bytes that were allocated until then. Every change is one atomic
        # operation of the interpreter.
        self._free: deque[tuple[mmap.mmap, int]] = deque()
        self._in_use: dict[int, weakref.ref[memoryview]] = {}
        self._allocated = 0  # threads may lose some of each other's bytes: blocks are then kept a little longer
        # Attributes, not the constants: blocks are also released while the interpreter ends, when the names of this
        # module are gone.
        self._max_free_nbytes, self._max_idle_nbytes = max_free_nbytes, max_idle_nbytes

    @property
    def free_nbytes(self) -> int:
        """Bytes of the blocks that are kept and not in use."""
        return sum(len(block) for block, _ in tuple(self._free))

    def clear(self) -> None:
        """Give the free blocks back. Those in use are kept as before once they are released."""
        self._free.clear()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised host tensor, like ``torch.empty``, possibly over memory that was used before."""
        nbytes = math.prod(shape) * dtype.itemsize
        if not _MIN_NBYTES <= nbytes <= _MAX_NBYTES or sys.platform != "linux":
            return torch.empty(tuple(shape), dtype=dtype)
        size = -(-nbytes // _GRANULARITY) * _GRANULARITY
        self._allocated += size
        block = self._pop_free(size)
        if block is None:
            try:
                block = anonymous(size)
            except OSError:
                return torch.empty(tuple(shape), dtype=dtype)  # raises its own error, or finds memory elsewhere
        # The storage holds the only reference to this view, so the finalizer runs when the storage is freed.
        window = memoryview(block)[:nbytes]
        key = id(window)
        self._in_use[key] = weakref.ref(window, lambda _: self._release(key, block))
        return torch.frombuffer(window, dtype=dtype).view(tuple(shape))

    def _pop_free(self, size: int) -> mmap.mmap | None:
        """The free block of this size that was released last, which may still be in the processor's cache."""
        for entry in reversed(tuple(self._free)):
            if len(entry[0]) == size:
                try:
                    self._free.remove(entry)
                except ValueError:
                    continue  # another thread took it
                return entry[0]
        return None

    def _release(self, key: int, block: mmap.mmap) -> None:
        self._in_use.pop(key, None)
        self._free.append((block, self._allocated))
        held = self.free_nbytes
        try:
            while held > self._max_free_nbytes or self._allocated - self._free[0][1] > self._max_idle_nbytes:
                held -= len(self._free.popleft()[0])
        except IndexError:
            pass  # another thread removed them; contextlib.suppress may be gone when the last batch is released
