"""A block order whose steering rows are read ahead serves what it serves without, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from jasper_store.errors import CorruptFileError
from jasper_store.jasper.loader import create_loader
from jasper_store.jasper.schema import STEERING_TENSORS
from jasper_store.loading import coalescing as assembly, defaults as choices, prefetcher as lookahead, samplers
from jasper_store.loading.loader import Loader
from jasper_store.loading.order import BlockOrder
from jasper_store.loading.window_prefetcher import WindowPrefetcher
from jasper_store.native import gather
from jasper_store.samples.reader import SampleReader
from jasper_store.store import assignment
from tests.builders import build_pt_dataset

BLOCK, WINDOW = 8, 4


@pytest.fixture(scope="module", params=[1, 5, 33, 64, 65, 203])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = int(request.param) + 20  # the other splits get some
    return build_pt_dataset(tmp_path_factory.mktemp("staged") / "data", n_pairs=pairs, dim=16)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if gather.kernel() is None:
        pytest.skip("the kernel was not built: no C compiler here")
    try:
        (tmp_path / "probe").write_bytes(b"x" * 4096)
        os.close(os.open(tmp_path / "probe", os.O_RDONLY | os.O_DIRECT))
    except (OSError, AttributeError):
        pytest.skip("this file system does not read directly")
    small = partial(BlockOrder, block=BLOCK, window=WINDOW)
    monkeypatch.setattr(samplers, "_ORDERS", {**samplers._ORDERS, "block": small})
    monkeypatch.setattr(assembly, "_SAMPLES", BLOCK)
    monkeypatch.setattr(lookahead, "GROUP_SAMPLES", BLOCK)
    monkeypatch.setattr(choices, "_staged_nbytes", lambda _: 0)
    # What a plan does for data of some gigabytes, where index tensors are small.
    monkeypatch.setattr(
        assignment, "_choose", lambda items, must, _: must | {i.name for i in items} - set(STEERING_TENSORS)
    )
    monkeypatch.setattr(choices, "_mapped_and_left", lambda _: (2, 1))


def staged_loader(data: Path, batch_size: int = 7, **options: Any) -> Loader:
    """Steering tensors are mapped, some or all, and do not fit."""
    options = {"order": "block", "memory_limit": 100_000, "drop_last": False, **options}
    loader = create_loader(data, "train", batch_size, **options)
    mapped = {e.name for e in loader.dataset_obj.store.plan.entries if e.placement == "mmap" and e.reads_per_sample > 0}
    assert mapped
    assert mapped <= set(STEERING_TENSORS)
    assert loader._prefetcher is not None
    assert loader._prefetcher.stage
    return loader


def plain_loader(data: Path, batch_size: int = 7, **options: Any) -> Loader:
    options = {"order": "block", "use_mmap": False, "drop_last": False, **options}
    return create_loader(data, "train", batch_size, **options)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def same(first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("epoch", [0, 40])
def test_batches_are_the_same(data: Path, batch_size: int, epoch: int) -> None:
    loader, plain = staged_loader(data, batch_size, epoch=epoch), plain_loader(data, batch_size, epoch=epoch)
    for number in range(2):
        loader.set_epoch(epoch + number)
        plain.set_epoch(epoch + number)
        assert same(list(loader), list(plain))


@pytest.mark.parametrize("epoch", [0, 40])
def test_every_batch_is_one_call(data: Path, epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def step_by_step(*_: Any) -> None:
        raise AssertionError("a batch went step by step")

    loader = staged_loader(data, epoch=epoch)
    monkeypatch.setattr(SampleReader, "resolve", step_by_step)
    assert len(list(loader)) == len(loader)
    assert "steering: read past the page cache" in loader.explain()


def test_batches_that_are_larger_than_a_window_are_not_staged(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def staged(*_: Any) -> None:
        raise AssertionError("rows were staged that are forgotten before they are needed")

    loader = staged_loader(data, BLOCK * WINDOW)
    monkeypatch.setattr(lookahead, "direct_readers_for", staged)
    assert same(list(loader), list(plain_loader(data, BLOCK * WINDOW)))


def test_questions_that_are_mapped_go_step_by_step(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    real = WindowPrefetcher.rows

    def rows(self: WindowPrefetcher, *arguments: Any) -> Any:
        found.append(real(self, *arguments))
        return found[-1]

    monkeypatch.setattr(WindowPrefetcher, "rows", rows)
    monkeypatch.setattr(WindowPrefetcher, "batch", lambda *_: None)
    loader = staged_loader(data, epoch=40)
    assert same(list(loader), list(plain_loader(data, epoch=40)))
    assert found
    assert all(len(rows) == 1 for rows in found)


def test_resuming_within_a_window(data: Path) -> None:
    whole = list(plain_loader(data, 7))
    for served in range(0, len(whole), max(1, len(whole) // 25)):
        first = staged_loader(data, 7)
        list(itertools.islice(first, served))
        state = first.state_dict()
        second = staged_loader(data, 7)
        second.load_state_dict(state)
        assert same(list(second), whole[served:])


@pytest.mark.parametrize("padding", ["wrap", "none"])
def test_two_ranks(data: Path, padding: Any) -> None:
    for rank in range(2):
        options = {"rank": rank, "world_size": 2, "padding": padding}
        assert same(list(staged_loader(data, 5, **options)), list(plain_loader(data, 5, **options)))


def test_a_variant_that_is_forced_meanwhile(data: Path) -> None:
    loader, plain = staged_loader(data, 3, epoch=15), plain_loader(data, 3, epoch=15)
    found, wanted = [], []
    for number, (batch, expected) in enumerate(zip(loader, plain, strict=True)):
        found.append(batch)
        wanted.append(expected)
        if number == 2:
            loader.dataset_obj.force_steering("residual")
            plain.dataset_obj.force_steering("residual")
    assert same(found, wanted)


def test_an_abandoned_pass_leaves_no_thread_and_no_file(data: Path) -> None:
    loader = staged_loader(data, 2)
    next(iter(loader))
    gc.collect()
    files, threads = open_files(), threading.active_count()
    for _ in range(3):
        batches = iter(loader)
        next(batches)
        del batches
        gc.collect()
    assert open_files() == files
    assert threading.active_count() == threads


def test_two_passes_at_once(data: Path) -> None:
    loader = staged_loader(data, 3)
    whole = list(plain_loader(data, 3))
    pairs = list(zip(iter(loader), iter(loader), strict=True))
    assert same([first for first, _ in pairs], whole)
    assert same([second for _, second in pairs], whole)


def test_a_file_that_is_cut_meanwhile_is_an_error(tmp_path: Path) -> None:
    data = build_pt_dataset(tmp_path / "data", n_pairs=4000, dim=64)
    loader = staged_loader(data, 7, epoch=40)
    batches = iter(loader)
    next(batches)
    for name in STEERING_TENSORS:
        os.truncate(data / f"{name}.pt", 5000)
    with pytest.raises(CorruptFileError, match="could not be read"):
        list(batches)


@pytest.mark.parametrize("order", ["block", "global"])
def test_an_iterator_that_is_alive_at_the_interpreters_end_says_nothing(tmp_path: Path, order: str) -> None:
    """Large enough for windows as they are, since this runs in a process of its own."""
    pairs = 30_000 if order == "block" else 2_000
    data = build_pt_dataset(tmp_path / "data", n_pairs=pairs, dim=16)
    limit = (pairs * 16 * 4 * 5) // 2
    code = (
        "import jasper_store as js, jasper_store.loading.defaults as choices\n"
        "choices._staged_nbytes = lambda _: 0\n"
        f"loader = js.create_loader({str(data)!r}, 'train', 64, order={order!r}, memory_limit={limit})\n"
        "batches = iter(loader)\n"
        "next(batches)\n"
        "print(batches._batches.gathers._indices.context.staged is not None, loader.dataset_obj.use_mmap)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.split() == [str(order == "block"), "True"]
    assert "Exception ignored" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("together", [True, False])
def test_integers_that_are_served_as_int64_are_so_where_they_are_staged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    data = build_pt_dataset(tmp_path / "data", n_pairs=100, dim=16)
    ids = torch.load(data / "pair_cluster_id.pt")
    torch.save(ids.to(torch.int32), data / "pair_cluster_id.pt")
    mapped = {"pair_cluster_id", "pair_relevance"}
    monkeypatch.setattr(assignment, "_choose", lambda items, must, _: must | {i.name for i in items} - mapped)
    if not together:
        monkeypatch.setattr(WindowPrefetcher, "batch", lambda *_: None)
    loader = create_loader(data, "train", 3, order="block", memory_limit=100_000, drop_last=False)
    assert "cluster_id, relevance: read past the page cache" in loader.explain()
    found = list(loader)
    assert {batch["cluster_id"].dtype for batch in found} == {torch.int64}
    assert same(found, list(plain_loader(data, 3)))


@pytest.mark.parametrize("order", ["block", "global"])
def test_a_forked_child_goes_on_with_an_iterator(data: Path, order: Literal["block", "global"]) -> None:
    """Its parent's helper and prefetching thread do not exist there; it said that the file was cut, or waited for ever."""
    loader = create_loader(data, "train", 2, order=order, memory_limit=100_000, drop_last=False, epoch=40)
    plain = list(plain_loader(data, 2, order=order, epoch=40))
    batches = iter(loader)
    first = [next(batches)]
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            signal.alarm(60)
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            os._exit(0 if same([*first, *batches], plain) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same([*first, *batches], plain)
