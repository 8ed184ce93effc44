"""Loaders with real worker processes: start methods, what must reach running workers, and workers that die."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import get_worker_info

from jasper_store import errors
from jasper_store.errors import JasperStoreError, PerformanceWarning, WorkerDiedError
from jasper_store.jasper.loader import create_loader
from jasper_store.loading.epochs import set_epoch
from jasper_store.loading.options import warn_of_small_shared_memory
from jasper_store.loading.samplers import EpochSampler
from tests.builders import build_pt_dataset
from tests.jasper.fakes import Numbers, as_is

METHODS = ["fork", "spawn", "forkserver"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pt_dataset(tmp_path_factory.mktemp("workers") / "data", n_pairs=60)


def samples(loader: Any) -> list[tuple[float, int]]:
    return [
        (float(value), int(variant))
        for batch in loader
        for value, variant in zip(batch["relevance"], batch["steering_variant"], strict=True)
    ]


@pytest.mark.parametrize("method", METHODS)
def test_epochs_steering_and_negatives_reach_persistent_workers(data: Path, tmp_path: Path, method: str) -> None:
    data = Path(shutil.copytree(data, tmp_path / "data"))
    # An interpreter that imports PyTorch takes seconds: one will do where fork is not used.
    count = 2 if method == "fork" else 1
    alone = create_loader(data, "train", 5)
    loader = create_loader(data, "train", 5, count, persistent_workers=True, multiprocessing_context=method)
    pids = set()
    for epoch in (0, 30, 7):
        set_epoch(alone, epoch)
        set_epoch(loader, epoch)
        assert samples(loader) == samples(alone)
        pids.add(tuple(worker.pid for worker in loader._iterator._workers))  # type: ignore[union-attr]
    assert len(pids) == 1
    set_epoch(loader, 8)
    loader.dataset_obj.force_steering("residual")
    assert {variant for _, variant in samples(loader)} == {3}
    mined = torch.load(data / "hard_negatives.pt", weights_only=True).roll(1, dims=0)
    torch.save(mined, tmp_path / "mined.pt")
    (tmp_path / "mined.pt").replace(data / "hard_negatives.pt")
    loader.dataset_obj.reload_negatives()
    set_epoch(loader, 9)
    set_epoch(alone, 9)
    before, after = ([batch["negative_embs"] for batch in one] for one in (alone, loader))
    assert not torch.equal(torch.cat(before), torch.cat(after))
    fresh = create_loader(data, "train", 5, epoch=9)
    assert torch.equal(torch.cat([batch["negative_embs"] for batch in fresh]), torch.cat(after))
    assert pids == {tuple(worker.pid for worker in loader._iterator._workers)}  # type: ignore[union-attr]


@pytest.mark.parametrize("prefetch", [1, 4])
def test_workers_serve_the_rest_of_an_epoch(data: Path, prefetch: int) -> None:
    whole = samples(create_loader(data, "train", 4, drop_last=False))
    loader = create_loader(data, "train", 4, 2, drop_last=False, prefetch_factor=prefetch)
    iterator = iter(loader)
    first = samples([next(iterator), next(iterator)])
    state = loader.state_dict()
    assert state["consumed"] == 8
    rest = create_loader(data, "train", 3, 2, drop_last=False, use_mmap=True, persistent_workers=True)
    rest.load_state_dict(state)
    assert first + samples(rest) == whole
    set_epoch(rest, 1)
    assert samples(rest) == samples(create_loader(data, "train", 3, drop_last=False, epoch=1))


def test_a_persistent_pass_may_be_abandoned(data: Path) -> None:
    loader = create_loader(data, "train", 4, 2, persistent_workers=True)
    next(iter(loader))
    next(iter(loader))
    assert samples(loader) == samples(create_loader(data, "train", 4))


def test_an_abandoned_pass_takes_its_workers_with_it(data: Path) -> None:
    before = workers()
    loader = create_loader(data, "train", 4, 2)
    iterator = iter(loader)
    next(iterator)
    assert len(workers() - before) == 2
    del iterator
    assert workers() <= before
    loader = create_loader(data, "train", 4, 2, persistent_workers=True)
    iterator = iter(loader)
    next(iterator)
    del iterator, loader
    assert workers() <= before


def mark(worker: int) -> None:
    """The user's own initialisation, importable by spawned workers."""
    info = get_worker_info()
    assert info is not None
    dataset: Any = info.dataset
    dataset.marked = worker


