from __future__ import annotations

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from jasper_store.errors import IncompatibleOptionsError
from jasper_store.formats.base import Schema
from tests.formats.conformance import FormatSuite, read, same, values


class TestSafetensors(FormatSuite):
    name = "safetensors"

    def peer(self, path, name, dtype):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            lazily = file.get_tensor(name)
        return [safetensors.torch.load_file(path)[name], lazily]

    def test_files_of_others(self, tmp_path):
        path = tmp_path / "model.safetensors"
        tensors = {"a": values(torch.float32, (3, 2)), "b/../c": values(torch.uint16, (5,)), "e": torch.empty(0, 3)}
        safetensors.torch.save_file(tensors, path, metadata={"by": "someone"})
        found = {spec.name: read(spec) for spec in self.format.locate(path, Schema())}
        assert found.keys() == tensors.keys()
        assert all(same(found[name], tensors[name]) for name in tensors)

    def test_a_single_tensor_is_named_by_its_file(self, tmp_path):
        path = tmp_path / "source_embs.SAFETENSORS"
        safetensors.torch.save_file({"data": torch.ones(3)}, path)
        assert [spec.name for spec in self.format.locate(path, Schema())] == ["source_embs"]

    def test_one_tensor_a_file(self, tmp_path):
        writer = self.format.writer(self.path(tmp_path), Schema())
        writer.begin("x", torch.float32, (3,), 0)
        writer.end()
        with pytest.raises(IncompatibleOptionsError, match="one tensor a file"):
            writer.begin("y", torch.float32, (3,), 0)
        writer.abort()

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint32])
    def test_rarer_dtypes(self, tmp_path, dtype):
        tensor = values(dtype, (7, 3))
        (spec,) = self.format.locate(self.written(tmp_path, tensor), Schema())
        assert same(read(spec), tensor)
