"""What cannot be understood, or does not fit, is said plainly: where, what was found, what there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jasper_store as js
from jasper_store.errors import (
    DeclarationError,
    IncompatibleOptionsError,
    IntegrityError,
    JasperStoreError,
    UnknownNameError,
)
from jasper_store.samples.expression import parse_field

ROWS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(
        tmp_path_factory.mktemp("bad"),
        emb=np.zeros((ROWS, 4), "f4"),
        other=np.zeros((ROWS, 5), "f4"),
        idx=np.arange(ROWS),
        two=np.arange(2 * ROWS).reshape(-1, 2) % ROWS,
        floats=np.zeros(ROWS, "f4"),
        flags=np.zeros(ROWS, bool),
        scalar=np.array(3),
        short=np.arange(5),
        **{"bag.values": np.arange(7), "bag.offsets": np.array([0, 1, 2, 2, 2, 3, 4, 5, 6, 6, 7])},
    )


def save(directory: Path, **tensors: np.ndarray) -> Path:
    for name, values in tensors.items():
        np.save(directory / f"{name}.npy", values)
    return directory


@pytest.mark.parametrize(
    ("text", "caret", "why"),
    [
        ("emb[idx[i]", 3, "never closed"),
        ("emb[", 3, "never closed"),
        ("emb i]", 5, "unmatched"),
        ("emb[i, 0, 1]", 4, "at most one column, found 3 parts"),
        ("emb[i, j]", 7, "a column is a whole number"),
        ("emb[i + 1]", 4, "expected i, row"),
        ("emb[0]", 4, "expected i, row"),
        ("emb[i:3]", 4, "expected i, row"),
        ("emb(i)", 0, "expected i, row"),
        ("f(x)[i]", 0, "expected the name of a tensor"),
        ("ünï[f(i)]", 4, "expected i, row"),
        ("emb", 0, "'emb' alone names no tensor"),
        ("", 0, "invalid syntax"),
        (f"emb[i, {2**64}]", 7, "at most 63 bits"),
    ],
)
def test_the_caret_stands_under_what_is_wrong(text: str, caret: int, why: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        parse_field(text, "x")
    said, line, under = str(caught.value).split("\n")
    assert said.startswith("field 'x' cannot be understood: ")
    assert why in said
    assert line == f"    {text}"
    assert under == f"    {' ' * caret}^"


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "a[" * 5_000, "a" + ".b" * 4_000 + "[i]", "a[i, 0x" + "f" * 9_000 + "]", "a[i, " + "9" * 9_000 + "]",
     "idx[" * 150 + "i" + "]" * 150, "\0[i]", "a[i]\0", "(" * 5_000 + "a[i]" + ")" * 5_000, "-" * 9_000 + "1"],
)  # fmt: skip
def test_hostile_expressions_are_refused_at_once(data: Path, text: str) -> None:
    with pytest.raises((DeclarationError, UnknownNameError)):
        js.Dataset(data, {"x": text})


def test_deep_lookups_are_compiled_in_linear_time(data: Path) -> None:
    expression = "i"
    for _ in range(60):
        expression = f"two[{expression}, 1]"
    with js.Dataset(data, {"x": f"emb[{expression}]"}) as dataset:
        assert len(dataset.graph.nodes) == 61


@pytest.mark.parametrize(
    ("fields", "error", "why"),
    [
        ({"x": "embs[i]"}, UnknownNameError, "no tensor 'embs' (field 'x'); did you mean 'emb'?"),
        ({"x": "nope[i]", "y": "emb[nada[i]]"}, UnknownNameError, "no tensors 'nope' (field 'x'), 'nada' (field 'y')"),
        ({"x": "emb[nope]"}, DeclarationError, "no field 'nope' to take rows from"),
        ({"x": "emb[floats[i]]"}, DeclarationError, "floats holds float32 values, and rows are named by integers"),
        ({"x": "emb[flags[i]]"}, DeclarationError, "flags holds bool values"),
        ({"x": "two[i, 2]"}, DeclarationError, "two has no column 2: it has columns 0 to 1"),
        ({"x": "emb[two[i, -3]]"}, DeclarationError, "two has no column -3"),
        ({"x": "idx[i, 0]"}, DeclarationError, "idx has no column 0: its shape is [10]"),
        ({"x": "scalar[i]"}, DeclarationError, "scalar is a scalar and has no rows"),
        ({"x": "emb[y]", "y": "idx[z]", "z": "idx[y]"}, DeclarationError, "in a circle: x -> y -> z -> y"),
        ({"x": "emb[i]", "y": "short[i]"}, DeclarationError, "emb has 10, short has 5"),
        ({"_x": "emb[i]"}, DeclarationError, "nothing is served"),
        ({}, DeclarationError, "nothing is served"),
        ({"a b": "emb[i]"}, DeclarationError, "a field cannot be called 'a b'"),
        ({"row": "emb[i]"}, DeclarationError, "a field cannot be called 'row'"),
        ({"x": 3}, DeclarationError, "expected a text such as 'embeddings[i]', found 3"),
        (["emb[i]"], DeclarationError, "fields should map names to texts"),
        ({"x": "bag[i, 0]"}, DeclarationError, "bag is ragged: its rows have no columns"),
        ({"x": "bag[bag[i]]"}, DeclarationError, "expected one row of it for each sample, found several"),
        ({"x": "bag[two[i]]"}, DeclarationError, "expected one row of it for each sample, found several"),
        ({"x": js.Choice(("emb", "other"), (0, 0.5, 0.5))}, DeclarationError, "should have one shape and dtype"),
        ({"x": js.Choice(("emb",), (0, 1), "two[i]")}, DeclarationError, "a choice takes one row for each sample"),
        ({"x": js.Choice(("bag",), (0, 1))}, DeclarationError, "bag is ragged"),
        ({"x": js.Choice(("emb",), (0, 1)), "y": js.Choice(("emb",), (1, 0))}, DeclarationError, "at most one choice"),
        ({"x": "emb[i]", "v": js.Variant("x")}, DeclarationError, "'x' is no choice"),
    ],
)  # fmt: skip
def test_declarations_that_do_not_fit(data: Path, fields: Any, error: type[Exception], why: str) -> None:
    with pytest.raises(error) as caught:
        js.Dataset(data, fields)
    assert why in str(caught.value)
    assert isinstance(caught.value, (JasperStoreError, ValueError))


@pytest.mark.parametrize("probabilities", [(1,), (-1, 2), (float("nan"), 1), ("x", "y"), None, (0.5, 0.6), 3])
def test_probabilities_that_are_none(probabilities: Any) -> None:
    with pytest.raises(DeclarationError, match="2 probabilities that add up to 1"):
        js.Choice(("emb",), probabilities)


def test_probabilities_of_a_later_epoch(data: Path) -> None:
    with js.Dataset(data, {"x": js.Choice(("emb",), lambda epoch: (0, 1) if epoch < 3 else (1,))}) as dataset:
        assert dataset[0]["x"].shape == (4,)
        dataset.set_epoch(3)
        with pytest.raises(DeclarationError, match="in epoch 3"):
            dataset[0]


@pytest.mark.parametrize(
    ("splits", "split", "error", "why"),
    [
        ({"train": "idx"}, "trian", UnknownNameError, "unknown split 'trian'; did you mean 'train'?"),
        ({}, "train", UnknownNameError, "the dataset declares no splits"),
        (
            {"train": "floats"},
            "train",
            DeclarationError,
            r"floats should list rows, integers [samples], found float32 [10]",
        ),
        ({"train": "two"}, "train", DeclarationError, "two should list rows"),
        ({"train": "bag"}, "train", DeclarationError, "should list rows"),
        ({"train": "gone"}, "train", UnknownNameError, "no tensor 'gone' (split 'train')"),
        (["idx"], None, DeclarationError, "splits should map names to texts"),
        ({"train": 3}, None, DeclarationError, "splits should map names to tensors"),
    ],
)
def test_splits_that_do_not_fit(data: Path, splits: Any, split: Any, error: type[Exception], why: str) -> None:
    with pytest.raises(error) as caught:
        js.Dataset(data, {"x": "emb[row]"}, splits=splits, split=split)
    assert why in str(caught.value)


def test_splits_go_with_fields(data: Path) -> None:
    with pytest.raises(DeclarationError, match="splits= goes with fields="):
        js.Dataset(data, splits={"train": "idx"})


def test_in_a_split_i_is_a_position(data: Path) -> None:
    with pytest.raises(DeclarationError, match="i is a position in the split, row is the row"):
        js.Dataset(data, {"x": "emb[i]"}, splits={"train": "short"}, split="train")


@pytest.mark.parametrize("use_mmap", [True, False])
@pytest.mark.parametrize(
    ("expression", "tensor", "at", "value", "why"),
    [
        ("emb[idx[i]]", "idx", 7, 10, "idx references row 10 of emb, but only 10 rows exist (at position [7];"),
        ("emb[idx[i]]", "idx", 0, -1, "idx references row -1 of emb"),
        ("emb[two[i, 1]]", "two", (4, 1), 99, "two references row 99 of emb, but only 10 rows exist (at position [4, 1];"),
        ("emb[two[i]]", "two", (4, 0), -3, "two references row -3 of emb, but only 10 rows exist (at position [4, 0];"),
        ("emb[bag[i]]", "bag.values", 6, 10, "bag references row 10 of emb"),
        ("bag[i]", "bag.offsets", 10, 6, "bag: its offsets end at 6, expected 7"),
        ("bag[i]", "bag.offsets", 2, 5, "do not at position 3"),
        ("bag[i]", "bag.offsets", 0, 1, "should ascend from 0"),
    ],
)  # fmt: skip
def test_an_index_out_of_bounds(
    data: Path, tmp_path: Path, use_mmap: bool, expression: str, tensor: str, at: Any, value: int, why: str
) -> None:
    for file in data.glob("*.npy"):
        values = np.load(file)
        if file.stem == tensor:
            values[at] = value
        np.save(tmp_path / file.name, values)
    with pytest.raises(IntegrityError) as caught:
        js.Dataset(tmp_path, {"x": expression}, use_mmap=use_mmap)
    assert why in str(caught.value)


def test_an_epoch_without_a_batch(tmp_path: Path) -> None:
    dataset = js.Dataset(save(tmp_path, emb=np.zeros((800, 2), "f4")))
    with pytest.raises(
        IncompatibleOptionsError, match="800 samples, so an epoch would have no full batch; use a smaller"
    ):
        js.create_loader(dataset, batch_size=5000)
    assert len(js.create_loader(dataset, batch_size=5000, drop_last=False)) == 1
    empty = js.Dataset(save(tmp_path, emb=np.zeros((0, 2), "f4")))
    with pytest.raises(IncompatibleOptionsError, match="no samples, so an epoch would be empty"):
        js.create_loader(empty, batch_size=5, drop_last=False)


@pytest.mark.parametrize("positions", [[0.5], [[1, 2]], torch.tensor([True]), torch.zeros(2), np.zeros((1, 1), int)])
def test_positions_that_are_none(data: Path, positions: Any) -> None:
    for use_mmap in (True, False):
        with (
            js.Dataset(data, {"x": "emb[i]"}, use_mmap=use_mmap) as dataset,
            pytest.raises(IndexError, match="1-D list"),
        ):
            dataset.__getitems__(positions)


@pytest.mark.parametrize(
    ("samples", "why"),
    [
        ([], "expected"),
        ({"field": {}}, "expected"),
        ({"fields": []}, "fields should map names to expressions"),
        ({"fields": {"x": 3}}, "fields should map names to expressions"),
        ({"fields": {"x": "emb[i"}}, "never closed"),
        ({"fields": {"x": "emb[i]"}, "splits": ["idx"]}, "splits should map"),
        ({"fields": {"x": "emb[i]"}, "more": 1}, "expected"),
        ({"fields": {"x": "emb[idx]"}}, "no field 'idx'"),
    ],
)
def test_what_config_json_declares(tmp_path: Path, samples: Any, why: str) -> None:
    save(tmp_path, emb=np.zeros((4, 2), "f4"), idx=np.arange(4))
    (tmp_path / "config.json").write_text(json.dumps({"samples": samples}))
    for use in (js.Dataset, js.open, js.plan):
        with pytest.raises(DeclarationError) as caught:
            use(tmp_path)
        assert why in str(caught.value)
        assert "config.json" in str(caught.value)
    found = js.verify(tmp_path)
    assert not found.ok
    assert any(why in finding.message for finding in found.errors)


def test_tensors_of_which_nothing_is_declared(tmp_path: Path) -> None:
    save(tmp_path, one=np.zeros((4, 2)), two=np.zeros((3, 2)))
    with pytest.raises(DeclarationError, match=r"one 4, two 3.*Declare the fields"):
        js.Dataset(tmp_path)
    save(tmp_path, three=np.zeros(3), four=np.array(1.0))
    with js.Dataset(tmp_path) as dataset:
        assert sorted(dataset.fields) == ["three", "two"]
    save(tmp_path, **{"a.b": np.zeros(3), "a_b": np.zeros(3)})
    with pytest.raises(DeclarationError, match="would both be the field 'a_b'"):
        js.Dataset(tmp_path)
