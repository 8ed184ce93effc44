"""Files written by the versions of the past stay readable: see make_golden.py."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from jasper_store.formats.base import Inline, Schema
from jasper_store.formats.registry import format_for
from tests.formats.conformance import read, same
from tests.formats.make_golden import COUNTS, MATRIX, ROWS

GOLDEN = Path(__file__).parent / "golden"

TWO = {"matrix": MATRIX, "counts": COUNTS}
OURS = {"matrix": MATRIX.bfloat16(), "counts": COUNTS, "flag": torch.tensor([True, False])}
OTHERS = {"matrix": MATRIX, "gzip": MATRIX, "shuffled": MATRIX, "ids": ROWS, "variable": ROWS}
# A single tensor is named by its file.
EXPECTED: dict[str, Any] = {
    "ours-float32.safetensors": MATRIX,
    "ours-bfloat16.safetensors": MATRIX.bfloat16(),
    "ours-float32.npy": MATRIX,
    "ours-bfloat16.npy": MATRIX.bfloat16(),
    "ours-float32.pt": MATRIX,
    "ours-bfloat16.pt": MATRIX.bfloat16(),
    "ours-None.h5": OURS,
    "ours-gzip.h5": OURS,
    "ours-lzf.h5": OURS,
    "two.safetensors": TWO,
    "fortran.npy": MATRIX,
    "version-1.npy": MATRIX,
    "version-2.npy": MATRIX,
    "version-3.npy": MATRIX,
    "tensor.pt": MATRIX,
    "view.pt": MATRIX.t(),
    "parameter.pt": MATRIX,
    "dict.pt": TWO,
    "rows.pt": ROWS,
    "rows-of-tensors.pt": ROWS,
    "h5py-earliest.h5": OTHERS,
    "h5py-latest.h5": OTHERS,
}


def test_every_golden_file_is_read():
    assert {path.name for path in GOLDEN.iterdir()} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_golden(name):
    if name == "h5py-latest.h5" and h5py.version.hdf5_version_tuple < (2, 0):
        pytest.skip("written with the newest layout of HDF5 2.0, which this HDF5 cannot read")
    path = GOLDEN / name
    fmt = format_for(path)
    assert fmt is not None
    found = {spec.name: spec for spec in fmt.locate(path, Schema())}
    expected = EXPECTED[name]
    if not isinstance(expected, dict):
        expected = {path.stem: expected}
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert same(read(found.pop(key)).contiguous(), value.contiguous())
            continue
        flat, offsets = found.pop(f"{key}.values").location, found.pop(f"{key}.offsets").location
        assert isinstance(flat, Inline)
        assert isinstance(offsets, Inline)
        bounds = offsets.values.tolist()
        assert [flat.values[a:b].tolist() for a, b in itertools.pairwise(bounds)] == value
    assert not found
