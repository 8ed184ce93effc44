"""What the safetensors library makes of a file is part of the proof, and of what ``verify`` finds."""

from __future__ import annotations

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import jasper_store as js
from jasper_store.conversion.verify import verify_files
from jasper_store.conversion.writer import DirectoryWriter
from jasper_store.errors import ConversionError
from jasper_store.formats import safetensors as module
from jasper_store.formats.protocols import SupportsReference
from jasper_store.formats.registry import FORMATS
from tests.conversion.samples import write_pt

FORMAT = module.SafetensorsFormat()
VIEWS = [
    ({"other": ("F32", (3,))}, "tensor 'other' is F32 [3] to the safetensors library, not there to us"),
    ({"x": ("F32", (3,)), "y": ("I8", (0,))}, "tensor 'y' is I8 [0] to the safetensors library, not there to us"),
    ({}, "tensor 'x' is not there to the safetensors library, F32 [3] to us"),
    ({"x": ("BF16", (3,))}, "tensor 'x' is BF16 [3] to the safetensors library, F32 [3] to us"),
    ({"x": ("F32", (3, 1))}, "tensor 'x' is F32 [3, 1] to the safetensors library, F32 [3] to us"),
    (SafetensorError("no header"), "the safetensors library refuses it: no header"),
]


@pytest.fixture(params=VIEWS, ids=[text for _, text in VIEWS])
def planted(request, monkeypatch):
    """The library sees something else than we do; gives back how that is said."""
    view, text = request.param

    def found(path):
        if isinstance(view, Exception):
            raise view
        return view

    monkeypatch.setattr(module, "_reference_view", found)
    return text


def test_a_difference_ends_a_conversion(tmp_path, planted):
    torch.save(torch.ones(3), tmp_path / "x.pt")
    with pytest.raises(
        ConversionError, match=r"x\.safetensors: expected a file that the safetensors library"
    ) as caught:
        js.convert(tmp_path, tmp_path / "out")
    assert planted in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert js.convert(tmp_path, tmp_path / "npy", "npy").tensors  # other formats have no such library


def test_a_difference_ends_a_writer(tmp_path, planted):
    with (
        pytest.raises(ConversionError, match="Nothing was published") as caught,
        DirectoryWriter(tmp_path / "set") as writer,
    ):
        writer.append("x", torch.ones(3))
    assert planted in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_verify_finds_a_difference(tmp_path, planted):
    save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    found = [finding for finding in verify_files(tmp_path).errors if finding.check == "reference"]
    assert {finding.tensor for finding in found} == {"x.safetensors"}
    assert any(planted in finding.message for finding in found)


def test_both_agree_on_everything_that_is_written(tmp_path):
    js.convert(write_pt(tmp_path / "source"), tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 10
    assert not [text for file in files for text in FORMAT.compare_with_reference(file)]
    report = verify_files(tmp_path / "out")
    assert report.ok
    tensors = {
        "b/../c": torch.ones(2, dtype=torch.float8_e5m2),
        "e": torch.empty(0, 3),
        "s": torch.tensor(1, dtype=torch.uint64),
    }
    save_file(tensors, tmp_path / "several.safetensors")
    assert FORMAT.compare_with_reference(tmp_path / "several.safetensors") == []


def test_the_reference_is_asked_for_one_format_alone():
    assert [name for name, fmt in FORMATS.items() if isinstance(fmt, SupportsReference)] == ["safetensors"]
