"""Without the extra, whoever asks for its part is told what to install, and everything else works."""

from __future__ import annotations

import importlib
import sys

import pytest

from jasper_store.errors import JasperStoreError


def test_the_data_module_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "lightning.pytorch", raising=False)
    monkeypatch.delitem(sys.modules, "jasper_store.jasper.lightning", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'jasper-store\[integrations\]'") as caught:
        importlib.import_module("jasper_store.jasper.lightning")
    assert isinstance(caught.value, JasperStoreError)
    assert "lightning" in str(caught.value.__cause__)
