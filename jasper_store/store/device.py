"""Loading onto a CUDA device: file, pinned staging ring, device; reading and copying overlap.

No full copy is ever made in host memory: a ring of a few pinned buffers is filled by parallel reads in turn, and
each is copied by the device's own engine while the next is filled. Conversion to another dtype happens on the
device, where it is free.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import torch

from jasper_store.errors import InsufficientMemoryError
from jasper_store.formats.base import Chunked, Extent
from jasper_store.memory.budget import format_bytes
from jasper_store.paging.reader import RangeReader
from jasper_store.store.load import load
from jasper_store.store.tensors import block_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jasper_store.formats.base import TensorSpec

__all__ = ["BUFFERS", "BUFFER_NBYTES", "CopyStream", "CudaCopyStream", "DeviceLoader"]

BUFFER_NBYTES = 32 << 20
BUFFERS = 3


class CopyStream(Protocol):
    """The way from host buffers to the device. Copies finish in the order they were started."""

    pinned: bool

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Any:
        """Start copying (and converting, if the dtypes differ); returns a ticket to wait for."""

    def wait(self, ticket: Any) -> None:
        """Return once the copy of a ticket has read all of its source."""

    def finish(self) -> None:
        """Return once every copy is done and every target may be used."""


class DirectCopyStream:
    """Copies at once, for devices that share the host's memory, and for tests."""

    pinned = False

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Any:
        """Copy now."""
        target.copy_(source)

    def wait(self, ticket: Any) -> None:
        """Nothing is under way."""

    def finish(self) -> None:
        """Nothing is under way."""


class CudaCopyStream:
    """Copies on a stream of its own, beside whatever the caller's stream does."""

    pinned = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event:
        """Queue the copy; a narrower dtype is made from a copy on the device."""
        # The target's memory may have been given back by work that the caller's stream has yet to do.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            if source.dtype == target.dtype:
                target.copy_(source, non_blocking=True)
            else:
                target.copy_(source.to(self._device, non_blocking=True))
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return event

    def wait(self, ticket: torch.cuda.Event) -> None:
        """Wait for one copy."""
        ticket.synchronize()

    def finish(self) -> None:
        """Wait for all copies."""
        self._stream.synchronize()


class DeviceLoader:
    """Loads tensors onto one device through one staging ring. Not for concurrent use.

    Args:
        device: where to.
        lane: how; by default a CUDA stream for a CUDA device, else a plain copy.
        buffers: buffers in the ring.
        buffer_nbytes: bytes of each.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        lane: CopyStream | None = None,
        buffers: int = BUFFERS,
        buffer_nbytes: int = BUFFER_NBYTES,
    ) -> None:
        self.device = device
        self._lane: CopyStream = lane or (CudaCopyStream(device) if device.type == "cuda" else DirectCopyStream())
        self._nbytes = buffer_nbytes
        self._ring: list[torch.Tensor | None] = [None] * buffers
        self._tickets: list[Any] = [None] * buffers
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
        """A tensor's values on the device, C order, in ``dtype``; ready to use on any stream.

        Arguments and errors are those of :func:`jasper_store.store.load.load`.

        Raises:
            InsufficientMemoryError: the device refused the memory, although it was free when the plan was made.
        """
        try:
            if out is None:
                out = torch.empty(spec.shape, dtype=dtype, device=self.device)
            if isinstance(spec.location, Chunked):
                self._run(self._unpacked(spec, on_bytes), out.view(-1))
            elif isinstance(spec.location, Extent) and spec.contiguous:
                self._run(self._read(spec, drop_behind=drop_behind, on_bytes=on_bytes), out.view(-1))
            else:
                # Small or rare: values that came with a header, and data that lies in another order.
                out.copy_(load(spec, dtype, drop_behind=drop_behind, on_bytes=on_bytes))
            self._lane.finish()
        except torch.cuda.OutOfMemoryError as exc:
            needed = math.prod(spec.shape) * dtype.itemsize
            msg = (
                f"{spec.name}: {self.device} refused {format_bytes(needed)} that the plan had counted on; another process "
                "took the memory meanwhile. Free it, or use device=None"
            )
            raise InsufficientMemoryError(msg, path=spec.path, tensor=spec.name, needed=needed) from exc
        return out

    def _run(self, filled: Iterator[tuple[int, torch.Tensor]], flat: torch.Tensor) -> None:
        """Send each filled piece (its buffer's number, its values) to its place; pieces come in order."""
        start = 0
        for number, piece in filled:
            self._tickets[number] = self._lane.copy(piece, flat[start : start + piece.numel()])
            start += piece.numel()

    def _buffer(self, nbytes: int) -> tuple[int, torch.Tensor]:
        """The next buffer of the ring, once the copy that last read from it is done."""
        number = self._next
        self._next = (number + 1) % len(self._ring)
        ticket, self._tickets[number] = self._tickets[number], None
        if ticket is not None:
            self._lane.wait(ticket)
        buffer = self._ring[number]
        if buffer is None or buffer.numel() < nbytes:
            buffer = torch.empty(max(nbytes, 1), dtype=torch.uint8, device="cpu", pin_memory=self._lane.pinned)
            self._ring[number] = buffer
        return number, buffer[:nbytes]

    def _read(
        self, spec: TensorSpec, *, drop_behind: bool, on_bytes: Callable[[int], None] | None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Pieces of an extent, each read into a buffer by several threads."""
        assert isinstance(spec.location, Extent)
        step = max(1, self._nbytes // spec.dtype.itemsize) * spec.dtype.itemsize
        with RangeReader(spec.path, spec.location.offset, spec.nbytes, drop_behind=drop_behind) as reader:
            for start in range(0, spec.nbytes, step):
                number, buffer = self._buffer(min(step, spec.nbytes - start))
                reader.read(start, buffer, on_bytes)
                yield number, buffer.view(spec.dtype)

    def _unpacked(self, spec: TensorSpec, on_bytes: Callable[[int], None] | None) -> Iterator[tuple[int, torch.Tensor]]:
        """Pieces of a chunked dataset, each unpacked into a buffer."""
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
