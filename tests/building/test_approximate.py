"""Mining with an approximate index: what it finds, its measured recall, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import jasper_store as js
from jasper_store.building import approximate
from jasper_store.building.mining import MiningSettings, mine
from jasper_store.errors import IncompatibleOptionsError, InsufficientMemoryError
from tests.building.oracle import inputs_of
from tests.building.raw import raw
from tests.building.test_mining import PLENTY, larger, same

pytest.importorskip("faiss")


@pytest.mark.parametrize("clustered", [True, False])
@pytest.mark.parametrize("more", [{"relative_margin": None}, {"ranks": (2, 30)}, {"max_similarity": 0.2}])
def test_an_index_that_looks_everywhere_finds_what_is_exact(more: dict[str, object], clustered: bool) -> None:
    given = larger()  # 2 000 sources make 51 cells, fewer than are searched
    if not clustered:
        given.pop("pair_clusters")
    exact = mine(inputs_of(**given), MiningSettings(n_neg=6, **more), memory_limit=PLENTY)  # type: ignore[arg-type]
    found = mine(inputs_of(**given), MiningSettings(n_neg=6, method="faiss", **more), memory_limit=PLENTY)  # type: ignore[arg-type]
    assert same(found, exact)
    assert found.recall == 1.0
    assert exact.recall is None


def test_recall_is_that_of_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    given = larger()
    settings = MiningSettings(n_neg=6, tiers=(0, 0, 1, 0), relative_margin=None)
    exact = mine(inputs_of(**given), settings, memory_limit=PLENTY)
    monkeypatch.setattr(approximate, "_PROBED", 4)
    settings = MiningSettings(n_neg=6, tiers=(0, 0, 1, 0), relative_margin=None, method="faiss")
    found = mine(inputs_of(**given), settings, memory_limit=PLENTY)
    assert found.recall is not None
    shared = [len(np.intersect1d(*rows)) for rows in zip(found.negatives, exact.negatives, strict=True)]
    share = sum(shared) / exact.negatives.size
    assert 0.1 < share < 0.95
    assert abs(found.recall - share) < 0.15  # of longer lists, and of 256 of the 800 pairs
    # No rule is broken by what is approximate.
    pairs = given["pairs"]
    for question in np.unique(pairs[:, 0]):
        own = given["sources"][pairs[pairs[:, 0] == question, 1]]
        chosen = given["sources"][found.negatives[pairs[:, 0] == question]].reshape(-1, own.shape[1])
        assert not (chosen[:, None] == own[None]).all(axis=2).any()
    again = mine(inputs_of(**given), settings, memory_limit=PLENTY)
    assert same(again, found)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, settings = inputs_of(**larger()), MiningSettings(n_neg=6, method="faiss")
    with pytest.raises(InsufficientMemoryError, match="method='exact', which needs no index"):
        mine(inputs, settings, memory_limit=1 << 19)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(IncompatibleOptionsError, match=r"pip install jasper_store\[build\]"):
        mine(inputs, settings, memory_limit=PLENTY)


def test_a_dataset_is_mined_and_built_with_it(tmp_path: Path) -> None:
    report = js.build(tmp_path / "set", **raw(), mining={"method": "faiss"})
    assert report.mining["recall"] == 1.0
    mined = js.mine_negatives(tmp_path / "set", n_neg=4, method="faiss")
    assert mined.recall is not None
    assert f"faiss: found {mined.recall:.1%}" in str(mined)
    assert js.mine_negatives(tmp_path / "set", n_neg=4, method="faiss").recall == mined.recall
    exact = js.mine_negatives(tmp_path / "set", n_neg=4)
    assert not exact.existed
    assert exact.recall is None
    with js.open(tmp_path / "set") as store:
        assert store["hard_negatives"].tensor().dtype == torch.int64
