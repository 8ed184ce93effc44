"""Values read from where a spec says they lie, with numpy alone: the oracle of formats that are only read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jasper_store.formats.base import Extent, Parts
from jasper_store.formats.files import dtype_name

if TYPE_CHECKING:
    from jasper_store.formats.base import TensorSpec


def in_place(spec: TensorSpec) -> np.ndarray:
    """The values of an extent in C order, or of parts."""
    place = spec.location
    dtype = np.dtype(dtype_name(spec.dtype))
    if isinstance(place, Extent):
        assert place.strides is None
        runs = [(place.path, place.offset, spec.n_rows)]
    else:
        assert isinstance(place, Parts)
        rows = np.diff(place.starts)
        assert (rows > 0).all()
        assert place.starts[0] == 0
        assert place.starts[-1] == spec.n_rows
        runs = [
            (place.files[number], int(offset), int(n))
            for number, offset, n in zip(place.file_of, place.offsets, rows, strict=True)
        ]
    blocks = []
    for path, offset, n in runs:
        if n * spec.row_nbytes:
            assert 0 <= offset <= path.stat().st_size - n * spec.row_nbytes
            blocks.append(np.memmap(path, np.uint8, "r", offset, (n * spec.row_nbytes,)))
    raw = np.concatenate(blocks) if blocks else np.empty(0, np.uint8)
    return raw.view(dtype).reshape(spec.shape)
