"""A stored tensor is a map-style dataset of torch's, at runtime and to type checkers: mypy --strict reads this file."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import ConcatDataset, DataLoader, Dataset, StackDataset, Subset

from jasper_store.store.opening import open_store
from jasper_store.store.store import TensorStore
from jasper_store.store.tensors import StoredTensor

EMBS = torch.arange(60.0).reshape(20, 3)
LABELS = torch.arange(20)


@pytest.fixture(params=[True, False], ids=["mapped", "resident"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TensorStore]:
    save_file({"emb": EMBS, "labels": LABELS, "scalar": torch.tensor(3.0)}, tmp_path / "a.safetensors")
    with open_store(tmp_path, use_mmap=request.param) as opened:
        yield opened


def test_a_data_loader_takes_several_tensors(store: TensorStore) -> None:
    pairs = StackDataset(emb=store["emb"], y=store["labels"])
    assert len(pairs) == 20
    batches = list(DataLoader(pairs, batch_size=8))
    assert torch.equal(torch.cat([batch["emb"] for batch in batches]), EMBS)
    assert torch.equal(torch.cat([batch["y"] for batch in batches]), LABELS)
    again = pickle.loads(pickle.dumps(pairs))
    assert torch.equal(again[7]["emb"], EMBS[7])


def test_a_batch_is_gathered_once(store: TensorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: Dataset[torch.Tensor] = store["emb"]
    taken = []
    take = type(rows).take  # type: ignore[attr-defined]

    def counted(self: StoredTensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = take(self, *args, **kwargs)
        taken.append(len(found))
        return found

    monkeypatch.setattr(type(rows), "take", counted)
    assert torch.equal(torch.cat(list(DataLoader(Subset(rows, range(4, 20)), batch_size=8))), EMBS[4:])
    assert taken == [8, 8]


def test_items_of_a_batch(store: TensorStore) -> None:
    items = store["emb"].__getitems__([3, -1, 3])
    assert torch.equal(torch.stack(items), EMBS[[3, -1, 3]])
    assert store["emb"].__getitems__([]) == []
    with pytest.raises(IndexError, match="emb"):
        store["emb"].__getitems__([20])
    with pytest.raises(IndexError, match="scalar"):
        store["scalar"].__getitems__([0])


def test_adding_puts_datasets_in_a_row_and_is_no_arithmetic(store: TensorStore) -> None:
    both: ConcatDataset[torch.Tensor] = store["emb"] + store["emb"]
    assert len(both) == 40
    assert torch.equal(both[25], EMBS[5])
    with pytest.raises(TypeError):
        store["emb"] + 1  # type: ignore[operator]


def test_a_stored_tensor_still_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        StoredTensor(None, "ram")  # type: ignore[abstract, arg-type]


def test_a_deep_copy_stays_where_the_tensor_lives(store: TensorStore) -> None:
    pairs = copy.deepcopy(StackDataset(emb=store["emb"], y=store["labels"]))
    assert copy.deepcopy(store["emb"]).placement == store["emb"].placement
    assert torch.equal(pairs[7]["emb"], EMBS[7])
