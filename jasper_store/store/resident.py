"""Rows gathered from host or device memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jasper_store.native.gather import Source, SourceGather, source_of
from jasper_store.paging.buffers import BufferPool
from jasper_store.store.rows import as_rows, host_rows, out_of_range, refused, require_in_range
from jasper_store.store.tensors import StoredTensor

if TYPE_CHECKING:
    from jasper_store.formats.base import TensorSpec
    from jasper_store.store.rows import Rows

__all__ = ["SMALL_TAKE", "DeviceTensor", "HostTensor", "ResidentTensor", "empty_rows", "give_back", "pinned_rows"]

# torch can gather these only as the signed type of the same width.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


SMALL_TAKE = 512 << 10
"""Results of at least this many bytes are allocated from a pool."""
_BUFFERS = BufferPool()
_HOST = torch.device("cpu")


def empty_rows(shape: tuple[int, ...], dtype: torch.dtype, nbytes: int) -> torch.Tensor:
    """Uninitialised host memory for a result of a gather; the caller passes its size in bytes, which it knows."""
    if nbytes < SMALL_TAKE:
        return torch.empty(shape, dtype=dtype, device=_HOST)
    return _BUFFERS.empty(shape, dtype)


def give_back() -> None:
    """Return to the system the memory that is kept for results and not in use, as when what it was for is closed."""
    _BUFFERS.clear()


def pinned_rows(shape: tuple[int, ...], dtype: torch.dtype, _nbytes: int) -> torch.Tensor:
    """Uninitialised pinned memory for rows that are copied to a device next; PyTorch caches and reuses it."""
    return torch.empty(shape, dtype=dtype, device=_HOST, pin_memory=True)


class HostTensor(StoredTensor):
    """Rows gathered from a tensor in this process's address space, memory or a map.

    ``source`` is what torch gathers from: ``[n_rows, ...]`` in a dtype that torch can gather. If the rows returned have
    another dtype (unsigned integers wider than a byte, unaligned bytes, narrowed values), ``_restore`` converts them.
    """

    _is_mapped = False

    def __init__(
        self,
        spec: TensorSpec,
        source: torch.Tensor,
        placement: str,
        *,
        dtype: torch.dtype | None = None,
        as_bytes: bool = False,
        read_only: bool = False,
    ) -> None:
        super().__init__(spec, placement, dtype)
        self._as_bytes = as_bytes
        self._read_only = read_only
        self._stored = spec.dtype if as_bytes else source.dtype
        if not spec.shape and not as_bytes:
            source = source.reshape(1)
        signed = None if as_bytes else _SIGNED.get(source.dtype)
        self._source: torch.Tensor | None = source if signed is None else source.view(signed)
        self._copies = as_bytes or read_only or self.dtype != self._stored
        self._plain = not as_bytes and signed is None and self.dtype == source.dtype
        # What the gather kernel reads from; None if it cannot.
        gatherable = source_of(self._source) if self._plain and self._source.ndim else None
        self._kernel = SourceGather(gatherable, mapped=self._is_mapped) if gatherable and gatherable.numbers else None

    def take(self, rows: Rows, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows in any order, repeats allowed, as an owned tensor; see :meth:`StoredTensor.take`."""
        source = self._source
        if source is None:
            raise self._closed_error()
        rows = host_rows(rows, self.name)
        if out is not None:
            self._check_out(out, len(rows))
        return self._gather(source, rows, out)

    def _gather_now(self, source: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        if not self._plain:
            got = self._restore(self._select(source, rows))
            return got if out is None else out.copy_(got)
        kernel, n = self._kernel, rows.shape[0]
        if out is None:
            if kernel is not None and n * kernel.source.row_nbytes < SMALL_TAKE:
                out = kernel.empty(n)
            else:
                out = empty_rows((n, *self.row_shape), self.dtype, n * self.row_nbytes)
        if kernel is None or not out.is_contiguous():
            return self._select(source, rows, out)
        if not kernel.run(rows, n, out):
            raise refused(rows, self.n_rows, self.name)
        return out

    _gather = _gather_now

    def _select(self, source: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        # torch checks every index while it gathers, so a second pass over them is only needed for the message.
        try:
            return torch.index_select(source, 0, rows, out=out)
        except (IndexError, RuntimeError) as exc:
            error = out_of_range(rows, self.n_rows, self.name)
            if error is None:
                raise
            raise error from exc

    def _restore(self, part: torch.Tensor) -> torch.Tensor:
        """The rows to return for a part of ``source``; a view of it if possible."""
        if self._as_bytes:
            part = part.contiguous().view(-1).view(self._stored).view(len(part), *self.row_shape)
        elif part.dtype != self._stored:
            part = part.view(self._stored)
        return part.to(self.dtype)

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        return self._part(start, stop)

    def _part(self, start: int, stop: int) -> torch.Tensor:
        source = self._source
        if source is None:
            raise self._closed_error()
        part = source[start:stop]
        if self._as_bytes or (self._read_only and self.dtype == self._stored):
            part = part.clone()
        return self._restore(part)

    def tensor(self) -> torch.Tensor:
        """The whole tensor; a view, except for the cases named in :mod:`jasper_store.store.tensors`.

        Raises:
            InsufficientMemoryError: it is a copy, which would not fit.
        """
        if self._copies:
            self._require_room()
        whole = self._rows(0, self.n_rows)
        return whole if self.shape else whole.reshape(())

    def _require_open(self) -> None:
        if self._source is None:
            raise self._closed_error()

    def close(self) -> None:
        """Release the data; existing views stay valid and keep it in memory as long as they live."""
        self._source = self._kernel = None


class ResidentTensor(HostTensor):
    """All rows in host memory. Forked processes share it; a spawned process maps the file instead.

    Args:
        spec: what the file's header says.
        values: the values, of the spec's shape, in the dtype of the rows returned.
    """

    def __init__(self, spec: TensorSpec, values: torch.Tensor) -> None:
        super().__init__(spec, values, "ram", dtype=values.dtype)

    @property
    def in_memory(self) -> Source | None:
        """The source for a gather from several tensors in one kernel call; ``None`` if the kernel cannot read it."""
        return None if self._kernel is None else self._kernel.source


class DeviceTensor(HostTensor):
    """All rows on a CUDA device; gathers run there.

    Row numbers from the host are checked on the host first: an index error inside a CUDA kernel would destroy the
    process's CUDA context. Row numbers that are on the device already are not checked, so that a batch waits for
    nothing: the code that computes them is responsible for their range.
    """

    def __init__(self, spec: TensorSpec, values: torch.Tensor) -> None:
        super().__init__(spec, values, str(values.device), dtype=values.dtype)
        self._device = values.device

    @property
    def device(self) -> torch.device:
        """The device."""
        return self._device

    def take(self, rows: Rows, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows in any order, repeats allowed, on the device; see :meth:`StoredTensor.take`."""
        source = self._source
        if source is None:
            raise self._closed_error()
        if not isinstance(rows, torch.Tensor) or rows.dtype is not torch.int64 or rows.ndim != 1:
            rows = as_rows(rows, self.name)
        if not rows.is_cuda:
            require_in_range(rows, self.n_rows, self.name)
        if rows.device != self._device:
            rows = rows.to(self._device, non_blocking=True)
        if out is not None:
            self._check_out(out, len(rows))
        return self._gather(source, rows, out)

    def _gather(self, source: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        # As on the host, without the message for an index error, which would have to wait for the device.
        if not self._plain:
            got = self._restore(torch.index_select(source, 0, rows))
            return got if out is None else out.copy_(got)
        return torch.index_select(source, 0, rows) if out is None else torch.index_select(source, 0, rows, out=out)
