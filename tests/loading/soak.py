"""Trains for minutes, restarts with other ranks, and has its negatives mined anew: what does a process keep of that?

Run as a script: ``soak.py ROOT MINUTES LEG_SECONDS RELOAD_SECONDS PAIRS [CGROUP]``. It prints a line of JSON after each leg.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

import jasper_store as js
from jasper_store.loading.loader import Loader

BATCH = 256
DIM = 128


class Held(NamedTuple):
    """What a process has after a leg, with everything closed.

    ``resident_kib`` includes files that are mapped, ``anonymous_kib`` does not. ``in_use_kib`` is what ``malloc`` has handed
    out: the arenas of glibc keep more than that, also after ``malloc_trim``, which leaves the end of a thread's arena as it is.
    ``mapped_kib`` is anonymous memory beside them.
    """

    leg: int
    ranks: int
    workers: int
    samples: int
    epochs: int
    reloads: int
    resident_kib: int
    anonymous_kib: int
    in_use_kib: int
    mapped_kib: int
    descriptors: int
    threads: int
    maps: int
    children: int
    shared_memory: int
    locks: int


def status(key: str) -> int:
    """A number of ``/proc/self/status``."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{key}:")))


class _Mallinfo(ctypes.Structure):
    """``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def in_use_kib() -> int:
    """What the C library has handed out and not got back, in all arenas; 0 where it does not say (glibc before 2.33, musl)."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return 0
    ask.restype = _Mallinfo
    found = ask()
    return int(found.uordblks + found.hblkhd) >> 10


def mapped_kib() -> int:
    """Anonymous memory that is neither the heap nor an arena of threads, which begins at a multiple of 64 MiB."""
    total, counted = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            counted = "[heap]" not in words and int(words[0].split("-")[0], 16) % (64 << 20) != 0
        elif counted and words[0] == "Anonymous:":
            total += int(words[1])
    return total


def count(folder: str) -> int:
    return len(os.listdir(folder))  # noqa: PTH208 - of /proc, whose entries go while they are listed


def shared_memory() -> int:
    """Files in shared memory that carry this process's number."""
    return sum(f"_{os.getpid()}_" in f"{name}_" for name in os.listdir("/dev/shm"))  # noqa: PTH208 - as above


class Soak:
    """One run of many legs; the state of each is where the next goes on."""

    def __init__(self, root: Path, pairs: int, reload_seconds: float) -> None:
        self.root = root
        self.set = root / "set"
        self.pairs = pairs
        self.reload_seconds = reload_seconds
        self.rng = random.Random(1)
        self.state: dict[str, Any] | None = None
        self.epoch = self.samples = self.epochs = self.reloads = 0
        self.sum_of_epoch = 0.0
        self.next_reload = 0.0
        self.make()
        with js.open(self.set, use_mmap=True) as store:
            self.negatives = store["hard_negatives"][:].clone()
            train = store["train_idx"][:]
            self.expected_sum = float(store["pair_relevance"][:][train].double().sum())
            self.length = len(train)

    def make(self) -> None:
        """Make the dataset in another process: up to 200 MB that this takes and gives back would stay in the heap."""
        options = {"--pairs": self.pairs, "--dim": DIM, "--clusters": 16}
        words = [str(word) for option in options.items() for word in option]
        command = [sys.executable, "-m", "jasper_store", "synth", str(self.set), "--json", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def mine(self) -> None:
        """Write other negatives over those in use, as a miner does beside the training."""
        mined = self.root / "mined"
        mined.mkdir(exist_ok=True)
        self.negatives = self.negatives.roll(1, dims=1)
        torch.save(self.negatives, mined / "hard_negatives.pt")
        js.convert(mined, self.set, overwrite=True)

    def leg(self, ranks: int, workers: int, seconds: float) -> None:
        """Train on so many ranks, stepping together, and note where the run stands."""
        loaders = [
            js.create_loader(
                self.set, "train", BATCH, workers, rank=rank, world_size=ranks, order="block", epoch=self.epoch,
                drop_last=False, padding="none", use_mmap=True, persistent_workers=workers > 0,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        if self.state is not None:
            for loader in loaders:
                loader.load_state_dict(self.state)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.steps(loaders, end)
        self.state = json.loads(json.dumps(loaders[0].state_dict()))
        for loader in loaders:
            loader.dataset_obj.close()

    def steps(self, loaders: list[Loader], end: float) -> None:
        """The rest of an epoch, or as much of it as there is time for."""
        iterators: list[Iterator[Any]] = [iter(loader) for loader in loaders]
        while time.monotonic() < end:
            batches = [batch for iterator in iterators if (batch := next(iterator, None)) is not None]
            if not batches:
                self.finish_epoch(loaders)
                return
            self.sum_of_epoch += sum(float(batch["relevance"].double().sum()) for batch in batches)
            self.samples += sum(len(batch["relevance"]) for batch in batches)
            if time.monotonic() > self.next_reload:
                self.next_reload = time.monotonic() + self.reload_seconds
                self.reloads += 1
                self.mine()
                for loader in loaders:
                    loader.dataset_obj.reload_negatives()

    def finish_epoch(self, loaders: list[Loader]) -> None:
        assert abs(self.sum_of_epoch - self.expected_sum) < 1e-3, (
            "an epoch served other samples than those of its split"
        )
        assert loaders[0].state_dict()["consumed"] == self.length
        self.sum_of_epoch, self.epoch = 0.0, self.epoch + 1
        self.epochs += 1
        for loader in loaders:
            js.set_epoch(loader, self.epoch)

    def held(self, number: int, ranks: int, workers: int) -> Held:
        gc.collect()
        me = psutil.Process()
        locks = [path for path in self.root.rglob(".*") if path.name.endswith((".lock", ".tmp", ".staging"))]
        return Held(
            number, ranks, workers, self.samples, self.epochs, self.reloads,
            status("VmRSS"), status("RssAnon"), in_use_kib(), mapped_kib(), count("/proc/self/fd"), me.num_threads(), len(me.memory_maps(grouped=False)),
            len(me.children(recursive=True)), shared_memory(), len(locks),
        )  # fmt: skip


def main(root: str, minutes: str, leg_seconds: str, reload_seconds: str, pairs: str, cgroup: str = "") -> None:
    if cgroup:
        Path(cgroup, "cgroup.procs").write_text("0", encoding="ascii")
    soak = Soak(Path(root), int(pairs), float(reload_seconds))
    end = time.monotonic() + 60 * float(minutes)
    number = 0
    while time.monotonic() < end or number < 4:
        ranks, workers = soak.rng.randint(1, 4), (0, 2, 0, 1)[number % 4]
        soak.leg(ranks, workers, float(leg_seconds))
        print(json.dumps(soak.held(number, ranks, workers)._asdict()), flush=True)  # noqa: T201
        number += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
