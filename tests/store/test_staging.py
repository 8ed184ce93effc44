"""Staged rows are the rows of the file, read directly, whatever their order; where that cannot be, there is no staging."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from jasper_store.errors import CorruptFileError
from jasper_store.native import gather
from jasper_store.native.gather import Jobs
from jasper_store.store import direct_rows as staging
from jasper_store.store.direct_rows import DirectRowReader, direct_readers_for
from jasper_store.store.opening import open_store
from jasper_store.store.store import TensorStore

ROWS, WIDTH = 700, 97


def directly_readable(directory: Path) -> bool:
    file = directory / "probe"
    file.write_bytes(b"x" * 8192)
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except (OSError, AttributeError):
        return False
    return True


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TensorStore]:
    directory = tmp_path_factory.mktemp("staging")
    if gather.kernel() is None or not directly_readable(directory):
        pytest.skip("needs the kernel and a file system that reads directly")
    for number, name in enumerate("abc"):
        np.save(directory / f"{name}.npy", np.random.default_rng(number).random((ROWS, WIDTH), dtype=np.float32))
    np.save(directory / "other.npy", np.zeros((ROWS, 3), dtype=np.float32))
    with open_store(directory, use_mmap=True) as store:
        yield store


@pytest.fixture
def staged(store: TensorStore) -> Iterator[DirectRowReader]:
    (found,) = direct_readers_for([store[name] for name in "abc"], 1)
    yield found
    found.close()
    found.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def values_at(staging: DirectRowReader, addresses: np.ndarray) -> torch.Tensor:
    out = torch.empty(len(addresses), *staging.row_shape)
    jobs = Jobs()
    rows = torch.from_numpy(addresses)
    jobs.add(staging.anywhere, rows, out)
    jobs.run()
    return out


def expected(store: TensorStore, which: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    whole = torch.stack([store[name].tensor() for name in "abc"] + [torch.zeros(ROWS, WIDTH)])
    return whole[torch.from_numpy(which), torch.from_numpy(rows)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_are_those_of_the_files(store: TensorStore, staged: DirectRowReader, data: st.DataObject) -> None:
    pairs = data.draw(
        st.lists(st.tuples(st.integers(-1, 2), st.integers(0, ROWS - 1)), max_size=60, unique=True), label="rows"
    )
    which = np.array([number for number, _ in pairs], np.int64)
    rows = np.array([row for _, row in pairs], np.int64)
    staged.begin(which, rows)
    addresses, memory = staged.finish()
    assert torch.equal(values_at(staged, addresses), expected(store, which, rows))
    assert len(memory) == int((which >= 0).sum())


def test_all_rows_at_once_and_again(store: TensorStore, staged: DirectRowReader) -> None:
    for _ in range(2):
        which = np.arange(ROWS) % 3
        staged.begin(which, np.arange(ROWS))
        addresses, memory = staged.finish()
        assert torch.equal(values_at(staged, addresses), expected(store, which, np.arange(ROWS)))
        del memory


def test_tensors_in_memory_are_used_as_they_are(tmp_path: Path, store: TensorStore) -> None:
    with open_store(store.path, use_mmap=False) as loaded:
        (mixed,) = direct_readers_for([store["a"], loaded["b"], store["c"]], 1)
        which, rows = np.arange(90) % 3, np.arange(90) * 7
        mixed.begin(which, rows)
        addresses, memory = mixed.finish()
        assert torch.equal(values_at(mixed, addresses), expected(store, which, rows))
        assert len(memory) == 60
        mixed.close()
        assert direct_readers_for([loaded[name] for name in "abc"], 1) == []


def test_what_cannot_be_staged(store: TensorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert direct_readers_for([store["a"], store["other"]], 1) == []
    opened = open_files()
    real = os.open
    calls = []

    def refused(path: Any, flags: int, *args: Any) -> int:
        calls.append(path)
        if len(calls) > 4:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", refused)
    assert direct_readers_for([store[name] for name in "abc"], 2) == []
    monkeypatch.undo()
    assert open_files() == opened
    monkeypatch.setattr(staging, "kernel", lambda: None)
    assert direct_readers_for([store[name] for name in "abc"], 1) == []


def test_a_file_that_was_cut_is_named(tmp_path: Path) -> None:
    if gather.kernel() is None or not directly_readable(tmp_path):
        pytest.skip("needs the kernel and a file system that reads directly")
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.ones((ROWS, WIDTH), dtype=np.float32))
    with open_store(tmp_path, use_mmap=True) as store:
        (found,) = direct_readers_for([store["a"], store["b"]], 1)
        os.truncate(tmp_path / "b.npy", 100_000)
        found.begin(np.array([0, 0, 1, 1]), np.array([1, 600, 1, 600]))
        with pytest.raises(CorruptFileError, match=r"b\.npy: rows of b could not be read") as caught:
            found.finish()
        assert caught.value.tensor == "b"
        found.close()
