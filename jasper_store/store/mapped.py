"""Rows read through a private map of their file, wherever the format put them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from jasper_store.errors import CorruptFileError
from jasper_store.formats.base import Extent, contiguous_strides
from jasper_store.memory.mapping import mappable, view
from jasper_store.store.tensors import HostTensor, span_nbytes

if TYPE_CHECKING:
    from jasper_store.formats.base import TensorSpec
    from jasper_store.memory.mapping import FileMap

__all__ = ["MappedTensor", "rows_are_runs", "why_not_mappable"]


def rows_are_runs(spec: TensorSpec) -> bool:
    """Whether each row is one run of bytes in the file, so that reading it touches as few pages as it can."""
    if not isinstance(spec.location, Extent):
        return False
    strides, shape = spec.location.strides, spec.shape
    if strides is None or not shape or 0 in shape:
        return True
    inner = contiguous_strides(shape[1:])
    return all(s == e for s, e, n in zip(strides[1:], inner, shape[1:], strict=True) if n > 1)


def why_not_mappable(spec: TensorSpec) -> str:
    """Why rows cannot be read through a map; ``""`` if they can."""
    if not isinstance(spec.location, Extent):
        return "it has no single place in its file"
    if sys.byteorder != "little":
        return "this machine is big-endian, and the files are little-endian"
    if not mappable(spec.location.offset, spec.dtype) and not spec.contiguous:
        return "it is neither aligned nor contiguous in its file"
    return ""


class MappedTensor(HostTensor):
    """Rows read through a map of the file; the pages are the kernel's, to keep or to take back.

    Data that lies unaligned in its file is gathered as bytes, and data that is narrowed to another dtype is
    converted after the gather: both cost a pass over the rows taken, and have no views.

    Args:
        spec: what the file's header says; its location is an :class:`~jasper_store.formats.base.Extent`.
        fmap: the map of its file.
        dtype: floating dtype to hand out instead of the stored one.
    """

    def __init__(self, spec: TensorSpec, fmap: FileMap, *, dtype: torch.dtype | None = None) -> None:
        if not isinstance(spec.location, Extent):
            msg = f"{spec.path}: {spec.name} has no single place in its file and cannot be mapped"
            raise CorruptFileError(msg, path=spec.path, tensor=spec.name)
        offset, strides = spec.location.offset, spec.location.strides
        aligned = mappable(offset, spec.dtype) or 0 in spec.shape
        if aligned:
            source = view(fmap, offset, spec.dtype, spec.shape, strides)
        else:
            source = view(fmap, offset, torch.uint8, (spec.n_rows, spec.row_nbytes))
        super().__init__(spec, source, "mmap", dtype=dtype, as_bytes=not aligned, read_only=not fmap.writable)
        self._fmap: FileMap | None = fmap
        self._address = fmap.address + offset
        self._span = span_nbytes(spec)
        stored_row = spec.row_nbytes if strides is None or not spec.shape else strides[0] * spec.dtype.itemsize
        self._row_stride = stored_row
        self._runs = rows_are_runs(spec) and self._span > 0

    def close(self) -> None:
        """Let go of the map; views stay valid and hold it as long as they live."""
        super().close()
        self._fmap = None
