from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from jasper_store.errors import CorruptFileError, IncompatibleOptionsError
from jasper_store.formats.base import Extent, Schema
from jasper_store.formats.registry import skipped_in
from tests.formats.conformance import FormatSuite, read, same, values


class TestNpy(FormatSuite):
    name = "npy"

    def peer(self, path, name, dtype):
        arrays = [np.load(path)]
        if arrays[0].size:  # numpy before 2.0 cannot map what is empty
            arrays.append(np.array(np.load(path, mmap_mode="r")))
        if dtype == torch.bfloat16:
            arrays = [array["bfloat16"] for array in arrays]
        # numpy.asarray, because a structured scalar's field is no array any more.
        read = [torch.from_numpy(np.asarray(array).copy()) for array in arrays]
        return [tensor.view(torch.bfloat16) for tensor in read] if dtype == torch.bfloat16 else read

    @pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
    def test_every_version(self, tmp_path, version):
        with (tmp_path / "x.npy").open("wb") as file:
            np.lib.format.write_array(file, np.arange(6).reshape(2, 3), version=version)
        (spec,) = self.format.locate(tmp_path / "x.npy", Schema())
        assert same(read(spec), torch.arange(6).reshape(2, 3))

    def test_fortran_order_becomes_strides(self, tmp_path):
        array = np.asfortranarray(np.arange(24).reshape(2, 3, 4))
        np.save(tmp_path / "x.npy", array)
        (spec,) = self.format.locate(tmp_path / "x.npy", Schema())
        assert isinstance(spec.location, Extent)
        assert spec.location.strides == (1, 2, 6)
        assert not spec.contiguous
        assert same(read(spec), torch.from_numpy(array).contiguous())

    def test_bfloat16_of_ml_dtypes(self, tmp_path):
        # What numpy.save writes for an array of ml_dtypes.bfloat16.
        bits = values(torch.bfloat16, (4, 2))
        np.save(tmp_path / "x.npy", bits.view(torch.uint16).numpy().view("V2"))
        (spec,) = self.format.locate(tmp_path / "x.npy", Schema())
        assert same(read(spec), bits)

    @pytest.mark.parametrize(
        ("array", "why"),
        [
            (np.arange(3, dtype=">i4"), "big-endian.*newbyteorder"),
            (np.array([(1, 2.0)], dtype=[("a", "<i4"), ("b", "<f4")]), "structured"),
            (np.array([1], dtype="datetime64[s]"), "no torch equal"),
            (np.zeros(2, dtype=np.longdouble), "no torch equal"),
        ],
    )
    def test_what_is_no_tensor(self, tmp_path, array, why):
        np.save(tmp_path / "x.npy", array, allow_pickle=True)
        with pytest.raises(CorruptFileError, match=why):
            self.format.locate(tmp_path / "x.npy", Schema())

    @pytest.mark.parametrize(
        ("array", "why"),
        [
            (np.array([{}, None], dtype=object), "pickled Python objects"),
            (np.array(["a", "bc"]), r"strings \(<U2, shape \[2\]\)"),
            (np.array([[b"a"]]), r"strings \(\|S1, shape \[1, 1\]\)"),
        ],
    )
    def test_what_is_skipped(self, tmp_path, array, why):
        path = tmp_path / "x.npy"
        np.save(path, array, allow_pickle=True)
        assert self.format.locate(path, Schema()) == []
        (skip,) = skipped_in(self.format, path, Schema())
        assert (skip.name, skip.path) == ("x", path)
        assert re.search(why, skip.reason)

    def test_nothing_may_follow_the_data(self, tmp_path):
        path = self.written(tmp_path, torch.ones(3))
        with path.open("ab") as file:
            file.write(b"more")
        with pytest.raises(CorruptFileError, match="appended"):
            self.format.locate(path, Schema())

    def test_float8_needs_another_format(self, tmp_path):
        writer = self.format.writer(self.path(tmp_path), Schema())
        with pytest.raises(IncompatibleOptionsError, match="safetensors"):
            writer.begin("x", torch.float8_e5m2, (3,), 4)
        writer.abort()
