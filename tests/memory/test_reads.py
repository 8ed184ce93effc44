"""Rows read straight from files are those of the files: near each other or far, at any size, in any order."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from jasper_store.memory import reads
from jasper_store.memory.library import library
from jasper_store.memory.reads import IN_MEMORY, RowReader, RowsOf, UnreadableError

pytestmark = pytest.mark.skipif(library() is None, reason="the library was not built here")
SIZE = 1 << 20


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, bytes]]:
    path = tmp_path_factory.mktemp("reads") / "file"
    content = np.random.default_rng(0).bytes(SIZE + 123)
    path.write_bytes(content)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("this file system does not read directly")
    yield descriptor, content
    os.close(descriptor)


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def at(place: int, nbytes: int) -> bytes:
    import ctypes

    return ctypes.string_at(place, nbytes)


def take(
    tensors: list[RowsOf], row_nbytes: int, which: list[int], rows: list[int], zeros: bytes | None = None
) -> list[bytes]:
    """The bytes of each row."""
    nothing = np.frombuffer(zeros or bytes(row_nbytes), np.uint8)
    target = np.empty(max(len(rows) * row_nbytes, 1), np.uint8)
    reader = RowReader(tensors, row_nbytes)
    try:
        found = reader.read(np.array(which), np.array(rows, np.int64), address(nothing), address(target))
        return [at(place, row_nbytes) for place in found.tolist()]
    finally:
        reader.close()
        reader.close()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_are_those_of_the_file(file: tuple[int, bytes], data: st.DataObject) -> None:
    descriptor, content = file
    row_nbytes = data.draw(st.sampled_from([1, 7, 512, 1536, 4096, 5000, 200_000]), label="row")
    stride = row_nbytes + data.draw(st.sampled_from([0, 1, 100, 5000]), label="padding")
    base = data.draw(st.integers(0, 9000), label="base")
    count = (SIZE - base - row_nbytes) // stride + 1
    tensor = RowsOf(descriptor, base, stride, count, base + (count - 1) * stride + row_nbytes)
    rows = data.draw(st.lists(st.integers(0, count - 1), max_size=40), label="rows")
    found = take([tensor], row_nbytes, [0] * len(rows), rows)
    assert found == [content[base + row * stride :][:row_nbytes] for row in rows]


@pytest.mark.parametrize("queue", [True, False])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 1000])
def test_many_reads_at_once(file: tuple[int, bytes], queue: bool, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor, content = file
    if not queue:
        # Of another process: the system refuses it, and reads are made one by one.
        context = multiprocessing.get_context("fork")
        child = context.Process(target=test_many_reads_at_once, args=(file, True, count, monkeypatch))
        RowReader([], 1).close()
        child.start()
        child.join()
        assert child.exitcode == 0
        return
    rows = np.random.default_rng(count).permutation(SIZE // 20_000).repeat(20)[:count].tolist()
    tensor = RowsOf(descriptor, 3, 20_000, SIZE // 20_000, SIZE)
    assert take([tensor], 100, [0] * len(rows), rows) == [content[3 + 20_000 * row :][:100] for row in rows]


def test_several_tensors_some_in_memory_and_none(file: tuple[int, bytes]) -> None:
    descriptor, content = file
    memory = np.arange(4000, dtype=np.uint8)
    tensors = [
        RowsOf(descriptor, 0, 40, 1000, 40_000),
        RowsOf(IN_MEMORY, address(memory), 40, 100),
        RowsOf(descriptor, 500_000, 80, 1000, 580_000),
    ]
    which, rows = [2, -1, 1, 0, 2, 0, -7], [9, 0, 3, 999, 4, 0, 5]
    assert take(tensors, 40, which, rows, b"z" * 40) == [
        content[500_720:500_760],
        b"z" * 40,
        memory[120:160].tobytes(),
        content[39_960:40_000],
        content[500_320:500_360],
        content[:40],
        b"z" * 40,
    ]


def test_the_end_of_a_file_need_not_be_the_end_of_a_page(file: tuple[int, bytes]) -> None:
    descriptor, content = file
    last = RowsOf(descriptor, len(content) - 300, 100, 3, len(content))
    assert take([last], 100, [0, 0, 0], [2, 0, 1]) == [content[-100:], content[-300:-200], content[-200:-100]]


@pytest.mark.parametrize("row", [-1, 100, 2**62, -(2**62)])
def test_rows_that_there_are_not(file: tuple[int, bytes], row: int) -> None:
    tensors = [RowsOf(file[0], 0, 10, 100, 1000), RowsOf(file[0], 0, 10, 100, 1000)]
    with pytest.raises(IndexError, match="tensor 1 does not have; its rows are 0 to 99"):
        take(tensors, 10, [0, 1], [0, row])


def test_a_file_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    descriptor = os.open(path, os.O_RDONLY)
    tensors = [RowsOf(descriptor, 0, 1000, 50, 50_000), RowsOf(descriptor, 50_000, 1000, 50, 100_000)]
    os.truncate(path, 80_000)
    assert len(take(tensors, 1000, [0, 1, 1], [49, 0, 25])) == 3
    with pytest.raises(UnreadableError) as caught:
        take(tensors, 1000, [0, 1, 0], [1, 30, 2])
    assert caught.value.tensor == 1
    os.close(descriptor)


def test_queues_are_used_again_and_not_hoarded() -> None:
    readers = [RowReader([], 1) for _ in range(reads._MOST_IDLE + 3)]
    for reader in readers:
        reader.close()
    assert len(reads._idle) == reads._MOST_IDLE
    _, last = reads._idle[-1]
    again = RowReader([], 1)
    assert again._reader == last
    again.close()
    with pytest.raises(ValueError, match="closed"):
        again.read(np.array([0]), np.array([0]), 0, 0)
