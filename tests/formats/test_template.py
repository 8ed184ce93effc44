"""The template in CONTRIBUTING.md is a format: it passes the suite of every format, and a dataset trains from it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

import jasper_store as js
from jasper_store.conversion import writer
from jasper_store.errors import CorruptFileError, IncompatibleOptionsError
from jasper_store.formats import registry
from jasper_store.formats.base import Extent, TensorSpec
from jasper_store.formats.files import DATA_START, check_shape, dtype_name, open_for_reading, read_at
from jasper_store.formats.flat import FlatWriter, stem_of
from tests.builders import build_pt_dataset
from tests.formats import conformance

_TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
_IMPORTS = {
    thing.__name__: thing
    for thing in (
        CorruptFileError,
        Extent,
        FlatWriter,
        IncompatibleOptionsError,
        TensorSpec,
        check_shape,
        dtype_name,
        json,
        open_for_reading,
        read_at,
        stem_of,
        torch,
    )
}


def template() -> Any:
    """The class that the template's text makes, with the imports that the text beside it names."""
    (code,) = re.findall(r"```python\n(.*?)```", _TEXT, re.DOTALL)
    found: dict[str, Any] = {**_IMPORTS, "DATA_START": DATA_START}
    exec(compile(code, "CONTRIBUTING.md", "exec"), found)
    return found["RawFormat"]()


def registered() -> Any:
    return MappingProxyType({**registry.FORMATS, "raw": template()})


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    formats = registered()
    for module in (registry, conformance, writer):
        monkeypatch.setattr(module, "FORMATS", formats)
    monkeypatch.setattr(registry, "AUTO_ORDER", (*registry.AUTO_ORDER, "raw"))
    # The suite kills a process of its own, which has to register the format, too.
    prelude = "from tests.formats import conformance, test_template\nconformance.FORMATS = test_template.registered()\n"
    monkeypatch.setattr(conformance, "_KILLED", prelude + conformance._KILLED)


class TestTemplate(conformance.FormatSuite):
    name = "raw"  # type: ignore[assignment]  # FormatName lists the formats that stay

    def peer(self, path: Path, name: str, dtype: torch.dtype) -> list[torch.Tensor]:
        raw = path.read_bytes()
        shape = json.loads(raw[4:4096])["shape"]
        data = bytearray(raw[4096:])
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return [flat.reshape(shape)]


def test_a_dataset_is_converted_to_it_verified_and_trained_from(tmp_path: Path) -> None:
    source = build_pt_dataset(tmp_path / "pt")
    report = js.convert(source, tmp_path / "raw", format="raw")
    assert report.format == "raw"
    assert js.verify(tmp_path / "raw").ok
    expected = next(iter(js.create_loader(source, "val", 4, use_mmap=True)))
    batch = next(iter(js.create_loader(tmp_path / "raw", "val", 4, storage_format="raw", use_mmap=True)))
    assert expected.keys() == batch.keys()
    assert all(torch.equal(expected[key], batch[key]) for key in expected)


def test_the_template_is_short() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", _TEXT, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
