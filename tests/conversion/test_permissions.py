"""What only its owner may read stays so when it is replaced; what is new obeys umask."""

from __future__ import annotations

import os
import stat
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from jasper_store.conversion import exchange
from jasper_store.conversion.converter import convert
from jasper_store.conversion.writer import DirectoryWriter
from jasper_store.store.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")


def modes(directory: Path) -> dict[str, int]:
    paths = [directory, *directory.iterdir()]
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in paths}


def close_up(directory: Path) -> None:
    for path in directory.iterdir():
        path.chmod(0o600)
    directory.chmod(0o700)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    for name in ("a", "b"):
        np.save(tmp_path / "source" / f"{name}.npy", np.arange(6.0))
    (tmp_path / "source" / "config.json").write_text("{}")
    return tmp_path / "source"


@pytest.mark.parametrize("fmt", ["npy", "hdf5"])
@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_converting_over_a_dataset_keeps_who_may_read_it(tmp_path, source, monkeypatch, fmt, way):
    if way == "renames":
        monkeypatch.setattr(exchange, "exchange_directories", lambda one, other: False)
    convert(source, tmp_path / "out", fmt)
    close_up(tmp_path / "out")
    (tmp_path / "out" / "config.json").chmod(0o640)
    convert(source, tmp_path / "out", fmt, overwrite=True)
    found = modes(tmp_path / "out")
    assert found.pop("out") == 0o700
    assert found.pop("config.json") == 0o640
    assert MANIFEST_NAME in found
    assert set(found.values()) == {0o600}


def test_writing_over_a_dataset_keeps_who_may_read_it(tmp_path):
    for round_ in range(2):
        with DirectoryWriter(tmp_path / "set", "npy", overwrite=bool(round_)) as writer:
            writer.append("a", torch.ones(2))
            assert writer._staging is not None
            if round_:
                # While it is written, too, only its owner can read it.
                assert stat.S_IMODE(writer._staging.stat().st_mode) == 0o700
                writer.append("new", torch.ones(2))
        if not round_:
            close_up(tmp_path / "set")
    found = modes(tmp_path / "set")
    umask = os.umask(0o022)
    os.umask(umask)
    assert found.pop("new.npy") == 0o666 & ~umask
    assert found.pop("set") == 0o700
    assert set(found.values()) == {0o600}


def test_an_empty_directory_that_was_made_for_it_keeps_its_permissions(tmp_path):
    (tmp_path / "set").mkdir(0o700)
    with DirectoryWriter(tmp_path / "set", "npy") as writer:
        writer.append("a", torch.ones(2))
    assert modes(tmp_path / "set")["set"] == 0o700
