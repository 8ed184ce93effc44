"""Huge pages are used while allocating them is fast, and never again once it was slow."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jasper_store.paging import huge, preload
from jasper_store.paging.huge import HUGE_PAGE, HugePages


class Calls:
    """Stands in for madvise and for the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.seconds = iter(seconds)
        self.now = 0.0
        self.half = False
        monkeypatch.setattr("jasper_store.paging.syscalls.madvise", self.madvise)
        monkeypatch.setattr("jasper_store.paging.huge.time.perf_counter", self.clock)

    def madvise(self, address: int, nbytes: int, advice: int) -> int:
        assert advice == 14
        self.ranges.append((address, nbytes))
        return 0

    def clock(self) -> float:
        if self.half:
            self.now += next(self.seconds)
        self.half = not self.half
        return self.now


@pytest.fixture
def buffer() -> Iterator[tuple[int, int]]:
    memory = torch.frombuffer(mmap.mmap(-1, 40 * HUGE_PAGE), dtype=torch.uint8)
    yield memory.data_ptr() + 100, memory.nbytes - 200
    del memory


@pytest.mark.parametrize("block", [HUGE_PAGE // 2 + 7, HUGE_PAGE, 2 * HUGE_PAGE + 5, 100 * HUGE_PAGE])
def test_blocks_allocate_each_page_once(monkeypatch: pytest.MonkeyPatch, buffer: tuple[int, int], block: int) -> None:
    address, nbytes = buffer
    calls = Calls(monkeypatch, [0.0] * 100)
    pages = HugePages()
    for first in range(0, nbytes, block):
        pages.allocate(address, nbytes, first, min(first + block, nbytes))
    found = [page for start, length in calls.ranges for page in range(start, start + length, HUGE_PAGE)]
    whole = range(-(-address // HUGE_PAGE) * HUGE_PAGE, (address + nbytes) // HUGE_PAGE * HUGE_PAGE, HUGE_PAGE)
    assert found == list(whole)
    assert not pages.slow


def test_slow_pages_end_the_use_of_huge_pages(monkeypatch: pytest.MonkeyPatch, buffer: tuple[int, int]) -> None:
    calls = Calls(monkeypatch, [1e-4] * 5 + [5e-3] * 100)
    pages = HugePages()
    for first in range(0, buffer[1], HUGE_PAGE):
        pages.allocate(*buffer, first, first + HUGE_PAGE)
    assert pages.slow
    assert 8 <= len(calls.ranges) <= 10


def test_a_slow_page_now_and_then_does_not(monkeypatch: pytest.MonkeyPatch, buffer: tuple[int, int]) -> None:
    calls = Calls(monkeypatch, [5e-3, 1e-4, 1e-4, 1e-4] * 10)
    pages = HugePages()
    for first in range(0, buffer[1], HUGE_PAGE):
        pages.allocate(*buffer, first, first + HUGE_PAGE)
    assert not pages.slow
    assert len(calls.ranges) >= 38


def test_without_huge_pages_nothing_is_touched(monkeypatch: pytest.MonkeyPatch, buffer: tuple[int, int]) -> None:
    monkeypatch.setattr("jasper_store.paging.syscalls.madvise", lambda *_: 22)
    pages = HugePages()
    pages.allocate(*buffer, 0, buffer[1])
    assert not pages.slow


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux only")
@pytest.mark.parametrize("slow", [False, True])
def test_the_values_read_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    monkeypatch.setattr(preload, "_LARGE", 1 << 20)
    monkeypatch.setattr(huge, "_SLOW_SECONDS", -1.0 if slow else 10.0)
    monkeypatch.setattr(preload, "_HUGE_PAGES", HugePages())
    values = torch.randint(0, 256, (17 << 20,), dtype=torch.uint8)
    path = tmp_path / "values.bin"
    path.write_bytes(b"head" + values.numpy().tobytes())
    out = preload.empty(values.shape, torch.uint8)
    preload.read_into(path, 4, out)
    assert torch.equal(out, values)
    assert preload._HUGE_PAGES.slow is slow
