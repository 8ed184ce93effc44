"""How a batch travels from a worker to the trainer: its tensors lie in one block of shared memory, of which a number is sent.

PyTorch sends each tensor of a batch as a file in ``/dev/shm``, whose descriptor the trainer fetches over a socket: some
400 us a tensor, more than the gather of a batch. Here a worker gathers into a block that the trainer has mapped already.
What a user's collation makes of a batch travels PyTorch's way; what it leaves as it is, this way.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections import OrderedDict
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.data import get_worker_info

from jasper_store.formats.base import contiguous_strides
from jasper_store.paging.shared_blocks import BlockTicket, SharedBlock, SharedBlocks, attach

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BatchSpace", "SharedBatch", "in_worker"]

_ALIGNMENT: Final = 64
"""Bytes that each tensor begins on a multiple of: a cache line, which the gather kernel writes as a whole."""
_RAGGED_ROOM: Final = 4
"""How many times the mean length of ragged rows a batch has room for; more of it travels PyTorch's way."""
_SPARE: Final = 4096
"""Bytes more than the tensors themselves: for their alignment."""

_BY_VALUE: Final = 2
"""Length of an entry that is sent by itself: key and value; others are key, offset, dtype and shape."""

_own: tuple[int, SharedBlocks] = (0, SharedBlocks())


class BatchSpace:
    """Room for the tensors of one batch that a worker makes.

    Args:
        samples: in the batch.
        sample_nbytes: bytes of a sample in a batch.
        ragged: the number is a mean.
    """

    def __init__(self, samples: int, sample_nbytes: int, *, ragged: bool) -> None:
        nbytes = samples * sample_nbytes * (_RAGGED_ROOM if ragged else 1) + _SPARE
        nbytes = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self._block = _own_blocks().take(nbytes)
        # Without a block, one piece of memory all the same, so that PyTorch has one to send and not one per tensor.
        self._bytes = (
            torch.empty(nbytes, dtype=torch.uint8, device="cpu") if self._block is None else self._block.tensor(nbytes)
        )
        self._typed: dict[torch.dtype, torch.Tensor] = {}
        self._room = nbytes
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, nbytes: int) -> torch.Tensor:
        """Uninitialised memory for a result of a gather, of a shape, a dtype and its bytes."""
        start = self._used
        if start + nbytes > self._room:
            return torch.empty(shape, dtype=dtype, device="cpu")
        self._used = -(-(start + nbytes) // _ALIGNMENT) * _ALIGNMENT
        typed = self._typed.get(dtype)
        if typed is None:
            self._typed[dtype] = typed = self._bytes.view(dtype)
        return typed.as_strided(shape, contiguous_strides(shape), start // dtype.itemsize)

    def hold(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch, ready to travel; tensors that were made elsewhere are copied in."""
        held = {key: value if self._has(value) else self._copied(value) for key, value in tensors.items()}
        return held if self._block is None else SharedBatch(held, self._block, self._room)

    def _has(self, value: torch.Tensor) -> bool:
        return 0 <= value.data_ptr() - self._bytes.data_ptr() < self._room

    def _copied(self, value: torch.Tensor) -> torch.Tensor:
        return self.empty(tuple(value.shape), value.dtype, value.nbytes).copy_(value)


class SharedBatch(dict[str, torch.Tensor]):
    """Tensors of a batch by key, most of which lie in one block of shared memory. Exists in workers only."""

    __slots__ = ("_block", "_room")

    def __init__(self, tensors: Mapping[str, torch.Tensor], block: SharedBlock, room: int) -> None:
        super().__init__(tensors)
        self._block = block
        self._room = room

    def __copy__(self) -> SharedBatch:
        return SharedBatch(self, self._block, self._room)

    def __reduce__(self) -> tuple[Any, ...]:
        # To a file, or by another pickler than that of PyTorch's queues: by value, as what torch.load trusts.
        return OrderedDict, (list(self.items()),)

    def to_trainer(self) -> tuple[Any, ...]:
        """As :meth:`__reduce__`, for a queue that the process reads which has started this worker."""
        entries = [(key, *(self._place(value) or (value,))) for key, value in self.items()]
        if all(len(entry) == _BY_VALUE for entry in entries):
            return dict, (dict(self),)
        return _received, (self._block.send(self._room), entries)

    def _place(self, value: Any) -> tuple[int, torch.dtype, tuple[int, ...]] | None:
        """Offset in bytes, dtype and shape of a tensor in the block; ``None`` for what has to be sent by itself."""
        if type(value) is not torch.Tensor or value.requires_grad or not value.is_contiguous():
            return None
        offset = value.data_ptr() - self._block.address
        if value.device.type != "cpu" or not 0 <= offset <= self._room - value.nbytes:
            return None
        return offset, value.dtype, tuple(value.shape)


ForkingPickler.register(SharedBatch, SharedBatch.to_trainer)


def _received(ticket: BlockTicket, entries: list[tuple[Any, ...]]) -> dict[str, Any]:
    """In the trainer: the batch, a plain dictionary whose tensors share a block, and each has its own version counter."""
    buffer = attach(ticket)
    return {key: what[0] if len(what) == _BY_VALUE - 1 else _tensor(buffer, *what) for key, *what in entries}


def _tensor(buffer: Any, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype, device="cpu")
    values = torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset)
    return values if len(shape) == 1 else values.view(shape)


def in_worker() -> bool:
    """Whether this process is a worker that sends its batches to the process that started it."""
    return get_worker_info() is not None and multiprocessing.parent_process() is not None


def _own_blocks() -> SharedBlocks:
    global _own  # noqa: PLW0603 - one per process, a forked child's included
    pid = os.getpid()
    if _own[0] != pid:
        _own = (pid, SharedBlocks())
    return _own[1]
