"""Runs jobs in forked children that a test may kill at any moment; imports once, so that a child starts in no time.

Run as a script. Each line of standard input is a job in JSON, ``{"job": name, ...}``; the answer is a line with the
child's pid, and after it has ended a line with its exit status (negative: the signal).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import h5py  # noqa: F401 - imported here once, not in every child
import torch

from jasper_store.conversion.commit import commit
from jasper_store.conversion.compact import compact
from jasper_store.conversion.converter import convert
from jasper_store.conversion.writer import DirectoryWriter
from jasper_store.formats.base import Schema
from jasper_store.jasper.packed import pack


def run_convert(src: str, dst: str | None, format: str, overwrite: bool) -> None:  # noqa: A002
    convert(src, dst, format, overwrite=overwrite)


def run_write(dst: str, format: str, value: float) -> None:  # noqa: A002
    with DirectoryWriter(dst, format, overwrite=True, schema=Schema()) as writer:
        for _ in range(20):
            for name in ("a", "b", "c"):
                writer.append(name, torch.full((500, 20), value))


def run_append(dst: str, format: str, value: float, rows: int) -> None:  # noqa: A002
    with DirectoryWriter(dst, format, mode="append") as writer:
        fill(writer, value, rows)


def run_shard(dst: str, format: str, shard: int, shards: int, value: float, rows: int, mode: str) -> None:  # noqa: A002
    with DirectoryWriter(dst, format, shard=shard, shards=shards, mode=mode) as writer:
        fill(writer, value, rows)


def fill(writer: DirectoryWriter, value: float, rows: int) -> None:
    """The same value everywhere, in two tensors and in ragged rows of one element each."""
    for start in range(0, rows, 500):
        count = min(500, rows - start)
        writer.append("a", torch.full((count, 20), value))
        writer.append("b", torch.full((count,), int(value)))
        writer.append_ragged("words", [[int(value)]] * count)


def run_commit(dst: str) -> None:
    commit(dst)


def run_compact(dst: str, remove_old: bool) -> None:
    compact(dst, remove_old=remove_old)


def run_pack(src: str, dst: str, columns: list[str] | None = None) -> None:
    pack(src, dst, columns=columns, memory_limit=1 << 20)


JOBS: dict[str, Callable[..., None]] = {
    "convert": run_convert,
    "write": run_write,
    "append": run_append,
    "shard": run_shard,
    "commit": run_commit,
    "compact": run_compact,
    "pack": run_pack,
}


def child(options: dict[str, Any]) -> None:
    try:
        JOBS[options.pop("job")](**options)
    except BaseException:  # noqa: BLE001 - the child must end here, whatever happened
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def say(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    # A parallel region of OpenMP in the parent would leave its children waiting for threads that they do not have.
    torch.set_num_threads(1)
    say("ready")
    running: set[int] = set()
    for line in sys.stdin:
        if line.strip() != "wait":
            pid = os.fork()
            if pid == 0:
                child(json.loads(line))
            running.add(pid)
            say(pid)
            continue
        pid, status = os.wait()
        running.remove(pid)
        say(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
