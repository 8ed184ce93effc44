"""Batches that workers make in shared memory are the batches made without workers, however they are kept, and leave nothing."""

from __future__ import annotations

import copy
import gc
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, default_collate, get_worker_info

import jasper_store as js
from jasper_store.loading.worker_gathers import batches_per_unit
from jasper_store.paging import shared_blocks
from jasper_store.samples import shared_batch
from tests.builders import build_pt_dataset

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memory without a name")

Batches = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pt_dataset(tmp_path_factory.mktemp("shared") / "data", n_pairs=700, dim=24)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared") / "ragged"
    with js.DatasetWriter(path) as writer:
        writer.append("emb", torch.randn(300, 5))
        # One list is far longer than the mean, so that the batch that has it does not fit its block.
        writer.append_ragged("ids", [torch.arange(6_000 if row == 123 else row % 4) for row in range(300)])
    return path


def assert_same(found: Batches, wanted: Batches) -> None:
    """At the end of an epoch: a block that was filled again while a batch was kept would show."""
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert type(mine) is dict
        assert list(mine) == list(theirs)
        for key, value in theirs.items():
            assert mine[key].dtype == value.dtype
            assert torch.equal(mine[key], value), key


@pytest.mark.parametrize(
    ("workers", "method", "drop_last"),
    # An interpreter that imports PyTorch takes seconds.
    [(1, "fork", True), (2, "fork", True), (2, "fork", False), (4, "fork", False), (2, "spawn", False)],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_kept_batches_stay_what_they_are(data: Path, workers: int, method: str, drop_last: bool) -> None:
    options: dict[str, Any] = {"drop_last": drop_last, "use_mmap": False}
    loader = js.create_loader(
        data, "train", 9, workers, persistent_workers=True, multiprocessing_context=method, **options
    )
    alone = js.create_loader(data, "train", 9, **options)
    for epoch in (0, 31):
        js.set_epoch(loader, epoch)
        js.set_epoch(alone, epoch)
        assert_same(list(loader), list(alone))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_kept_batches_of_a_plain_dataloader(data: Path, method: str) -> None:
    dataset = js.JASPERSteeringDataset(data, "train", use_mmap=True)
    workers = 2 if method == "fork" else 1
    loader = DataLoader(dataset, 7, num_workers=workers, multiprocessing_context=method, persistent_workers=True)
    wanted = list(DataLoader(dataset, 7))
    first = list(loader)
    assert_same(list(loader), wanted)
    assert_same(first, wanted)


@pytest.mark.parametrize("loader", ["plain", "created"])
def test_ragged_batches(ragged: Path, loader: str) -> None:
    dataset = js.Dataset(ragged)
    wanted = list(DataLoader(dataset, 16))
    if loader == "plain":
        found = list(DataLoader(dataset, 16, num_workers=2))
    else:
        found = list(js.create_loader(dataset, batch_size=16, num_workers=2, shuffle=False, drop_last=False))
    assert_same(found, wanted)


def test_a_batch_of_whole_batches(data: Path) -> None:
    dataset = js.JASPERSteeringDataset(data, "train")
    sampler = BatchSampler(SequentialSampler(range(len(dataset))), 8, drop_last=False)
    wanted = list(DataLoader(dataset, 8))
    found = list(DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=2))
    assert_same(found, wanted)


def test_what_is_set_during_an_epoch_holds_from_the_next_batch_on(data: Path) -> None:
    loader = js.create_loader(data, "train", 10, 2, persistent_workers=True)
    alone = js.create_loader(data, "train", 10)
    pairs = zip(loader, alone, strict=True)
    for mine, theirs in (next(pairs) for _ in range(3)):
        assert_same([mine], [theirs])
    for one in (loader, alone):
        one.dataset_obj.force_steering("residual")
    assert_same(*map(list, zip(*pairs, strict=True)))


