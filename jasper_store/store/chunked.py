"""Rows read and decompressed chunk by chunk, for files that cannot be mapped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jasper_store.store.rows import as_rows, require_in_range
from jasper_store.store.tensors import StoredTensor

if TYPE_CHECKING:
    from jasper_store.formats.base import TensorSpec
    from jasper_store.formats.hdf5.chunks import ChunkedReader
    from jasper_store.store.rows import Rows

__all__ = ["ChunkedTensor"]


class ChunkedTensor(StoredTensor):
    """Rows of a chunked or compressed HDF5 dataset; a call reads and decompresses each chunk that it needs once.

    File handles are opened on first use, in each process separately.
    """

    def __init__(self, spec: TensorSpec, reader: ChunkedReader, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(spec, "chunked", dtype)
        self._reader: ChunkedReader | None = reader

    def take(self, rows: Rows, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows in any order, repeats allowed, as an owned tensor; see :meth:`StoredTensor.take`."""
        reader = self._open_reader()
        rows = as_rows(rows, self.name).cpu()
        require_in_range(rows, self.n_rows, self.name)
        if out is not None:
            self._check_out(out, len(rows))
        if out is not None and self.dtype == self.spec.dtype and out.is_contiguous() and out.numel() > 1:
            reader.read_rows(rows, out)
            return out
        got = torch.empty((len(rows), *self.row_shape), dtype=self.spec.dtype, device="cpu")
        reader.read_rows(rows, got)
        return got.to(self.dtype) if out is None else out.copy_(got)

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        reader = self._open_reader()
        got = torch.empty((stop - start, *self.row_shape), dtype=self.spec.dtype, device="cpu")
        if got.numel():
            reader.read_block(start, stop, got)
        return got.to(self.dtype)

    def tensor(self) -> torch.Tensor:
        """The whole tensor, read and decompressed into new memory.

        Raises:
            InsufficientMemoryError: it would not fit.
        """
        self._require_room()
        whole = self._rows(0, self.n_rows)
        return whole if self.shape else whole.reshape(())

    def _open_reader(self) -> ChunkedReader:
        if self._reader is None:
            raise self._closed_error()
        return self._reader

    def _require_open(self) -> None:
        self._open_reader()

    def close(self) -> None:
        """Close the file handles."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
