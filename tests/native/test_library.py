"""A compiled library that is missing, damaged or of another version is not used."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jasper_store.conversion.writer import DirectoryWriter
from jasper_store.native import library as module
from jasper_store.native.gather import source_of
from jasper_store.store.opening import open_store


@pytest.mark.parametrize("content", [None, b"", b"not a library" * 1000])
def test_a_missing_or_damaged_library_is_not_used(
    content: bytes | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "_rows.so"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(module, "LIBRARY", file)
    assert module.library.__wrapped__() is None


@pytest.fixture
def asked_anew() -> Iterator[None]:
    module.library.cache_clear()
    yield
    module.library.cache_clear()


@pytest.mark.skipif(module.library() is None, reason="the library was not built here")
def test_a_library_of_another_machine_is_named_once_and_torch_gathers(
    asked_anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in an installation that was copied from another machine."""
    file = tmp_path / "_rows.so"
    content = bytearray(module.LIBRARY.read_bytes())
    machine = slice(18, 20)  # e_machine of an ELF header
    content[machine] = (0xB7 if content[18] != 0xB7 else 0x3E).to_bytes(2, "little")
    file.write_bytes(content)
    monkeypatch.setattr(module, "LIBRARY", file)
    rows = torch.arange(40).reshape(10, 4)
    with caplog.at_level(logging.DEBUG, "jasper_store"):
        source = source_of(rows)
        assert source_of(rows).numbers == source.numbers == ()
    [record] = caplog.records
    assert record.levelno == logging.DEBUG
    assert str(file) in record.getMessage()
    assert "gathered by torch" in record.getMessage()
    path = tmp_path / "set"
    with DirectoryWriter(path) as writer:
        writer.append("a", rows)
    with open_store(path, use_mmap=False) as store:
        assert torch.equal(store["a"].take(torch.tensor([3, 0, 3])), rows[[3, 0, 3]])


@pytest.mark.skipif(module.library() is None, reason="the library was not built here")
def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.library.__wrapped__() is not None
    monkeypatch.setattr(module, "_ABI", module._ABI + 1)
    assert module.library.__wrapped__() is None
