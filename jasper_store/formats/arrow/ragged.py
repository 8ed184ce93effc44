"""Columns of lists of different lengths: their items are mapped where they lie, and where each row begins is computed.

Arrow keeps where each list begins as int32, and from 0 on in each record batch. A ragged tensor has int64 offsets over all
rows, so these are made when the file is opened, 8 bytes of memory for each row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch

from jasper_store.formats.arrow.columns import buffer_of, check_node, further_buffers
from jasper_store.formats.arrow.flatbuffer import FlatbufferError
from jasper_store.formats.arrow.messages import batches_of
from jasper_store.formats.base import Extent, Inline, Parts, TensorSpec
from jasper_store.formats.files import check_shape, read_at

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from jasper_store.formats.arrow.messages import Batch, Messages
    from jasper_store.formats.arrow.schema import Column

__all__ = ["ragged_of", "why_not_ragged"]


def why_not_ragged(column: Column) -> str:
    """Why a column of lists of different lengths is no ragged tensor, in words; ``""`` if it is one."""
    if len(column.levels) > 1:
        return "lists of lists"
    if column.dtype is torch.uint8:
        return "lists of uint8, which a ragged tensor takes for strings (cast it to int16 to have it)"
    return ""


def ragged_of(
    path: Path, file: BinaryIO, size: int, messages: Messages, column: Column
) -> tuple[list[TensorSpec], str]:
    """The two tensors of a column of lists: its items, which lie in the file, and its offsets, in memory.

    Args:
        path: the file.
        file: the same, open.
        size: its bytes.
        messages: its schema, and where its record batches are.
        column: one for which :func:`why_not_ragged` has nothing to say.

    Returns:
        The tensors; or none, and why the column is skipped.

    Raises:
        FlatbufferError: the file is damaged.
    """
    assert column.dtype is not None
    lengths: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
    places: list[int] = []
    counts: list[int] = []
    readable = size  # offsets of a sound file have room in it; hostile ones lie over each other
    for batch in batches_of(file, size, messages):
        if not batch.length:
            continue
        if batch.compressed:
            return [], "lists of different lengths, in record batches some of which are compressed"
        readable -= (batch.length + 1) * column.levels[0].width
        if readable < 0:
            raise FlatbufferError("its columns lie over each other")
        offsets = _offsets_of(file, column, batch)
        nulls = check_node(column, batch, column.node, batch.length, exact=True)
        nulls += check_node(column, batch, column.node + 1, int(offsets[-1]))
        if nulls:
            return [], "lists of different lengths with nulls (fill them, and write the table again)"
        place, nbytes = buffer_of(batch, _first_buffer(column, batch) + 3)
        if int(offsets[-1]) > nbytes // column.dtype.itemsize:
            raise FlatbufferError(
                f"column {column.name!r:.100} needs {int(offsets[-1])} items, in a buffer of {nbytes} bytes"
            )
        lengths.append(np.diff(offsets))
        if count := int(offsets[-1] - offsets[0]):
            places.append(place + int(offsets[0]) * column.dtype.itemsize)
            counts.append(count)
    found = np.cumsum(np.concatenate(lengths))
    shape, _ = check_shape((int(found[-1]),), column.dtype.itemsize, path=path, tensor=column.name)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(counts, np.int64))])
    location: Extent | Parts = Extent(path, places[0] if places else 0)
    if len(places) > 1:
        location = Parts((path,), np.zeros(len(places), np.int64), np.array(places, np.int64), starts)
    return [
        TensorSpec(f"{column.name}.values", column.dtype, shape, location),
        TensorSpec(f"{column.name}.offsets", torch.int64, found.shape, Inline(path, torch.from_numpy(found))),
    ], ""


def _first_buffer(column: Column, batch: Batch) -> int:
    return column.buffer + further_buffers(batch, column.views)[column.views]


def _offsets_of(file: BinaryIO, column: Column, batch: Batch) -> NDArray[np.int64]:
    """Where the lists of a record batch begin, and where the last one ends, int64 [rows + 1], ascending from 0 or more."""
    width = column.levels[0].width
    at, nbytes = buffer_of(batch, _first_buffer(column, batch) + 1)
    wanted = (batch.length + 1) * width
    if wanted > nbytes:
        raise FlatbufferError(f"column {column.name!r:.100} needs {wanted} bytes of offsets, in a buffer of {nbytes}")
    raw = read_at(file, at, wanted)
    if len(raw) < wanted:
        raise FlatbufferError("its file was cut while it was read")
    offsets = np.frombuffer(raw, f"<i{width}").astype(np.int64)
    if offsets[0] < 0 or (offsets[1:] < offsets[:-1]).any():
        raise FlatbufferError(f"column {column.name!r:.100} has lists that end before they begin")
    return offsets
