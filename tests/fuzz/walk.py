"""Reads what a parser found as a consumer does: shapes, rows, whole tensors, strings."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import torch

from jasper_store.formats.base import Chunked, Extent, Inline, Parts, Schema, Streamed
from jasper_store.formats.registry import skipped_in
from jasper_store.formats.texts import SupportsTexts
from jasper_store.paging.mapping import FileMap
from jasper_store.store.load import load
from jasper_store.store.mapped import MappedTensor, why_not_mappable
from jasper_store.store.parted import PartedTensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jasper_store.formats.base import TensorSpec
    from jasper_store.formats.protocols import ReadFormat

__all__ = ["walk_file", "walk_specs"]

# Larger tensors are read by rows alone: to fill a claimed shape with what was deflated costs patience, and proves nothing.
_WHOLE_NBYTES = 1 << 22
_TENSORS = 16
"""Tensors of a file that are read; the others are only looked at."""


def walk_file(fmt: ReadFormat, path: Path) -> None:
    """Locate the tensors of one file, and read them and what was skipped.

    Raises:
        JasperStoreError: the file is refused.
    """
    specs = fmt.locate(path, Schema())
    assert all(skip.reason for skip in skipped_in(fmt, path, Schema()))
    walk_specs(specs, {path: path.stat().st_size})
    for texts in fmt.texts(path, Schema()) if isinstance(fmt, SupportsTexts) else ():
        assert sum(len(lengths) for _, lengths in texts.blocks()) == texts.rows


def walk_specs(specs: Sequence[TensorSpec], sizes: dict[Path, int]) -> None:
    """Check that tensors lie in their files, whose sizes are given, and read rows of them, and small ones whole."""
    assert len({spec.name for spec in specs}) == len(specs)
    for spec in specs:
        assert math.prod(spec.shape) * spec.dtype.itemsize == spec.nbytes < 1 << 63
        _check_place(spec, sizes)
    for spec in specs[:_TENSORS]:
        _read(spec)


def _check_place(spec: TensorSpec, sizes: dict[Path, int]) -> None:
    place = spec.location
    if isinstance(place, Extent) and spec.nbytes:
        steps = place.strides or torch.empty(spec.shape, device="meta").stride()
        last = sum((n - 1) * step for n, step in zip(spec.shape, steps, strict=True))
        assert min(steps, default=0) >= 0
        assert 0 <= place.offset <= place.offset + (last + 1) * spec.dtype.itemsize <= sizes[place.path]
    elif isinstance(place, Parts):
        assert len(place.starts) == len(place.offsets) + 1 == len(place.file_of) + 1
        assert int(place.starts[-1]) == spec.n_rows
        for number, (file, offset) in enumerate(zip(place.file_of.tolist(), place.offsets.tolist(), strict=True)):
            rows = int(place.starts[number + 1] - place.starts[number])
            assert rows > 0
            assert 0 <= offset <= offset + rows * spec.row_nbytes <= sizes[place.files[file]]


def _read(spec: TensorSpec) -> None:
    place = spec.location
    if spec.nbytes <= _WHOLE_NBYTES or isinstance(place, Inline):
        assert tuple(load(spec, spec.dtype).shape) == spec.shape
    if not spec.shape or not spec.n_rows or 2 * spec.row_nbytes > _WHOLE_NBYTES or isinstance(place, Streamed | Inline):
        return
    rows = torch.tensor([0, spec.n_rows - 1])
    if isinstance(place, Chunked):
        from jasper_store.formats.hdf5.chunks import ChunkedReader

        with contextlib.closing(ChunkedReader(spec)) as reader:
            reader.read_rows(rows, torch.empty((2, *spec.shape[1:]), dtype=spec.dtype))
    elif isinstance(place, Parts):
        with contextlib.closing(PartedTensor(spec)) as parted:
            assert tuple(parted.take(rows).shape) == (2, *spec.shape[1:])
    elif isinstance(place, Extent) and not why_not_mappable(spec):
        with FileMap(place.path) as fmap, contextlib.closing(MappedTensor(spec, fmap)) as mapped:
            assert tuple(mapped.take(rows).shape) == (2, *spec.shape[1:])
