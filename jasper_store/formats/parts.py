"""One tensor out of several: the parts that files hold, joined row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from jasper_store.errors import CorruptFileError
from jasper_store.formats.base import Extent, Inline, Parts, Streamed, TensorSpec
from jasper_store.formats.file_list import FileList, texts_of
from jasper_store.formats.files import dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["join", "parts_of"]


def join(name: str, specs: Sequence[TensorSpec]) -> TensorSpec:
    """The tensor that has the rows of all these tensors, one after another.

    Args:
        name: name of the whole.
        specs: at least one; each an extent, or parts already.

    Returns:
        Of offsets that are in memory, such as those of ragged Arrow columns, the offsets of all rows, in memory. Else a
        spec whose location is :class:`~jasper_store.formats.base.Parts`, or an ``Extent`` if only one has rows; of
        streams, a stream of all files.

    Raises:
        CorruptFileError: a part has another dtype or row shape than the first, is a scalar, or its rows are no runs of
            bytes in its file (compressed, in Fortran order, a list); the message names its file.
    """
    first = specs[0]
    if len(specs) > 1 and all(_is_inline_offsets(spec) for spec in specs):
        return _joined_offsets(name, specs)
    for spec in specs:
        _check(name, first, spec)
    rows = sum(spec.n_rows for spec in specs)
    shape = (rows, *first.shape[1:])
    filled = [spec for spec in specs if spec.n_rows] or [first]
    if isinstance(first.location, Streamed):
        return TensorSpec(name, first.dtype, shape, _streams(filled))
    if len(filled) == 1:
        return TensorSpec(name, first.dtype, shape, filled[0].location)
    numbers: dict[str, int] = {}
    file_of: list[np.ndarray] = []
    offsets: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    for spec in filled:
        place = spec.location
        if isinstance(place, Parts):
            own = np.array([numbers.setdefault(text, len(numbers)) for text in texts_of(place.files)], np.int64)
            file_of.append(own[place.file_of])
            offsets.append(place.offsets)
            counts.append(np.diff(place.starts))
        else:
            assert isinstance(place, Extent)
            file_of.append(np.array([numbers.setdefault(str(place.path), len(numbers))], np.int64))
            offsets.append(np.array([place.offset], np.int64))
            counts.append(np.array([spec.n_rows], np.int64))
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(counts))])
    return TensorSpec(
        name, first.dtype, shape, Parts(FileList(numbers), np.concatenate(file_of), np.concatenate(offsets), starts)
    )


def parts_of(spec: TensorSpec) -> Iterator[TensorSpec]:
    """Each part of a tensor as a separate tensor, made one at a time; a tensor in one place is its only part."""
    place = spec.location
    if not isinstance(place, Parts):
        yield spec
        return
    for number, (file, offset) in enumerate(zip(place.file_of, place.offsets, strict=True)):
        rows = int(place.starts[number + 1] - place.starts[number])
        yield TensorSpec(spec.name, spec.dtype, (rows, *spec.shape[1:]), Extent(place.files[file], int(offset)))


def _is_inline_offsets(spec: TensorSpec) -> bool:
    place = spec.location
    return isinstance(place, Inline) and spec.name.endswith(".offsets") and spec.shape == (len(place.values),) != (0,)


def _joined_offsets(name: str, specs: Sequence[TensorSpec]) -> TensorSpec:
    """Offsets of ragged rows in several files, of which each begins anew, as those of all rows."""
    ends = [0]
    pieces = [torch.zeros(1, dtype=torch.int64)]
    for spec in specs:
        assert isinstance(spec.location, Inline)
        pieces.append(spec.location.values[1:] + ends[-1])
        ends.append(ends[-1] + int(spec.location.values[-1]))
    values = torch.cat(pieces)
    return TensorSpec(name, values.dtype, tuple(values.shape), Inline(specs[0].path, values))


def _streams(specs: Sequence[TensorSpec]) -> Streamed:
    """One stream after another; ``_check`` has seen that all are streams of one kind."""
    first = specs[0].location
    assert isinstance(first, Streamed)
    return Streamed(tuple(path for spec in specs for path in spec.paths), first.kind, first.key)


def _kind(spec: TensorSpec) -> tuple[str, str] | None:
    place = spec.location
    return (place.kind, place.key) if isinstance(place, Streamed) else None


def _check(name: str, first: TensorSpec, spec: TensorSpec) -> None:
    if not spec.shape:
        found = "a scalar, which has no rows"
    elif (spec.dtype, spec.shape[1:]) != (first.dtype, first.shape[1:]):
        found = f"{dtype_name(spec.dtype)} rows of shape {list(spec.shape[1:])}"
    elif isinstance(first.location, Streamed) and _kind(spec) == _kind(first):
        return
    elif not isinstance(spec.location, Parts) and not spec.contiguous and spec.n_rows:
        found = "rows that are no runs of bytes in the file (compressed, in Fortran order, or a list); convert it"
    else:
        return
    msg = (
        f"{spec.path}: expected a part of {name!r}, {dtype_name(first.dtype)} rows of shape {list(first.shape[1:])} as "
        f"in {first.path.name}, found {found}"
    )
    raise CorruptFileError(msg, path=spec.path, tensor=name)
