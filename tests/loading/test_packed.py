"""A loader reads packed samples in whole blocks, and serves what it serves from memory: ranks, batches, resuming, workers."""

from __future__ import annotations

import gc
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import jasper_store as js
from jasper_store.errors import CorruptFileError, IncompatibleOptionsError
from jasper_store.loading import coalescing, defaults, prefetcher, whole_blocks
from jasper_store.loading.loader import Loader
from jasper_store.loading.turn_order import TurnOrder
from jasper_store.native import gather
from jasper_store.samples.reader import SampleReader
from jasper_store.store import direct_blocks
from tests.builders import build_pt_dataset
from tests.loading.test_staged import open_files, same
from tests.packing.packs import small_blocks

Batches = list[dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Little is gathered at once, and memory is short."""
    if gather.kernel() is None:
        pytest.skip("the kernel was not built: no C compiler here")
    try:
        (tmp_path / "probe").write_bytes(b"x" * 4096)
        os.close(os.open(tmp_path / "probe", os.O_RDONLY | os.O_DIRECT))
    except (OSError, AttributeError):
        pytest.skip("this file system does not read directly")
    monkeypatch.setattr(coalescing, "_SAMPLES", 16)
    monkeypatch.setattr(prefetcher, "GROUP_SAMPLES", 16)
    monkeypatch.setattr(defaults, "_blocks_nbytes", lambda *_: 0)
    monkeypatch.setattr(defaults, "_mapped_and_left", lambda _: (2, 1))


@pytest.fixture(scope="module", params=[1, 15, 64, 65, 203, 1000])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    build_pt_dataset(root / "data", n_pairs=int(request.param) + 20, dim=16)
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch)
        js.pack(root / "data", root / "packed")
    return root / "packed"


def mapped(path: Path, batch_size: int = 7, **options: Any) -> Loader:
    return js.create_loader(path, "train", batch_size, memory_limit=20_000, **{"drop_last": False, **options})


def in_memory(path: Path, batch_size: int = 7, **options: Any) -> Loader:
    return js.create_loader(path, "train", batch_size, use_mmap=False, **{"drop_last": False, **options})


def n_blocks(loader: Loader) -> int:
    return -(-len(loader.dataset_obj) // 16)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 300])
@pytest.mark.parametrize("epoch", [0, 40])
def test_batches_are_those_from_memory(packed: Path, batch_size: int, epoch: int) -> None:
    loader, plain = mapped(packed, batch_size, epoch=epoch), in_memory(packed, batch_size, epoch=epoch)
    assert loader.order == plain.order == "block"
    for number in range(2):
        loader.set_epoch(epoch + number)
        plain.set_epoch(epoch + number)
        assert same(list(loader), list(plain))


def test_every_batch_is_one_call_on_blocks_read_whole(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = mapped(packed)
    if n_blocks(loader) < 2:
        pytest.skip("one block is no tensor in parts")

    def step_by_step(*_: Any) -> None:
        raise AssertionError("a batch went step by step")

    read: list[int] = []
    real = whole_blocks.WholeBlocks.begin

    def begin(self: whole_blocks.WholeBlocks, wanted: Any) -> Any:
        begun = real(self, wanted)
        read.append(len(begun[0][3]))
        return begun

    monkeypatch.setattr(SampleReader, "resolve", step_by_step)
    monkeypatch.setattr(whole_blocks.WholeBlocks, "begin", begin)
    assert len(list(loader)) == len(loader)
    assert sum(read) == n_blocks(loader)  # each block once
    assert "question_emb, target_source_emb, steering" in loader.explain()


def test_an_epoch_is_every_sample_once_in_another_order(packed: Path) -> None:
    loader = mapped(packed, 5)
    orders = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        orders.append(torch.cat([batch["relevance"] for batch in loader]).tolist())
    with js.JASPERSteeringDataset(packed, "train") as dataset:
        wanted = sorted(dataset[list(range(len(dataset)))]["relevance"].tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == wanted
    assert len(wanted) < 10 or orders[0] != orders[1]


def test_resuming_anywhere(packed: Path) -> None:
    whole = list(in_memory(packed, 7))
    for served in range(0, len(whole), max(1, len(whole) // 12)):
        first = mapped(packed, 7)
        list(itertools.islice(first, served))
        second = mapped(packed, 7)
        second.load_state_dict(first.state_dict())
        assert same(list(second), whole[served:])


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("padding", ["wrap", "none"])
def test_ranks(packed: Path, ranks: int, padding: Any) -> None:
    for rank in range(ranks):
        options = {"rank": rank, "world_size": ranks, "padding": padding}
        assert same(list(mapped(packed, 5, **options)), list(in_memory(packed, 5, **options)))


def test_ranks_that_change_meanwhile(packed: Path) -> None:
    """Two ranks begin, four go on: each sample once."""

    def some(rank: int, ranks: int, state: dict[str, Any] | None, count: int | None) -> tuple[Batches, dict[str, Any]]:
        loader = mapped(packed, 3, rank=rank, world_size=ranks, padding="none")
        if state is not None:
            loader.load_state_dict(state)
        return list(itertools.islice(loader, count)), loader.state_dict()

    begun = [some(rank, 2, None, 4) for rank in range(2)]
    rest = [some(rank, 4, begun[0][1], None)[0] for rank in range(4)]
    served = [batch["relevance"] for batches in (*(each for each, _ in begun), *rest) for batch in batches]
    whole = torch.cat([batch["relevance"] for batch in in_memory(packed, 7)])
    assert sorted(torch.cat(served).tolist()) == sorted(whole.tolist())


def test_workers(packed: Path) -> None:
    assert same(list(mapped(packed, 7, num_workers=2, epoch=40)), list(in_memory(packed, 7, epoch=40)))


def test_a_variant_that_is_forced_meanwhile(packed: Path) -> None:
    loader, plain = mapped(packed, 3, epoch=15), in_memory(packed, 3, epoch=15)
    found, wanted = [], []
    for number, (batch, expected) in enumerate(zip(loader, plain, strict=True)):
        found.append(batch)
        wanted.append(expected)
        if number == 2:
            loader.dataset_obj.force_steering("residual")
            plain.dataset_obj.force_steering("residual")
    assert same(found, wanted)


def test_tensors_of_variants_that_are_not_drawn_are_not_read(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = mapped(packed, 7, epoch=0)
    if n_blocks(loader) < 2:
        pytest.skip("one block is no tensor in parts")
    tables: list[Any] = []
    real = direct_blocks.block_table

    def table(tensors: Any) -> Any:
        tables.append(real(tensors))
        return tables[-1]

    monkeypatch.setattr(whole_blocks, "block_table", table)
    next(iter(loader))
    names = [tensor.name for tensor in tables[0].tensors]
    assert "steering_centroid" in names
    assert "steering_residual" not in names  # its probability is 0 in epoch 0


def test_columns_written_anew_are_read_from_their_file(tmp_path: Path) -> None:
    source = build_pt_dataset(tmp_path / "data", n_pairs=300, dim=16)
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch)
        js.pack(source, tmp_path / "packed")
        torch.save(torch.load(source / "negative_tiers.pt") + 1, source / "negative_tiers.pt")
        js.pack(source, tmp_path / "packed", columns=["negative_tiers", "negative_embs"])
    loader, plain = mapped(tmp_path / "packed"), in_memory(tmp_path / "packed")
    found = list(loader)
    assert same(found, list(plain))
    assert {int(batch["negative_tiers"].min()) for batch in found} == {1}


def test_an_abandoned_pass_leaves_no_file(packed: Path) -> None:
    loader = mapped(packed, 2)
    next(iter(loader))
    gc.collect()
    files = open_files()
    for _ in range(3):
        batches = iter(loader)
        next(batches)
        del batches
        gc.collect()
    assert open_files() == files


def test_two_passes_at_once(packed: Path) -> None:
    loader, whole = mapped(packed, 3), list(in_memory(packed, 3))
    pairs = list(zip(iter(loader), iter(loader), strict=True))
    assert same([first for first, _ in pairs], whole)
    assert same([second for _, second in pairs], whole)


def test_a_file_that_is_cut_meanwhile_is_an_error(tmp_path: Path) -> None:
    source = build_pt_dataset(tmp_path / "data", n_pairs=3000, dim=64)
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch)
        js.pack(source, tmp_path / "packed")
    batches = iter(mapped(tmp_path / "packed", 7))
    next(batches)
    os.truncate(tmp_path / "packed" / "part-000001" / "packed.safetensors", 1 << 20)
    with pytest.raises(CorruptFileError, match="could not be read"):
        list(batches)


def test_a_state_of_another_order_is_refused(packed: Path) -> None:
    loader = mapped(packed, 7, order="global")
    next(iter(loader))
    state = loader.state_dict()
    with pytest.raises(IncompatibleOptionsError):
        mapped(packed, 7, order="block").load_state_dict(state)


# --- the order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 64, 65, 200, 4096, 5000])
@pytest.mark.parametrize(("block", "window"), [(16, 4), (16, 1), (1, 8), (7, 5), (64, 32)])
def test_turns_are_an_order(n: int, block: int, window: int) -> None:
    first, second = TurnOrder(n, 1, 0, block, window), TurnOrder(n, 1, 1, block, window)
    whole = first[:].tolist()
    assert sorted(whole) == list(range(n))
    assert [first[place] for place in range(0, n, 37)] == whole[::37]
    assert first.at(torch.arange(n).flip(0)).flip(0).tolist() == whole
    assert n < 100 or whole != second[:].tolist()


def test_a_window_takes_its_blocks_in_turn_and_ranks_share_them() -> None:
    order = TurnOrder(64 * 16 * 5 + 3, 3, 2, 16, 8)
    for number in range(order.n_windows):
        start, stop = order.window_bounds(number)
        indices = order[start:stop]
        if len(indices) < 128:
            continue
        blocks = indices // 16
        for turn in blocks.view(-1, 8):
            assert len(set(turn.tolist())) == 8
        for ranks in (2, 4, 8):
            for rank in range(ranks):
                assert len(set(blocks[rank::ranks].tolist())) == 8 // ranks
        assert len(set((indices % 16)[::8].tolist())) == 16
        assert len({tuple((indices % 16)[k::8].tolist()) for k in range(8)}) > 1


def test_ranks_read_their_share_of_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build_pt_dataset(tmp_path / "data", n_pairs=2000, dim=16)
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch)
        js.pack(source, tmp_path / "packed")
    read: list[int] = []
    real = whole_blocks.WholeBlocks.begin

    def begin(self: whole_blocks.WholeBlocks, wanted: Any) -> Any:
        begun = real(self, wanted)
        read.append(len(begun[0][3]))
        return begun

    monkeypatch.setattr(whole_blocks.WholeBlocks, "begin", begin)
    for rank in range(4):
        list(mapped(tmp_path / "packed", 8, rank=rank, world_size=4, padding="none"))
    assert sum(read) < 1.2 * 1400 / 16
