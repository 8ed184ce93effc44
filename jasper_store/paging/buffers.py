"""Memory for tensors that are made, used and dropped again and again, as batches are.

The C library gives a block of some megabytes back to the kernel as soon as it is freed, and the next one is paid
for again: a page fault and a page of zeros for each 4 KiB, more than the gather that fills it (measured in
docs/notes-paging.md). Here the block is kept and handed out again, once nothing refers to it any more: neither the
tensor, nor a view of it, nor a NumPy array made of it.
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

_UNIT: Final = 256 << 10
_LEAST: Final = 512 << 10
"""Below this the C library is quicker."""
_MOST: Final = 256 << 20
"""Above this memory is worth more than the time to get it again."""
_FREE_NBYTES: Final = 128 << 20
"""Free blocks are kept up to this many bytes, the ones that came back last: a loader fills one batch while the
trainer has another."""


class BufferPool:
    """Hands out tensors over memory that is used again. Safe to use from several threads."""

    def __init__(self, free_nbytes: int = _FREE_NBYTES) -> None:
        # In the order in which they came back. Every change is one step of the interpreter.
        self._free: deque[mmap.mmap] = deque()
        self._lent: dict[int, weakref.ref[memoryview]] = {}
        # Of its own: blocks also come back while the interpreter ends, when a module's names are gone already.
        self._free_nbytes = free_nbytes

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised host tensor, as ``torch.empty`` gives it; its memory may have served before."""
        nbytes = math.prod(shape) * dtype.itemsize
        if not _LEAST <= nbytes <= _MOST or sys.platform != "linux":
            return torch.empty(tuple(shape), dtype=dtype)
        size = -(-nbytes // _UNIT) * _UNIT
        block = self._used(size)
        if block is None:
            try:
                block = anonymous(size)
            except OSError:
                return torch.empty(tuple(shape), dtype=dtype)  # its error, or what it finds elsewhere
        # A storage keeps the object that it was made over. Nobody else has this one, so it goes when the storage does.
        window = memoryview(block)[:nbytes]
        key = id(window)
        self._lent[key] = weakref.ref(window, lambda _: self._take_back(key, block))
        return torch.frombuffer(window, dtype=dtype).view(tuple(shape))

    def _used(self, size: int) -> mmap.mmap | None:
        """The free block of a size that came back last, which the processor's cache may still hold."""
        for block in reversed(tuple(self._free)):
            if len(block) == size:
                try:
                    self._free.remove(block)
                except ValueError:
                    continue  # another thread was quicker
                return block
        return None

    def _take_back(self, key: int, block: mmap.mmap) -> None:
        self._lent.pop(key, None)
        self._free.append(block)
        held = sum(map(len, tuple(self._free)))
        try:
            while held > self._free_nbytes:
                held -= len(self._free.popleft())
        except IndexError:
            pass  # another thread was quicker; contextlib may be gone when the last batch comes back
