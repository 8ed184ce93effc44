"""A system that gives no thread or no memory is an error that says so, and nothing is left open."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import jasper_store as js
from jasper_store.conversion.verify import verify_files
from jasper_store.errors import InsufficientMemoryError
from jasper_store.files.fingerprint import FileFingerprint
from jasper_store.formats.files import system_refusals
from jasper_store.store.manifest import FileEntry, Manifest, TensorEntry
from jasper_store.store.manifest_file import write


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "a.npy", np.arange(3_000_000, dtype="f4").reshape(-1, 3))
    return tmp_path / "data"


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


def open_files() -> set[str]:
    folder = Path("/proc/self/fd")
    return {str(path.readlink()) for path in folder.iterdir() if path.exists()} if folder.exists() else set()


def convert(data: Path) -> None:
    js.convert(data, data.parent / "out", "safetensors")


def compress(data: Path) -> None:
    js.convert(data, data.parent / "out", "hdf5", "gzip")


def verify(data: Path) -> None:
    known = FileEntry(FileFingerprint.of(data / "a.npy"), {"a": TensorEntry("float32", (1_000_000, 3), "0" * 32)})
    write(Manifest(data, {"a.npy": known}))
    verify_files(data)


@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize("work", [convert, compress, verify])
def test_a_thread_that_cannot_be_had(data: Path, work: Callable[[Path], None]) -> None:
    with pytest.raises(InsufficientMemoryError, match="refused a thread"):
        work(data)
    assert not [name for name in open_files() if name.startswith(str(data.parent))]
    assert not (data.parent / "out").exists() or not [*(data.parent / "out").iterdir()]


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="something else"), system_refusals("x"):
        raise RuntimeError("something else")
    with (
        pytest.raises(InsufficientMemoryError, match=r"^x: the system refused the memory for it"),
        system_refusals("x"),
    ):
        raise MemoryError


TIGHT = """
import resource, sys
from pathlib import Path
import jasper_store as js, torch
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (12 << 20),) * 2)
try:
    js.open(sys.argv[1])
except js.errors.InsufficientMemoryError as exc:
    print(exc)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_a_header_for_which_there_is_no_memory(tmp_path: Path) -> None:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(f'"t{i}":{entry}' for i in range(60_000)) + "}").encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    done = subprocess.run(
        [sys.executable, "-c", TIGHT, str(tmp_path)], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "the system refused the memory for it" in done.stdout