class Marked(Numbers):
    marked = -1

    def __getitems__(self, indices: Any) -> torch.Tensor:
        return torch.full((len(indices),), self.marked)


def test_the_users_worker_init_fn_is_called() -> None:
    from jasper_store.loading.loader import Loader

    dataset: Any = Marked(20)
    loader = Loader(
        dataset, 5, sampler=EpochSampler(dataset, 1, 0), num_workers=2, collate_fn=as_is, worker_init_fn=mark
    )
    assert [batch[0].item() for batch in loader] == [0, 1, 0, 1]


def test_workers_are_measured(data: Path) -> None:
    loader = create_loader(data, "train", 4, 1, persistent_workers=True)
    list(loader)
    set_epoch(loader, 1)
    list(loader)
    text = loader.advice()
    assert text.startswith(f"{len(loader)} batches")
    assert "in 1 worker," in text


def test_a_loader_reaches_a_new_process_small(tmp_path: Path) -> None:
    """What spawn and forkserver send to a worker, whatever the size of the data."""
    sizes = []
    for pairs in (60, 6000):
        loader = create_loader(build_pt_dataset(tmp_path / str(pairs), n_pairs=pairs), "train", 16, use_mmap=False)
        next(iter(loader))
        sizes.append(len(pickle.dumps((loader.dataset_obj, loader.collate_fn))))
    assert max(sizes) < 64 << 10
    assert abs(sizes[1] - sizes[0]) < 1 << 10


# --- workers that die --------------------------------------------------------------------------------------------


def workers() -> set[int]:
    """Child processes that are alive, dead ones that nobody has waited for included."""
    return {child.pid for child in psutil.Process().children()}


class Deadly(Numbers):
    """Ends the worker that is asked for sample 13, as soon as the file is there."""

    def __init__(self, n: int, how: str, may_die: Path) -> None:
        super().__init__(n)
        self.how = how
        self.may_die = may_die

    def __getitems__(self, indices: Any) -> torch.Tensor:
        if 13 in indices and get_worker_info() is not None:
            while not self.may_die.exists():
                time.sleep(0.01)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(3)
        return super().__getitems__(indices)


def shared(pids: set[int]) -> list[str]:
    """Names of shared memory that these processes have left behind; PyTorch puts the process into the name."""
    return [path.name for path in Path("/dev/shm").glob("*") if any(f"_{pid}_" in path.name for pid in pids)]