def test_a_pass_goes_on_in_the_middle_of_a_unit(data: Path) -> None:
    loader = js.create_loader(data, "train", 8, 2, drop_last=False)
    wanted = list(js.create_loader(data, "train", 8, drop_last=False))
    batches = iter(loader)
    given = [next(batches) for _ in range(5)]
    state = json.loads(json.dumps(loader.state_dict()))
    rest = js.create_loader(data, "train", 8, 1, drop_last=False)
    rest.load_state_dict(state)
    assert_same(given + list(rest), wanted)


def test_ranks_with_workers_share_an_epoch(data: Path) -> None:
    for rank in range(2):
        options: dict[str, Any] = {"rank": rank, "world_size": 2, "drop_last": False}
        assert_same(
            list(js.create_loader(data, "train", 8, 2, **options)), list(js.create_loader(data, "train", 8, **options))
        )


def test_writing_to_a_batch_troubles_no_gradient_and_no_other_batch(data: Path) -> None:
    dataset = js.JASPERSteeringDataset(data, "train")
    for loader in (DataLoader(dataset, 10, num_workers=1), js.create_loader(data, "train", 10, 1, shuffle=False)):
        batches = iter(loader)
        first, second = next(batches), next(batches)
        kept = {key: value.clone() for key, value in first.items()}
        weights = torch.ones(24, requires_grad=True)
        loss = (first["question_emb"] * weights).pow(2).sum()
        first["target_source_emb"].zero_()  # with a version counter in common, backward() would refuse
        for value in second.values():
            value.zero_()
        loss.backward()
        del kept["target_source_emb"], first["target_source_emb"]
        assert_same([first], [kept])


# --- what users do in a worker --------------------------------------------------------------------------------------


def more(samples: Any) -> Any:
    """A collation that adds a tensor, drops one, and makes another narrower."""
    batch = default_collate(samples)
    del batch["relevance"]
    batch["question_emb"] = batch["question_emb"].half()
    batch["columns"] = batch["target_source_emb"][:, ::2]
    return batch | {"worker": "a text"}


def test_a_collation_that_changes_the_batch(data: Path) -> None:
    dataset = js.JASPERSteeringDataset(data, "train")
    wanted = list(DataLoader(dataset, 7, collate_fn=more))
    found = list(DataLoader(dataset, 7, collate_fn=more, num_workers=2))
    texts = [batch.pop("worker") for batch in found]
    assert texts == [batch.pop("worker") for batch in wanted]
    assert_same(found, wanted)


_kept: list[Any] = []


def keep(samples: Any) -> Any:
    """A collation that keeps each batch in the worker, and says at the end whether one of them has changed."""
    batch = default_collate(samples)
    assert get_worker_info() is not None
    _kept.append((batch, {key: value.clone() for key, value in batch.items()}))
    changed = sum(not torch.equal(old[key], value) for old, copied in _kept for key, value in copied.items())
    return {"changed": torch.tensor(changed), "pickled": len(pickle.loads(pickle.dumps(batch))), **copy.copy(batch)}


def test_a_worker_that_keeps_its_batches(data: Path) -> None:
    dataset = js.JASPERSteeringDataset(data, "train")
    found = list(DataLoader(dataset, 5, collate_fn=keep, num_workers=1))
    assert len(found) > shared_blocks._MAX_BLOCKS
    assert not any(int(batch.pop("changed")) for batch in found)
    assert {batch.pop("pickled") for batch in found} == {len(found[0])}
    assert_same(found, list(DataLoader(dataset, 5)))


# --- blocks ---------------------------------------------------------------------------------------------------------


class Sent:
    """Stands for the descriptor on its way through a queue."""

    def __init__(self, file: int) -> None:
        self.file = os.dup(file)

    def detach(self) -> int:
        return self.file


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> shared_blocks.SharedBlocks:
    monkeypatch.setattr("multiprocessing.reduction.DupFd", Sent)
    return shared_blocks.SharedBlocks()


