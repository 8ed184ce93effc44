"""The way of copying that the kernel chooses: the quickest in its trials, tried again now and then."""

from __future__ import annotations

import ctypes

import pytest

from jasper_store.native.library import library

TRIALS, PERIOD = 8, 4096  # as in ways.c
needs_kernel = pytest.mark.skipif(library() is None, reason="the kernel was not built: no C compiler here")


class Ways:
    """Copies of 2 GiB, which no gather of the tests makes: what was tried for other sizes does not matter here."""

    def __init__(self, n_ways: int) -> None:
        self.nbytes, self.n_ways = 2 << 30, n_ways
        self.native = library()
        self.native.jasper_way.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.POINTER(ctypes.c_int)]
        self.native.jasper_way_took.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int64]
        self.native.jasper_way_took.restype = None

    def copy(self, took: list[int]) -> tuple[int, bool]:
        """One copy, which takes as many nanoseconds as given for its way; the way, and whether it was a trial."""
        trial = ctypes.c_int()
        way = self.native.jasper_way(self.nbytes, self.n_ways, ctypes.byref(trial))
        if trial.value:
            self.native.jasper_way_took(self.nbytes, way, took[way])
        return way, bool(trial.value)

    def begin(self) -> None:
        """Copies until a round of trials has begun."""
        while self.copy([1] * 4)[1]:
            pass
        while not self.copy([10**9] * 4)[1]:
            pass


@needs_kernel
@pytest.mark.parametrize("n_ways", [2, 4])
def test_the_quickest_way_is_chosen_and_tried_again(n_ways: int) -> None:
    ways = Ways(n_ways)
    for quickest in (*range(n_ways), 0):
        ways.begin()
        took = [9 * 10**8] * 4
        took[quickest] = 5 * 10**8
        tried = [ways.copy(took) for _ in range(TRIALS * n_ways - 1)]
        assert all(trial for _, trial in tried)
        assert {way for way, _ in tried} == set(range(n_ways))
        chosen = [ways.copy(took) for _ in range(100)]
        assert chosen == [(quickest, False)] * 100


@needs_kernel
def test_a_trial_that_something_delayed_does_not_decide() -> None:
    ways = Ways(2)
    ways.begin()
    for number in range(TRIALS * 2 - 1):
        ways.copy([10**9, 10**9 if number < 10 else 10**8, 0, 0])
    assert ways.copy([])[0] == 1


@needs_kernel
def test_a_round_begins_after_so_many_copies() -> None:
    ways = Ways(4)
    ways.begin()
    count = sum(1 for _ in range(PERIOD) if ways.copy([10**9] * 4)[1])
    assert count == 4 * TRIALS
