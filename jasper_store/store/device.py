"""Preloading onto a CUDA device, from the file through a ring of pinned buffers; reading and copying overlap.

The host never holds a full copy: parallel reads fill one buffer of the ring while the device's copy engine transfers
the one before. Conversion to another dtype happens on the device, where it is free.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Protocol

import torch

from jasper_store.errors import InsufficientMemoryError
from jasper_store.formats.base import Chunked, Extent, Parts
from jasper_store.formats.parts import parts_of
from jasper_store.memory.budget import format_bytes
from jasper_store.paging.reader import RangeReader
from jasper_store.store.load import load
from jasper_store.store.tensors import block_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jasper_store.formats.base import TensorSpec

__all__ = ["BUFFERS", "BUFFER_NBYTES", "CopyStream", "CudaCopyStream", "DevicePreloader"]

BUFFER_NBYTES = 32 << 20
"""Bytes of a buffer of the ring."""
BUFFERS = 3
"""Buffers in the ring."""


class CopyStream(Protocol):
    """Copies host buffers to the device. Copies finish in the order in which they were started.

    Attributes:
        pinned: whether the host buffers have to be pinned.
    """

    pinned: bool

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Any:
        """Start copying (and converting, if the dtypes differ); returns a handle to wait for."""

    def wait(self, handle: Any) -> None:
        """Return once the copy of this handle has read all of its source."""

    def finish(self) -> None:
        """Return once every copy is done and every target can be used."""


class DirectCopyStream:
    """Copies synchronously: for devices that share the host's memory, and for tests."""

    pinned = False

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Any:
        """Copy now."""
        target.copy_(source)

    def wait(self, handle: Any) -> None:
        """Every copy is done."""

    def finish(self) -> None:
        """Every copy is done."""


class CudaCopyStream:
    """Copies on a separate CUDA stream, concurrently with the caller's stream."""

    pinned = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event:
        """Queue the copy; the device converts to another dtype after the transfer."""
        # The allocator may have reused memory that work queued on the caller's stream still accesses.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            if source.dtype == target.dtype:
                target.copy_(source, non_blocking=True)
            else:
                target.copy_(source.to(self._device, non_blocking=True))
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return event

    def wait(self, handle: torch.cuda.Event) -> None:
        """Wait for one copy."""
        handle.synchronize()

    def finish(self) -> None:
        """Wait for all copies."""
        self._stream.synchronize()


class DevicePreloader:
    """Loads tensors onto one device through one ring of host buffers. Not for concurrent use.

    Args:
        device: the device.
        copies: copies buffers to it; by default on a CUDA stream for a CUDA device, else synchronously.
        buffers: number of buffers in the ring.
        buffer_nbytes: bytes of each.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        copies: CopyStream | None = None,
        buffers: int = BUFFERS,
        buffer_nbytes: int = BUFFER_NBYTES,
    ) -> None:
        self.device = device
        self._copies: CopyStream = copies or (CudaCopyStream(device) if device.type == "cuda" else DirectCopyStream())
        self._nbytes = buffer_nbytes
        self._ring: list[torch.Tensor | None] = [None] * buffers
        self._handles: list[Any] = [None] * buffers
        self._next = 0

    def load(
        self,
        spec: TensorSpec,
        dtype: torch.dtype,
        *,
        out: torch.Tensor | None = None,
        drop_behind: bool = False,
        on_bytes: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """A tensor's values on the device, in C order and ``dtype``, ready for use on any stream.

        Arguments and errors are those of :func:`jasper_store.store.load.load`.

        Raises:
            InsufficientMemoryError: the device refused memory that was free when the plan was made.
        """
        try:
            if out is None:
                out = torch.empty(spec.shape, dtype=dtype, device=self.device)
            if isinstance(spec.location, Chunked):
                self._run(self._unpacked(spec, on_bytes), out.view(-1))
            elif isinstance(spec.location, Parts) or (isinstance(spec.location, Extent) and spec.contiguous):
                pieces = (self._read(part, drop_behind=drop_behind, on_bytes=on_bytes) for part in parts_of(spec))
                self._run(itertools.chain.from_iterable(pieces), out.view(-1))
            else:
                # Small or rare: values stored in a header, and data that is stored in another order.
                out.copy_(load(spec, dtype, drop_behind=drop_behind, on_bytes=on_bytes))
            self._copies.finish()
        except torch.cuda.OutOfMemoryError as exc:
            needed = math.prod(spec.shape) * dtype.itemsize
            msg = (
                f"{spec.name}: {self.device} refused {format_bytes(needed)} that the plan had counted on; another process "
                "took the memory meanwhile. Free it, or use device=None"
            )
            raise InsufficientMemoryError(msg, path=spec.path, tensor=spec.name, needed=needed) from exc
        return out

    def _run(self, filled: Iterator[tuple[int, torch.Tensor]], flat: torch.Tensor) -> None:
        """Copy each filled piece (number of its buffer, values) to its place in the result; pieces come in order."""
        start = 0
        for number, piece in filled:
            self._handles[number] = self._copies.copy(piece, flat[start : start + piece.numel()])
            start += piece.numel()

    def _buffer(self, nbytes: int) -> tuple[int, torch.Tensor]:
        """The next buffer of the ring, after its last copy is done."""
        number = self._next
        self._next = (number + 1) % len(self._ring)
        handle, self._handles[number] = self._handles[number], None
        if handle is not None:
            self._copies.wait(handle)
        buffer = self._ring[number]
        if buffer is None or buffer.numel() < nbytes:
            buffer = torch.empty(max(nbytes, 1), dtype=torch.uint8, device="cpu", pin_memory=self._copies.pinned)
            self._ring[number] = buffer
        return number, buffer[:nbytes]

    def _read(
        self, spec: TensorSpec, *, drop_behind: bool, on_bytes: Callable[[int], None] | None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Pieces of an extent; several threads read each into a buffer."""
        assert isinstance(spec.location, Extent)
        step = max(1, self._nbytes // spec.dtype.itemsize) * spec.dtype.itemsize
        with RangeReader(spec.path, spec.location.offset, spec.nbytes, drop_behind=drop_behind) as reader:
            for start in range(0, spec.nbytes, step):
                number, buffer = self._buffer(min(step, spec.nbytes - start))
                reader.read(start, buffer, on_bytes)
                yield number, buffer.view(spec.dtype)

    def _unpacked(self, spec: TensorSpec, on_bytes: Callable[[int], None] | None) -> Iterator[tuple[int, torch.Tensor]]:
        """Pieces of a chunked dataset; each is decompressed into a buffer."""
        from jasper_store.formats.hdf5.chunks import ChunkedReader

        reader = ChunkedReader(spec)
        step = block_rows(spec)
        try:
            for start in range(0, spec.n_rows if spec.nbytes else 0, step):
                stop = min(start + step, spec.n_rows)
                number, buffer = self._buffer((stop - start) * spec.row_nbytes)
                rows = buffer.view(spec.dtype).view(stop - start, *spec.shape[1:])
                reader.read_block(start, stop, rows)
                if on_bytes is not None:
                    on_bytes(buffer.numel())
                yield number, rows.view(-1)
        finally:
            reader.close()