def test_a_block_is_used_again_when_both_sides_are_through_with_it(blocks: shared_blocks.SharedBlocks) -> None:
    block = blocks.take(1000)
    assert block is not None
    made = block.tensor(1000).fill_(7)
    assert blocks.take(1000) is not block
    ticket = block.send(1000)
    assert ticket.file is not None
    del made
    assert blocks.take(1000) is not block  # it is on its way
    received = torch.frombuffer(shared_blocks.attach(ticket), dtype=torch.uint8)
    part = received[10:20]
    assert set(part.tolist()) == {7}
    del received
    assert not block.free
    del part
    assert blocks.take(1000) is block
    assert block.send(1000).file is None


def test_a_child_may_read_what_its_parent_gives_back(blocks: shared_blocks.SharedBlocks) -> None:
    block = blocks.take(1000)
    assert block is not None
    block.tensor(1000).fill_(7)
    batch = torch.frombuffer(shared_blocks.attach(block.send(1000)), dtype=torch.uint8)
    begin, go = os.pipe()
    answer, say = os.pipe()
    child = os.fork()
    if not child:  # only what a forked child may do
        os.read(begin, 1)
        os.write(say, bytes([len(set(bytes(batch.numpy())))]))
        os._exit(0)
    del batch
    gc.collect()
    assert block.retired
    again = blocks.take(1000)
    assert again is not None
    assert again is not block
    again.tensor(1000).random_(0, 255)
    os.write(go, b"x")
    assert os.read(answer, 1) == b"\x01"
    os.waitpid(child, 0)
    for descriptor in (begin, go, answer, say):
        os.close(descriptor)


def test_what_a_parent_holds_for_long_is_copied(blocks: shared_blocks.SharedBlocks) -> None:
    held = []
    for number in range(20):
        block = blocks.take(1000)
        assert block is not None
        block.tensor(1000).fill_(number)
        held.append(torch.frombuffer(shared_blocks.attach(block.send(1000)), dtype=torch.uint8))
    assert len(blocks._blocks) <= shared_blocks._MAX_HELD + 1
    assert [set(one.tolist()) for one in held] == [{number} for number in range(20)]


def test_a_ticket_that_another_process_should_have_got(blocks: shared_blocks.SharedBlocks) -> None:
    block = blocks.take(10)
    assert block is not None
    block.send(10)
    with pytest.raises(RuntimeError, match="received by the process that started it"):
        shared_blocks.attach(block.send(10))


