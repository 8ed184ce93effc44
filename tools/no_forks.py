"""A plugin of pytest for ThreadSanitizer: a test that would fork a worker is skipped there.

That of GCC 12 ends a child of several threads as soon as it starts one ("dup thread with used id"), and Python's workers start
threads. The C harness forks, without helper threads in its children; workers that are spawned are not touched.
"""

from __future__ import annotations

from multiprocessing import popen_fork
from typing import NoReturn

import pytest

__all__ = ["pytest_configure"]


def _refuse(self: object, process: object) -> NoReturn:  # noqa: ARG001 - as multiprocessing calls it
    pytest.skip("ThreadSanitizer ends forked children that start threads")


def pytest_configure() -> None:
    """Called by pytest before the first test."""
    popen_fork.Popen._launch = _refuse  # type: ignore[attr-defined] # noqa: SLF001 - what multiprocessing forks with
