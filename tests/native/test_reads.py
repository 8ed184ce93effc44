"""Rows read directly from files are those of the files: near each other or far apart, of any size, in any order.

A helper thread reads them. Where the system refuses a thread, :meth:`AsyncRowReader.finish` reads them itself.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from jasper_store.native import reads
from jasper_store.native.gather import NUMBERS
from jasper_store.native.library import library
from jasper_store.native.reads import IN_MEMORY, AsyncRowReader, RowLayout, UnreadableError

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


def large_gather() -> None:
    """A gather that wants a helper; without torch, whose threads do not survive a fork."""
    table, rows = np.arange(64_000).reshape(1000, 64), np.arange(1000)
    out = np.empty_like(table)
    job = [address(table), 1000, 512, 512, address(rows), 1, 1000, address(out), 0, 0]
    assert len(job) == NUMBERS
    packed = np.array(job)
    assert library().jasper_gather(address(packed), 1, 2) == 0
    assert np.array_equal(out, table)


def native_threads() -> int:
    """Threads of this process, those of the compiled library among them."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def passes_in_child(check: Callable[[], None], *, helped: bool) -> bool:
    """Whether a check passes in a forked child, which can have a helper or not."""

    def run() -> None:
        assert native_threads() == 1
        if not helped:
            if os.geteuid() == 0:
                os.setuid(65534)  # root may have any number of threads
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        check()
        assert (native_threads() > 1) == helped

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    return child.exitcode == 0


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def at(place: int, nbytes: int) -> bytes:
    import ctypes

    return ctypes.string_at(place, nbytes)


def take(
    tensors: list[RowLayout], row_nbytes: int, which: list[int], rows: list[int], zeros: bytes | None = None
) -> list[bytes]:
    """The bytes of each row."""
    nothing = np.frombuffer(zeros or bytes(row_nbytes), np.uint8)
    target = np.empty(max(len(rows) * row_nbytes, 1), np.uint8)
    reader = AsyncRowReader(tensors, row_nbytes)
    try:
        reader.begin(np.array(which), np.array(rows, np.int64), address(nothing), address(target))
        found = reader.finish()
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
    tensor = RowLayout(descriptor, base, stride, count, base + (count - 1) * stride + row_nbytes)
    rows = data.draw(st.lists(st.integers(0, count - 1), max_size=40), label="rows")
    found = take([tensor], row_nbytes, [0] * len(rows), rows)
    assert found == [content[base + row * stride :][:row_nbytes] for row in rows]


