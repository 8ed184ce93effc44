"""What cannot be built: refused before the first byte, in the words of the arguments, with where and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jasper_store as js
from jasper_store.errors import (
    ConversionError,
    DatasetNotFoundError,
    IncompatibleOptionsError,
    InsufficientMemoryError,
    IntegrityError,
    JasperStoreError,
    UnknownNameError,
)
from tests.building.raw import raw, values

Change = Callable[[dict[str, Any]], dict[str, Any]]


def with_value(name: str, row: int, value: float) -> Change:
    def change(inputs: dict[str, Any]) -> dict[str, Any]:
        changed = inputs[name].copy()
        changed[row] = value
        return {name: changed}

    return change


def with_pair(row: int, pair: tuple[int, int]) -> Change:
    def change(inputs: dict[str, Any]) -> dict[str, Any]:
        pairs = inputs["pairs"].copy()
        pairs[row] = pair
        return {"pairs": pairs}

    return change


def plain(**more: Any) -> Change:
    return lambda _: more


IDS = [f"q{i}" for i in range(40)]
BAD: dict[str, tuple[Change, type[JasperStoreError], str]] = {
    "other dimensions": (lambda i: {"sources": i["sources"][:, :5]}, IntegrityError, r"sources: expected 12 dimensions, as questions= has, found 5"),
    "keywords of other dimensions": (lambda i: {"keywords": i["keywords"][:, :5]}, IntegrityError, r"keywords: expected 12 dimensions"),
    "NaN": (with_value("questions", 7, np.nan), IntegrityError, r"questions: .* 1 of 40 rows that hold NaN or Inf, the first is row 7"),
    "Inf": (with_value("sources", 9, np.inf), IntegrityError, r"sources: .* the first is row 9"),
    "a zero vector": (with_value("sources", 3, 0), IntegrityError, r"sources: expected rows that have a direction.* row 3"),
    "a zero keyword": (with_value("keywords", 2, 0), IntegrityError, r"keywords: .* row 2"),
    "one dimension": (lambda i: {"questions": i["questions"][:, 0]}, IntegrityError, r"questions: expected embeddings, floats"),
    "integers": (lambda i: {"questions": i["questions"].astype(int)}, IntegrityError, r"questions: expected embeddings.*int64"),
    "nothing": (lambda i: {"questions": i["questions"][:0]}, IntegrityError, r"questions: expected embeddings"),
    "another byte order": (lambda i: {"questions": i["questions"].astype(">f4")}, IntegrityError, r"questions: expected an array.*>f4; convert"),
    "complex numbers": (lambda i: {"sources": torch.from_numpy(i["sources"]).to(torch.complex64)}, IntegrityError, r"sources: expected embeddings.*complex64"),
    "objects": (plain(questions=[[1.0, 2.0], [3.0]]), IntegrityError, r"questions: expected an array of numbers"),
    "a pair of no source": (with_pair(5, (0, 60)), IntegrityError, r"pairs: expected source rows 0 to 59, as sources= has, found 60 in pair 5"),
    "a pair of no question": (with_pair(5, (-1, 0)), IntegrityError, r"pairs: expected question rows 0 to 39.* found -1 in pair 5"),
    "pairs of three": (plain(pairs=np.zeros((4, 3), int)), IntegrityError, r"pairs: expected row numbers, integers \[pairs, 2\].*\[4, 3\]"),
    "pairs of floats": (lambda i: {"pairs": i["pairs"].astype(float)}, IntegrityError, r"pairs: expected row numbers.*float64"),
    "no pairs": (plain(pairs=np.zeros((0, 2), int)), IntegrityError, r"pairs: expected at least one pair"),
    "a pair twice": (lambda i: {"pairs": np.vstack([i["pairs"][3:4], i["pairs"][1:]])}, IntegrityError, r"pairs: .*found pair 3 equal to pair 0, and 1 such.*repeated_pairs=True"),
    "ids without ids": (plain(pairs=(["q1"], ["s1"])), IncompatibleOptionsError, r"found question ids such as 'q1'.*pass question_ids="),
    "an id twice": (plain(question_ids=[*IDS[:-1], "q3"], pairs=(["q1"], [1])), IntegrityError, r"question_ids: expected each id once, found 'q3' in rows 3 and 39"),
    "too few ids": (plain(question_ids=IDS[:7]), IntegrityError, r"question_ids: expected one id for each of the 40 questions, found 7"),
    "an unknown id": (plain(question_ids=IDS, pairs=(["q1", "what"], [1, 2])), UnknownNameError, r"'what' \(pair 1\)"),
    "columns of two lengths": (plain(question_ids=IDS, pairs=(["q1", "q2"], [1])), IntegrityError, r"found 2 questions and 1 sources"),
    "rows of ids": (plain(question_ids=IDS, pairs=[("q1", "q2")] * 3), IntegrityError, r"pass them as columns"),
    "ids that are numbers": (plain(question_ids=[1] * 40), IntegrityError, r"question_ids: expected strings, found int at position 0"),
    "fewer sources than negatives": (plain(n_neg=60), IncompatibleOptionsError, r"n_neg=60: expected more sources.* found 60"),
    "no negatives": (plain(n_neg=0), IncompatibleOptionsError, r"n_neg"),
    "one cluster": (plain(clusters=1), IncompatibleOptionsError, r"clusters=1: expected at least 2"),
    "one cluster that is given": (plain(clusters=np.zeros(60, int)), IntegrityError, r"expected at least 2 clusters.*found 1"),
    "more clusters than sources": (plain(clusters=61), IncompatibleOptionsError, r"clusters=61: expected at most"),
    "cluster numbers with a gap": (plain(clusters=np.arange(60) % 3 * 2), IntegrityError, r"found no member of cluster 1"),
    "negative clusters": (plain(clusters=np.arange(60) % 3 - 1), IntegrityError, r"clusters: expected numbers from 0, found -1"),
    "clusters of neither": (plain(clusters=np.zeros(7, int)), IntegrityError, r"clusters: expected integers \[80\].*\[60\].*found torch.int64 \[7\]"),
    "clusters of what": (plain(clusters={"questions": np.zeros(40, int)}), IncompatibleOptionsError, r"'pairs'.*'sources'"),
    "relevance above 1": (plain(relevance=np.full(80, 1.5)), IntegrityError, r"relevance: expected values from 0 to 1, found 1.5 for pair 0"),
    "relevance with NaN": (plain(relevance=np.full(80, np.nan)), IntegrityError, r"relevance: expected values from 0 to 1"),
    "relevance of others": (plain(relevance=np.ones(3)), IntegrityError, r"relevance: expected floats \[80\]"),
    "keywords without lists": (plain(pair_keywords=None), IncompatibleOptionsError, r"keywords= needs pair_keywords= too"),
    "lists without keywords": (plain(keywords=None), IncompatibleOptionsError, r"pair_keywords= needs keywords= too"),
    "lists of others": (plain(pair_keywords=[[0]] * 3), IntegrityError, r"each of the 80 pairs, found 3 lists"),
    "a keyword that is not there": (plain(pair_keywords=[[0]] * 79 + [[15]]), IntegrityError, r"expected rows 0 to 14 of keywords=, found 15 in pair 79"),
    "lists of floats": (plain(pair_keywords=[[0.5]] * 80), IntegrityError, r"pair_keywords"),
    "shares that add up to 2": (plain(splits=(1.0, 0.5, 0.5)), IncompatibleOptionsError, r"splits=.*add up to 1"),
    "an unknown split": (plain(splits={"dev": 0.5, "train": 0.5}), IncompatibleOptionsError, r"train, val, test"),
    "an empty split": (plain(splits=(0.98, 0.01, 0.01)), IntegrityError, r"splits: .*found none in (val|test)"),
    "an empty split that is given": (plain(splits={"train": np.arange(80), "val": np.arange(0)}), IntegrityError, r"found none in val"),
    "names of splits": (plain(splits=["train"] * 79 + ["dev"]), IncompatibleOptionsError, r"found 'dev'"),
    "numbers of splits": (plain(splits=np.full(80, 3)), IntegrityError, r"0 for train, 1 for val"),
    "pairs in two splits": (plain(splits={"train": np.arange(80), "val": np.arange(3)}), IntegrityError, r"each pair in one split"),
    "an unknown format": (plain(format="zarr"), UnknownNameError, r"zarr"),
    "unknown weights": (plain(keyword_weights="best"), UnknownNameError, r"equal, softmax"),
    "a compression of HDF5": (plain(compression="gzip"), IncompatibleOptionsError, r"compression"),
    "no file": (plain(questions="nothing.npy"), DatasetNotFoundError, r"nothing.npy"),
    "a limit that is no size": (plain(memory_limit="much"), IncompatibleOptionsError, r"memory_limit"),
    "too little memory": (plain(memory_limit="2kB"), InsufficientMemoryError, r"building needs .* raise memory_limit="),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    change, kind, words = BAD[name]
    inputs = raw()
    assert len(inputs["pairs"]) == 80
    with pytest.raises(kind, match=words):
        js.build(tmp_path / "set", **{**inputs, **change(inputs)})
    assert list(tmp_path.iterdir()) == []


def test_as_many_pairs_as_sources_need_a_word(tmp_path: Path) -> None:
    inputs = raw(sources=80)
    own = np.arange(80) % 4
    with pytest.raises(IncompatibleOptionsError, match="say of which they are"):
        js.build(tmp_path / "set", **inputs, clusters=own)
    js.build(tmp_path / "one", **inputs, clusters={"pairs": own})
    js.build(tmp_path / "two", **inputs, clusters={"sources": own})
    assert np.array_equal(values(tmp_path / "one")["pair_cluster_id"], own)
    assert np.array_equal(values(tmp_path / "two")["pair_cluster_id"], own[inputs["pairs"][:, 1]])


def test_pairs_that_repeat_are_kept_if_asked(tmp_path: Path) -> None:
    inputs = raw()
    inputs["pairs"] = np.vstack([inputs["pairs"], inputs["pairs"][:5]])
    inputs["pair_keywords"] += inputs["pair_keywords"][:5]
    report = js.build(tmp_path / "set", **inputs, repeated_pairs=True)
    assert report.counts["duplicate_pairs"] == 5
    assert report.counts["pairs"] == 85


def test_a_column_has_to_be_named_where_there_are_several(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", one=raw()["questions"], two=raw()["sources"])
    with pytest.raises(
        UnknownNameError, match=r"found 2 tensors and no name; pass '.*all.npz:NAME' with one of one, two"
    ):
        js.build(tmp_path / "set", **{**raw(), "questions": tmp_path / "all.npz"})
    with pytest.raises(UnknownNameError, match="no tensor 'three'"):
        js.build(tmp_path / "set", **{**raw(), "questions": f"{tmp_path}/all.npz:three"})


def test_a_disk_that_is_too_small_is_said_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = type("Usage", (), {"free": 20_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        ConversionError, match=r"building set there needs [\d,]+ bytes .* found 20,000 bytes free.*Nothing was"
    ):
        js.build(tmp_path / "set", **raw())
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_of_the_disk_covers_what_is_written(tmp_path: Path) -> None:
    from jasper_store.building.finder import Finder
    from jasper_store.building.gathered import find_inputs
    from jasper_store.building.settings import BuildSettings
    from jasper_store.building.write import output_nbytes

    for fmt in ("safetensors", "npy", "hdf5", "pt"):
        import contextlib

        inputs = {**dict.fromkeys(("relevance", "clusters", "splits", "question_ids", "source_ids")), **raw()}
        made = BuildSettings(n_neg=inputs.pop("n_neg"), format=fmt)
        with contextlib.ExitStack() as stack:
            estimate = output_nbytes(find_inputs(inputs, made, Finder(stack)), made, 5)
        js.build(tmp_path / fmt, **raw(), format=fmt)
        held = sum(tensor.nbytes for tensor in values(tmp_path / fmt).values())
        assert held <= estimate <= 3 * held


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    js.build(tmp_path / "set", **raw())
    before = values(tmp_path / "set")
    with pytest.raises(ConversionError, match="overwrite=True"):
        js.build(tmp_path / "set", **raw(), seed=3)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConversionError):
            js.build(tmp_path / "notes", **raw(), overwrite=overwrite)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"
    assert all(torch.equal(values(tmp_path / "set")[name], tensor) for name, tensor in before.items())


def test_without_faiss_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(IncompatibleOptionsError, match=r"pip install jasper_store\[build\], or pass clusters="):
        js.build(tmp_path / "set", **raw())
    js.build(tmp_path / "set", **raw(), clusters=np.arange(60) % 4)