@pytest.mark.parametrize(
    ("how", "said", "method", "persistent"),
    [
        ("kill", "was ended by SIGKILL", "fork", False),
        ("kill", "was ended by SIGKILL", "fork", True),
        ("exit", "exited with status 3", "fork", False),
        ("exit", "exited with status 3", "fork", True),
        ("exit", "exited with status 3", "spawn", False),
        pytest.param("kill", "was ended by SIGKILL", "forkserver", True, marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_dies_is_named_and_leaves_nothing(
    how: str, said: str, method: str, persistent: bool, tmp_path: Path
) -> None:
    from jasper_store.loading.loader import Loader

    before = workers()
    may_die = tmp_path / "may_die"
    dataset: Any = Deadly(60, how, may_die)
    loader = Loader(
        dataset,
        4,
        sampler=EpochSampler(dataset, 1, 0, shuffle=False),
        num_workers=2,
        persistent_workers=persistent,
        collate_fn=as_is,
        multiprocessing_context=method,
    )
    batches = iter(loader)
    next(batches)
    may_die.touch()  # not before: a worker that comes up late would find the other one dead already
    pids = {worker.pid for worker in batches._batches._workers}
    assert len(pids) == 2
    with pytest.raises(WorkerDiedError, match=rf"worker 1 \(pid \d+\) {said}.*num_workers=0") as caught:
        list(batches)
    assert isinstance(caught.value, JasperStoreError)
    assert isinstance(caught.value, RuntimeError)
    assert caught.value.__cause__ is not None
    # Its traceback would hold this frame, and so the loader, until the collector comes by and stops its workers slowly.
    del caught, batches
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not shared(pids)
    if method == "fork":  # the others leave a server, or a tracker, that serves the whole process
        assert workers() <= before
    # The loader can be used again.
    dataset.n = 13
    loader.sampler_obj.__init__(dataset, 1, 0, shuffle=False)  # type: ignore[misc]
    assert len(list(loader)) == 4


def test_other_errors_of_workers_pass_as_they_are(data: Path) -> None:
    loader = create_loader(data, "train", 4, 1, collate_fn=fail)
    try:
        list(loader)
    except ZeroDivisionError:
        return
    pytest.fail("the worker's error was swallowed")


def fail(batch: Any) -> Any:
    """A collation that cannot work."""
    return len(batch) / 0


# --- shared memory -----------------------------------------------------------------------------------------------


def test_small_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    with pytest.warns(PerformanceWarning, match="--shm-size"):
        warn_of_small_shared_memory(10 << 20, 4, {"collate_fn": as_is})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_small_shared_memory(10 << 20, 0, {})
        warn_of_small_shared_memory(10 << 20, 2, {"collate_fn": as_is})
        warn_of_small_shared_memory(10 << 20, 4, {"collate_fn": as_is, "prefetch_factor": 1})
        if hasattr(os, "memfd_create"):  # the default collation's batches travel without
            warn_of_small_shared_memory(10 << 20, 4, {})


def test_a_loader_with_workers_looks_at_shared_memory(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 10))
    with pytest.warns(PerformanceWarning, match=r"/dev/shm has 1\.00 KiB free.*--shm-size=8g.*or num_workers=0"):
        create_loader(data, "train", 16, 2, collate_fn=as_is)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_loader(data, "train", 16)


def test_without_shared_memory_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(shutil, "disk_usage", absent)
    warn_of_small_shared_memory(1 << 60, 4, {"collate_fn": as_is})


def test_the_error_survives_a_trip_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(WorkerDiedError("worker 1 (pid 7) exited with status 3")))
    assert type(error) is WorkerDiedError is errors.WorkerDiedError
    assert str(error) == "worker 1 (pid 7) exited with status 3"
    assert "WorkerDiedError" in errors.__all__


def test_a_death_that_is_noticed_while_waiting_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection breaks first, and PyTorch's signal handler speaks up in the middle of our waiting."""
    from types import SimpleNamespace

    from jasper_store.loading import workers as module

    process = SimpleNamespace(pid=7, exitcode=None)
    batches = SimpleNamespace(_workers=[process], _shutdown_workers=lambda: None)

    def handler(_: float) -> None:
        process.exitcode = 3
        raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 3.")

    monkeypatch.setattr("time.sleep", handler)
    with pytest.raises(WorkerDiedError, match=r"worker 0 \(pid 7\) exited with status 3"):
        module.raise_if_worker_died(ConnectionResetError(), batches)


def test_a_spawned_worker_that_cannot_open_the_dataset_says_why(data: Path, tmp_path: Path) -> None:
    """It said only that it exited with status 1."""
    moved = Path(shutil.copytree(data, tmp_path / "data"))
    loader = create_loader(moved, "train", 5, 1, multiprocessing_context="spawn")
    shutil.rmtree(moved)
    with pytest.raises(
        WorkerDiedError, match=r"exited with status 1, because a new process cannot open the dataset: .*"
    ):
        list(loader)


def test_an_iterator_that_a_later_one_ended_says_so(data: Path) -> None:
    """PyTorch gives both the same iterator, which serves the later epoch to whichever asks."""
    loader = create_loader(data, "train", 4, 1, persistent_workers=True)
    first = iter(loader)
    next(first)
    second = iter(loader)
    set_epoch(loader, 1)
    next(second)
    with pytest.raises(errors.IncompatibleOptionsError, match="persistent workers serve one at a time"):
        next(first)
    assert 1 + len(list(second)) == len(loader)
    set_epoch(loader, 2)
    assert len(list(loader)) == len(loader)
    with pytest.raises(StopIteration):
        next(second)
