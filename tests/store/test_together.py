"""Rows of several tensors taken at once are the rows taken one by one, with the kernel and without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from jasper_store.errors import ClosedError
from jasper_store.native import gather
from jasper_store.native.gather import source_of
from jasper_store.store.compiled_gather import INPUT, CompiledGather, IndexRef, Step
from jasper_store.store.gather_many import GatherRequest, gather_many
from jasper_store.store.opening import open_store
from jasper_store.store.store import TensorStore

needs_kernel = pytest.mark.skipif(gather.kernel() is None, reason="the kernel was not built: no C compiler here")


@pytest.fixture(params=["kernel", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(gather, "kernel", lambda: None)
    elif gather.kernel() is None:
        pytest.skip("the kernel was not built: no C compiler here")
    return str(request.param)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    np.save(tmp_path / "embs.npy", rng.random((60, 96), dtype=np.float32))
    np.save(tmp_path / "ids.npy", rng.integers(0, 60, (40, 3), dtype=np.int32))
    np.save(tmp_path / "words.npy", rng.integers(0, 2**16, (40,), dtype=np.uint16))
    np.save(tmp_path / "scores.npy", rng.random(40))
    return tmp_path


def opened(directory: Path, placement: str) -> TensorStore:
    if placement == "hybrid":
        return open_store(directory, memory_limit=8000)
    return open_store(directory, use_mmap=placement == "mapped")


@pytest.mark.parametrize("placement", ["mapped", "ram", "hybrid"])
def test_together_is_one_by_one(way: str, directory: Path, placement: str) -> None:
    with opened(directory, placement) as store:
        rows = torch.randint(0, 40, (500,))
        wanted = [
            GatherRequest(store["embs"], rows),
            GatherRequest(store["ids"], rows, torch.int64),
            GatherRequest(store["ids"], rows.flip(0)),
            GatherRequest(store["words"], rows, torch.int64),
            GatherRequest(store["scores"], rows),
            GatherRequest(source_of(torch.arange(40, dtype=torch.int8)), rows, torch.int64),
            GatherRequest(store["embs"], torch.empty(0, dtype=torch.int64)),
        ]
        for take, found in zip(wanted, gather_many(wanted), strict=True):
            whole = take.tensor.tensor if isinstance(take.tensor, tuple) else take.tensor.tensor()
            expected = torch.from_numpy(whole.numpy()[take.rows.numpy()])
            assert torch.equal(found, expected if take.dtype is None else expected.to(take.dtype))
            assert found.dtype == (take.dtype or whole.dtype)


@pytest.mark.parametrize("placement", ["mapped", "ram"])
def test_an_error_names_tensor_place_and_row(way: str, directory: Path, placement: str) -> None:
    with opened(directory, placement) as store:
        takes = [
            GatherRequest(store["embs"], torch.tensor([1, 2])),
            GatherRequest(store["ids"], torch.tensor([3, 40, 1]), torch.int64),
        ]
        with pytest.raises(IndexError, match="ids: row 40 at position 1 is out of range: its 40 rows are 0 to 39"):
            gather_many(takes)


def test_a_table_out_of_range(way: str) -> None:
    with pytest.raises(IndexError):
        gather_many([GatherRequest(source_of(torch.ones(3)), torch.tensor([0, 3]))])


def test_a_closed_store_says_so(way: str, directory: Path) -> None:
    store = opened(directory, "ram")
    tensor = store["embs"]
    store.close()
    with pytest.raises(ClosedError):
        gather_many([GatherRequest(tensor, torch.tensor([0]))])


def chain(embs: torch.Tensor, ids: torch.Tensor, first: torch.Tensor) -> CompiledGather:
    ints = torch.int64
    return CompiledGather(
        [
            Step("first", source_of(first), INPUT, ints, result=False),
            Step("ids", source_of(ids), IndexRef(0), ints, result=False),
            Step("embs", source_of(embs), IndexRef(1), embs.dtype),
            Step("embs", source_of(embs), IndexRef(1, 2), embs.dtype),
            Step("ids", source_of(ids), IndexRef(0), ints),
            Step("first", source_of(first), INPUT, ints),
        ]
    )


@needs_kernel
@pytest.mark.parametrize("size", [0, 1, 2, 255, 256, 5000])
def test_a_chain_follows_rows_from_tensor_to_tensor(size: int) -> None:
    embs = torch.randn(50, 33)
    ids = torch.randint(0, 50, (30, 3), dtype=torch.int32)
    first = torch.randint(0, 30, (100,), dtype=torch.int16)
    made = chain(embs, ids, first)
    for _ in range(2):
        wanted = torch.randint(0, 100, (size * 2,))[::2]
        all_rows, third, found_ids, firsts = made.run(wanted)
        pairs = first[wanted].long()
        assert torch.equal(all_rows, embs[ids[pairs].long()])
        assert all_rows.shape == (size, 3, 33)
        assert torch.equal(third, embs[ids[pairs][:, 2].long()])
        assert torch.equal(found_ids, ids[pairs].long())
        assert torch.equal(firsts, pairs)


@needs_kernel
def test_a_chain_says_which_step_named_a_row_that_is_not_there() -> None:
    embs, first = torch.randn(50, 33), torch.tensor([0, 1, 2])
    ids = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 50, 7]])
    made = chain(embs, ids, first)
    with pytest.raises(IndexError, match="first: row 3 at position 1 is out of range"):
        made.run(torch.tensor([0, 3]))
    with pytest.raises(IndexError, match="embs: row 50 at position 4 is out of range: its 50 rows are 0 to 49"):
        made.run(torch.tensor([1, 2]))
    assert len(made.run(torch.tensor([0, 1]))) == 4
