"""A compiled library that is missing, damaged or of another version is not used."""

from __future__ import annotations

from pathlib import Path

import pytest

from jasper_store.native import library as module


@pytest.mark.parametrize("content", [None, b"", b"not a library" * 1000])
def test_a_missing_or_damaged_library_is_not_used(
    content: bytes | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "_rows.so"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(module, "LIBRARY", file)
    assert module.library.__wrapped__() is None


@pytest.mark.skipif(module.library() is None, reason="the library was not built here")
def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.library.__wrapped__() is not None
    monkeypatch.setattr(module, "_ABI", module._ABI + 1)
    assert module.library.__wrapped__() is None