@pytest.mark.parametrize("helped", [True, False])
@pytest.mark.parametrize("queue", [True, False])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 1000])
def test_many_reads_at_once(file: tuple[int, bytes], count: int, queue: bool, helped: bool) -> None:
    descriptor, content = file
    rows = np.random.default_rng(count).permutation(SIZE // 20_000).repeat(20)[:count].tolist()
    tensor = RowLayout(descriptor, 3, 20_000, SIZE // 20_000, SIZE)
    parents = reads._acquire_reader()

    def check() -> None:
        if not queue:
            # The parent's queue: the system refuses it here, and each read is a pread.
            reads._idle.append((os.getpid(), parents))
        assert take([tensor], 100, [0] * len(rows), rows) == [content[3 + 20_000 * row :][:100] for row in rows]

    assert passes_in_child(check, helped=helped)
    library().jasper_close_reader(parents)


def test_more_requests_than_the_queue_holds_with_gathers_between(file: tuple[int, bytes]) -> None:
    descriptor, content = file
    tensor = RowLayout(descriptor, 0, 1000, SIZE // 1000, SIZE)

    def read(number: int) -> bool:
        rows = np.random.default_rng(number).integers(0, SIZE // 1000, 400).tolist()
        return take([tensor], 1000, [0] * 400, rows) == [content[1000 * row :][:1000] for row in rows]

    over = threading.Event()

    def gathers() -> None:
        while not over.is_set():
            large_gather()

    with ThreadPoolExecutor(13) as threads:
        gathering = threads.submit(gathers)
        try:
            assert all(threads.map(read, range(120)))
        finally:
            over.set()
        gathering.result()


def test_many_requests_begun_before_the_first_is_finished(file: tuple[int, bytes]) -> None:
    descriptor, content = file
    tensor = RowLayout(descriptor, 0, 1000, SIZE // 1000, SIZE)
    readers = [AsyncRowReader([tensor], 1000) for _ in range(20)]
    targets = [np.empty(400_000, np.uint8) for _ in readers]
    named = [np.random.default_rng(number).integers(0, SIZE // 1000, 400) for number in range(20)]
    for reader, rows, target in zip(readers, named, targets, strict=True):
        reader.begin(np.zeros(400), rows, 0, address(target))
    with pytest.raises(ValueError, match="something to finish"):
        readers[0].begin(np.zeros(1), np.zeros(1), 0, 0)
    for reader, rows in list(zip(readers, named, strict=True))[::-1]:
        found = [at(place, 1000) for place in reader.finish().tolist()]
        assert found == [content[1000 * row :][:1000] for row in rows.tolist()]
        reader.close()


def test_a_request_begun_before_a_fork_is_read_again_in_the_child(file: tuple[int, bytes], tmp_path: Path) -> None:
    path, n_rows = tmp_path / "large", 16_000
    path.write_bytes(file[1] * 16)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    tensor = RowLayout(descriptor, 0, 1000, n_rows, n_rows * 1000)
    rows, target = np.arange(n_rows), np.empty(n_rows * 1000, np.uint8)
    readers = [AsyncRowReader([tensor], 1000) for _ in range(8)]
    for reader in readers:
        reader.begin(np.zeros(n_rows), rows, 0, address(target))
    # Requests are read one after the other: of 128 MB the last 16 are not there when the child is made.
    child = os.fork()
    if not child:
        try:
            for _ in range(2):
                found = readers[-1].finish().tolist()
                assert at(found[7], 1000) == (file[1] * 16)[7000:8000]
                assert at(found[-1], 1000) == (file[1] * 16)[(n_rows - 1) * 1000 :][:1000]
                readers[-1].begin(np.zeros(n_rows), rows, 0, address(target))
            readers[-2].close()
            assert take([tensor], 1000, [0], [5]) == [file[1][5000:6000]]
        except BaseException:  # noqa: BLE001 - whatever it was, pytest must not go on in the child
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for reader in readers:
        assert len(reader.finish()) == n_rows
        reader.close()
    os.close(descriptor)


def test_a_reader_that_was_used_before_a_fork_reads_in_the_child(file: tuple[int, bytes]) -> None:
    descriptor, content = file
    reader = AsyncRowReader([RowLayout(descriptor, 0, 1000, 1000, 1000_000)], 1000)
    target = np.empty(100_000, np.uint8)

    def read(first: int) -> None:
        reader.begin(np.zeros(100), np.arange(first, first + 100), 0, address(target))
        assert [at(place, 1000) for place in reader.finish().tolist()] == [
            content[1000 * row :][:1000] for row in range(first, first + 100)
        ]

    read(0)
    # Its buffer and its queue are the parent's, and other memory may be where the buffer was.
    assert passes_in_child(lambda: read(100), helped=True)
    read(200)
    reader.close()


def test_an_unfinished_request_does_no_harm_at_exit(file: tuple[int, bytes], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(file[1])
    program = f"""
import os
import numpy as np
from jasper_store.native.reads import AsyncRowReader, RowLayout
descriptor = os.open({str(path)!r}, os.O_RDONLY)
target = np.empty({SIZE}, np.uint8)
reader = AsyncRowReader([RowLayout(descriptor, 0, 1000, 1000, 1000_000)], 1000)
reader.begin(np.zeros(1000), np.arange(1000), 0, target.__array_interface__["data"][0])
"""
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_child_that_is_forked_while_others_read(file: tuple[int, bytes]) -> None:
    descriptor, content = file
    tensor = RowLayout(descriptor, 0, 1000, SIZE // 1000, SIZE)
    over = threading.Event()

    def read() -> bool:
        rows = list(range(SIZE // 1000))
        return take([tensor], 1000, [0] * len(rows), rows) == [content[1000 * row :][:1000] for row in rows]

    def reads_on() -> bool:
        good = True
        while not over.is_set():
            good = good and read()
        return good

    def check() -> None:
        assert read()

    with ThreadPoolExecutor(2) as threads:
        reading = [threads.submit(reads_on) for _ in range(2)]
        try:
            assert all(passes_in_child(check, helped=helped) for helped in [True, False] * 5)
        finally:
            over.set()  # also where children are skipped: the pool waits for its threads
        assert all(each.result() for each in reading)


def test_several_tensors_some_in_memory_and_none(file: tuple[int, bytes]) -> None:
    descriptor, content = file
    memory = np.arange(4000, dtype=np.uint8)
    tensors = [
        RowLayout(descriptor, 0, 40, 1000, 40_000),
        RowLayout(IN_MEMORY, address(memory), 40, 100),
        RowLayout(descriptor, 500_000, 80, 1000, 580_000),
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
    last = RowLayout(descriptor, len(content) - 300, 100, 3, len(content))
    assert take([last], 100, [0, 0, 0], [2, 0, 1]) == [content[-100:], content[-300:-200], content[-200:-100]]


@pytest.mark.parametrize("row", [-1, 100, 2**62, -(2**62)])
def test_rows_out_of_range(file: tuple[int, bytes], row: int) -> None:
    tensors = [RowLayout(file[0], 0, 10, 100, 1000), RowLayout(file[0], 0, 10, 100, 1000)]
    with pytest.raises(IndexError, match="tensor 1 does not have; its rows are 0 to 99"):
        take(tensors, 10, [0, 1], [0, row])


@pytest.mark.parametrize("helped", [True, False])
def test_a_file_that_was_cut(tmp_path: Path, helped: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    descriptor = os.open(path, os.O_RDONLY)
    tensors = [RowLayout(descriptor, 0, 1000, 50, 50_000), RowLayout(descriptor, 50_000, 1000, 50, 100_000)]
    os.truncate(path, 80_000)

    def check() -> None:
        assert len(take(tensors, 1000, [0, 1, 1], [49, 0, 25])) == 3
        with pytest.raises(UnreadableError) as caught:
            take(tensors, 1000, [0, 1, 0], [1, 30, 2])
        assert (caught.value.tensor, caught.value.errno) == (1, 0)

    assert passes_in_child(check, helped=helped)
    os.close(descriptor)


def test_what_the_system_says_of_a_file_that_it_cannot_read(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    with pytest.raises(UnreadableError, match="Is a directory") as caught:
        take([RowLayout(IN_MEMORY, 0, 10, 10), RowLayout(descriptor, 0, 10, 10, 100)], 10, [1], [3])
    assert (caught.value.tensor, caught.value.errno) == (1, errno.EISDIR)
    os.close(descriptor)


def test_idle_queues_are_reused_up_to_a_limit() -> None:
    readers = [AsyncRowReader([], 1) for _ in range(reads._MAX_IDLE + 3)]
    for reader in readers:
        reader.close()
    assert len(reads._idle) == reads._MAX_IDLE
    _, last = reads._idle[-1]
    again = AsyncRowReader([], 1)
    assert again._reader == last
    again.close()
    with pytest.raises(ValueError, match="closed"):
        again.begin(np.array([0]), np.array([0]), 0, 0)