def test_no_more_blocks_than_the_system_gives(
    blocks: shared_blocks.SharedBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert blocks.take(10) is None
    monkeypatch.setattr(shared_batch, "_own", (os.getpid(), blocks))
    space = shared_batch.BatchSpace(3, 8, ragged=False)
    values = space.empty((3,), torch.int64, 24).copy_(torch.arange(3))
    held = space.hold({"x": values, "y": torch.ones(2)})
    assert type(held) is dict
    assert held["x"].tolist() == [0, 1, 2]
    assert held["x"].untyped_storage().data_ptr() == held["y"].untyped_storage().data_ptr()  # one piece to send


def test_a_saved_batch_is_a_plain_one(blocks: shared_blocks.SharedBlocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_batch, "_own", (os.getpid(), blocks))
    held = shared_batch.BatchSpace(3, 8, ragged=False).hold({"x": torch.arange(3)})
    assert type(held) is shared_batch.SharedBatch
    file = io.BytesIO()
    torch.save(held, file)
    file.seek(0)
    assert torch.load(file)["x"].tolist() == [0, 1, 2]


def test_batches_per_unit() -> None:
    assert batches_per_unit(32, 12_000, 10_000, 4, None) == 20
    assert batches_per_unit(256, 12_000, 10_000, 4, None) == 2
    assert batches_per_unit(2048, 12_000, 10_000, 4, None) == 1
    assert batches_per_unit(4, 100, 24, 4, None) == 6
    assert batches_per_unit(32, 12_000, 10_000, 4, 32) == 8
    assert batches_per_unit(32, 12_000, 2, 4, None) == 1


# --- what is left, and what there is little of ----------------------------------------------------------------------


def memory_files() -> int:
    return sum("memfd:jasper_store" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("kind", ["plain", "created"])
def test_no_block_is_left_after_the_last_epoch(data: Path, kind: str) -> None:
    dataset = js.JASPERSteeringDataset(data, "train")
    loader: Any = (
        DataLoader(dataset, 8, num_workers=2) if kind == "plain" else js.create_loader(data, "train", 8, num_workers=2)
    )
    gc.collect()
    for epoch in range(3):
        js.set_epoch(loader, epoch)
        for batch in loader:
            assert batch
            assert memory_files()
        del batch
    assert memory_files() == 0


PROGRAM = """
import os, signal, sys
import jasper_store as js
from torch.utils.data import DataLoader

def main(data, how):
    loader = js.create_loader(data, "train", 8, 2, persistent_workers=True)
    batches = iter(loader)
    kept = [next(batches) for _ in range(3)]
    pids = [worker.pid for worker in loader._iterator._workers]
    print(*pids, flush=True)
    if how == "kill the trainer":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "kill a worker":
        sums = [batch["question_emb"].sum().item() for batch in kept]
        os.kill(pids[0], signal.SIGKILL)
        try:
            kept += list(batches)
        except js.errors.WorkerDiedError as exc:
            print("died:", f"worker 0 (pid {pids[0]}) was ended by SIGKILL" in str(exc))
        print("kept:", sums == [batch["question_emb"].sum().item() for batch in kept[:3]])
        print("again:", len(list(loader)) == len(loader))
    if how == "small limits":
        kept += list(batches)
        kept += list(DataLoader(loader.dataset_obj, 8, num_workers=2))
        alone = list(js.create_loader(data, "train", 8))
        print("same:", all((a["question_emb"] == b["question_emb"]).all() for a, b in zip(kept, alone)))

main(*sys.argv[1:])
"""


def run(data: Path, how: str, before: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(data), how]
    if before:
        command = ["sh", "-c", f'{before} && exec "$@"', "sh", *command]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def shared_files() -> set[str]:
    """Files in shared memory; semaphores of tests that run meanwhile come and go."""
    there = Path("/dev/shm").glob("*") if Path("/dev/shm").is_dir() else ()
    return {path.name for path in there if not path.name.startswith("sem.")}


@pytest.mark.parametrize("how", ["exit", "kill the trainer"])
def test_a_trainer_that_ends_in_the_middle_leaves_nothing(data: Path, how: str) -> None:
    before = shared_files()
    done = run(data, how)
    assert done.returncode == (0 if how == "exit" else -signal.SIGKILL), done.stderr
    assert not done.stderr.strip()
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    # A killed trainer's workers notice within PyTorch's five seconds.
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20)
    assert not alive
    if how == "exit":
        assert shared_files() <= before


def test_a_worker_that_is_killed_is_named_and_its_batches_stay(data: Path) -> None:
    done = run(data, "kill a worker")
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()[1:]] == ["True", "True", "True"]


def test_few_descriptors_are_enough(data: Path) -> None:
    done = run(data, "small limits", "ulimit -n 64")
    assert done.stdout.endswith("same: True\n"), done.stderr


@pytest.mark.root
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root may mount a small /dev/shm")
def test_little_shared_memory_is_enough(tmp_path: Path) -> None:
    """Containers have 64 MB; here it is one, and a batch alone has more."""
    data = build_pt_dataset(tmp_path / "data", n_pairs=2000, n_questions=900, n_sources=900, dim=256)
    program = (
        textwrap.dedent(PROGRAM)
        .replace('"train", 8', '"train", 256')
        .replace("loader.dataset_obj, 8", "loader.dataset_obj, 256")
    )
    script = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    command = [
        "unshare",
        "-m",
        "sh",
        "-c",
        script,
        "sh",
        sys.executable,
        "-W",
        "ignore",
        "-c",
        program,
        str(data),
        "small limits",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    assert done.stdout.endswith("same: True\n"), done.stderr
