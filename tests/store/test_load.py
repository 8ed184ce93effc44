import pytest
import torch

from jasper_store.errors import DatasetNotFoundError
from jasper_store.formats.base import Schema
from jasper_store.formats.registry import locate
from jasper_store.store.load import load, progress_nbytes
from tests.store.samples import WRITERS, tensors


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_values_dtypes_and_progress(tmp_path, kind):
    WRITERS[kind](tmp_path, tensors())
    for spec in locate(tmp_path, "auto", Schema()).specs:
        expected = tensors()[spec.name]
        counted: list[int] = []
        got = load(spec, spec.dtype, on_bytes=counted.append, drop_behind=True)
        assert got.is_contiguous()
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
        assert sum(counted) == progress_nbytes(spec)
        if expected.is_floating_point():
            assert torch.equal(load(spec, torch.bfloat16), expected.bfloat16())
        out = torch.empty(expected.shape, dtype=expected.dtype)
        assert load(spec, spec.dtype, out=out) is out
        assert torch.equal(out, expected)


def test_a_file_that_vanished(tmp_path):
    WRITERS["npy"](tmp_path, tensors())
    specs = locate(tmp_path, "auto", Schema()).specs
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(DatasetNotFoundError):
        load(specs[0], specs[0].dtype)
