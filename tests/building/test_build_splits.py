"""Splits: by share, stratified by cluster, and no question, nor its duplicate, in two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import jasper_store as js
from jasper_store.building.splits import check_shares, divide
from jasper_store.errors import IntegrityError
from tests.building.raw import raw, values

SHARES = check_shares({"train": 0.8, "val": 0.1, "test": 0.1})


@settings(max_examples=40)
@given(
    st.integers(30, 400), st.integers(1, 9), st.integers(1, 60), st.integers(0, 5), st.sampled_from([0.1, 0.15, 0.3])
)
def test_a_split_has_its_share_of_the_groups_and_each_group_is_whole(
    pairs: int, clusters: int, questions: int, seed: int, held: float
) -> None:
    rng = np.random.default_rng(seed)
    groups = np.unique(rng.integers(0, questions, pairs), return_inverse=True)[1]
    found = divide(groups, rng.integers(0, clusters, pairs), {"train": 1 - held - 0.1, "val": held, "test": 0.1}, seed)
    together = np.sort(np.concatenate([rows.numpy() for rows in found.values()]))
    assert np.array_equal(together, np.arange(pairs))
    owned = {name: set(groups[rows.numpy()].tolist()) for name, rows in found.items()}
    assert not owned["train"] & owned["val"]
    assert not owned["val"] & owned["test"]
    assert not owned["train"] & owned["test"]
    count = groups.max() + 1
    for name, share in (("val", held), ("test", 0.1)):
        assert abs(len(owned[name]) - share * count) <= 1.5


def test_each_cluster_is_in_every_split_by_its_share() -> None:
    sizes = [1000, 200, 50, 40]
    clusters = np.repeat(np.arange(4), sizes)
    found = divide(np.arange(len(clusters)), clusters, SHARES, 0)
    for cluster, size in enumerate(sizes):
        for name, share in SHARES.items():
            here = int((clusters[found[name]] == cluster).sum())
            assert abs(here - share * size) <= 2, (cluster, name)


def test_duplicates_of_a_question_stay_together(tmp_path: Path) -> None:
    inputs = raw(questions=60, sources=80, pairs=150)
    # Every second question has the bytes of the one before it.
    inputs["questions"][1::2] = inputs["questions"][::2]
    report = js.build(tmp_path / "set", **inputs)
    assert report.counts["duplicate_questions"] == 30
    found = values(tmp_path / "set")
    asked = [set((inputs["pairs"][found[f"{split}_idx"], 0] // 2).tolist()) for split in ("train", "val", "test")]
    assert not asked[0] & asked[1]
    assert not asked[0] & asked[2]
    assert not asked[1] & asked[2]


def forms(count: int) -> dict[str, Any]:
    numbers = np.zeros(count, int)
    numbers[::5], numbers[1::5] = 1, 2
    names = np.array(["train", "val", "test"])[numbers]
    rows = {name: np.flatnonzero(names == name) for name in ("train", "val", "test")}
    return {"numbers": numbers, "names": names, "list": names.tolist(), "rows": rows}


@pytest.mark.parametrize("form", ["numbers", "names", "list", "rows"])
def test_splits_that_are_given(tmp_path: Path, form: str) -> None:
    inputs = raw()
    given_ = forms(len(inputs["pairs"]))
    js.build(tmp_path / "set", **inputs, splits=given_[form], shared_questions=True)
    found = values(tmp_path / "set")
    for split, rows in given_["rows"].items():
        assert np.array_equal(found[f"{split}_idx"], rows)


def test_splits_of_files_and_of_a_dataset(tmp_path: Path) -> None:
    inputs = raw()
    given_ = forms(len(inputs["pairs"]))
    np.save(tmp_path / "names.npy", given_["names"])
    np.save(tmp_path / "numbers.npy", given_["numbers"])
    js.build(tmp_path / "one", **inputs, splits=tmp_path / "names.npy", shared_questions=True)
    js.build(tmp_path / "two", **inputs, splits=tmp_path / "numbers.npy", shared_questions=True)
    js.build(tmp_path / "three", **inputs, splits=tmp_path / "one", shared_questions=True)
    for name in ("one", "two", "three"):
        assert np.array_equal(values(tmp_path / name)["val_idx"], given_["rows"]["val"])


def test_given_splits_that_share_a_question_need_a_word(tmp_path: Path) -> None:
    inputs = raw()
    splits = forms(len(inputs["pairs"]))["numbers"]
    with pytest.raises(IntegrityError, match=r"splits: expected no question in two splits.*shared_questions=True"):
        js.build(tmp_path / "set", **inputs, splits=splits)


def test_a_split_that_is_not_wanted_is_left_out(tmp_path: Path) -> None:
    report = js.build(tmp_path / "set", **raw(), splits={"train": 0.75, "val": 0.25})
    assert report.splits.keys() == {"train", "val"}
    assert "test_idx" not in values(tmp_path / "set")
    assert js.JASPERSteeringDataset(tmp_path / "set", "val")
