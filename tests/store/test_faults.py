"""Files that fail while they are mapped or read: cut, replaced, overwritten, unreadable. Each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jasper_store.native.gather import kernel

needs_kernel = pytest.mark.skipif(kernel() is None, reason="the kernel was not built: no C compiler here")
ROWS, WIDTH = 20_000, 64

HEAD = """
import os, signal, sys, threading
from pathlib import Path
import torch
import jasper_store as js
from jasper_store.errors import CorruptFileError
from jasper_store.store.paged import PagedTensor
path = Path(sys.argv[1])
store = js.open(path, use_mmap=True)
rows = torch.randperm(20_000)
# Only what is found while rows are copied: a file that is short before is noticed by its size.
if len(sys.argv) > 2:
    for kind in {type(store["emb"]), PagedTensor}:
        kind._require_whole_file = lambda self: None
def refused():
    try:
        store["emb"].take(rows)
    except CorruptFileError as exc:
        return str(exc)
    return "no error"
store["emb"].take(rows)
"""


def run(body: str, *arguments: object) -> tuple[int, list[str], str]:
    """Exit status, lines and errors of a program that opens the dataset."""
    done = subprocess.run(
        [sys.executable, "-c", HEAD + body, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.fixture(params=[1, pytest.param(5, marks=pytest.mark.slow)])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tensor in one file, or in several."""
    values = np.arange(ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
    count = request.param
    for number, part in enumerate(np.split(values, count)):
        np.save(tmp_path / ("emb.npy" if count == 1 else f"emb-{number:05d}-of-{count:05d}.npy"), part)
    return tmp_path


def files(data: Path) -> list[Path]:
    return sorted(data.glob("emb*"))


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
def test_a_file_that_is_cut_while_its_rows_are_copied(data: Path, threads: int) -> None:
    """The size is not looked at here, as if the file was cut after that: the process was ended by SIGBUS."""
    cut = files(data)[-1]
    body = f"""
torch.set_num_threads({threads})
os.truncate({str(cut)!r}, 8192)
for _ in range(3):
    print(refused())
kept = store["emb"].take(torch.arange(10))
print(bool((kept == torch.arange(640.0).view(10, 64)).all()))
"""
    status, lines, errors = run(body, data, "blind")
    assert (status, errors) == (0, "")
    assert all(line.startswith(f"{cut}: a page of emb could not be read") for line in lines[:3])
    assert lines[3:] == ["True"]


@needs_kernel
def test_a_file_that_is_cut_and_written_again_under_many_readers(data: Path) -> None:
    cut = files(data)[-1]
    body = f"""
content, over, found = Path({str(cut)!r}).read_bytes(), threading.Event(), set()
def reads():
    while not over.is_set():
        found.add(refused().partition(":")[0])
readers = [threading.Thread(target=reads) for _ in range(3)]
for each in readers: each.start()
with open({str(cut)!r}, "r+b") as file:
    for _ in range(300):
        file.truncate(4096)
        file.seek(0)
        file.write(content)
        file.flush()
over.set()
for each in readers: each.join()
print(*sorted(found))
"""
    status, lines, errors = run(body, data, "blind")
    assert (status, errors) == (0, "")
    assert set(lines[0].split()) <= {str(cut), "no", "error"}


@needs_kernel
def test_another_handler_of_the_signal_gets_what_is_not_ours(data: Path) -> None:
    """PyTorch installs one in each worker, and faulthandler has one."""
    cut = files(data)[-1]
    body = f"""
import ctypes, faulthandler, time
faulthandler.enable()
time.sleep(0.05)  # handlers of others are looked for once a tick of the clock, 10 ms at most
os.truncate({str(cut)!r}, 8192)
print(refused(), flush=True)
os.kill(os.getpid(), signal.SIGBUS)
"""
    status, lines, errors = run(body, data, "blind")
    assert lines[0].startswith(f"{cut}: a page of emb")
    assert status == -7
    assert "Fatal Python error: Bus error" in errors


def test_a_file_that_was_cut_before_is_noticed_by_its_size(data: Path) -> None:
    body = f"os.truncate({str(files(data)[0])!r}, 4096)\nprint(*{{refused() for _ in range(40)}} - {{'no error'}})\n"
    if len(files(data)) > 1 and kernel() is None:
        pytest.skip("of several files each fourth call looks at one, and nothing catches the fault without the kernel")
    status, lines, errors = run(body, data)
    assert (status, errors) == (0, "")
    assert "was truncated" in lines[0]


def test_a_file_that_is_replaced_stays_what_it_was(data: Path) -> None:
    """The map keeps the old file, whatever its name means now."""
    body = """
before = store["emb"].take(rows)
for each in sorted(path.glob("emb*")):
    new = each.with_name("new")
    new.write_bytes(bytes(each.stat().st_size))
    new.replace(each)
print(torch.equal(store["emb"].take(rows), before))
"""
    assert run(body, data) == (0, ["True"], "")


def test_a_file_that_is_overwritten_shows_what_was_written(data: Path) -> None:
    """Nothing tells a reader; documented in docs/reliability.md. A check of the manifest finds it."""
    last = files(data)[-1]
    body = f"""
with open({str(last)!r}, "r+b") as file:
    file.seek(-256, 2)
    file.write(b"\\0" * 256)
print(int(store["emb"].take([19_999]).abs().sum()))
"""
    assert run(body, data) == (0, ["0"], "")
