"""Functions that tests run in a child process."""

from __future__ import annotations

import os
import time
from typing import Any

from tools.bench.cgroup import Cap


def hold(nbytes: int, seconds: float) -> dict[str, Any]:
    time.sleep(0.2)
    began = time.monotonic()
    held = bytearray(os.urandom(1) * nbytes)
    time.sleep(seconds)
    return {"held": len(held), "window": (began, time.monotonic())}


def join_and_hold(cap: dict[str, Any], nbytes: int) -> dict[str, Any]:
    Cap.from_dict(cap).join()
    return {"held": len(bytearray(os.urandom(1) * nbytes))}


def fail() -> dict[str, Any]:
    raise LookupError("nothing here")


def hang() -> dict[str, Any]:
    time.sleep(60)
    return {}


def die(signal: int) -> dict[str, Any]:
    os.kill(os.getpid(), signal)
    return {}
