"""A worker whose trainer was killed before the worker had started."""

from __future__ import annotations

import os

import pytest

from jasper_store.loading.worker_gathers import UnitWorker


class Ended(BaseException):
    """The process is at its end here."""


def test_a_worker_that_comes_up_after_its_trainer_was_killed_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", end)
    start = UnitWorker(lambda _: None)
    with pytest.raises(AssertionError):  # it goes on, and is in no worker
        start(0)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(Ended):
        start(0)
