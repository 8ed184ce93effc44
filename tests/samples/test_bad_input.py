"""What cannot be served says what is wrong: where in an expression, which tensor, which value, what to do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import save_file

import jasper_store as js
from jasper_store.errors import (
    CorruptFileError,
    DeclarationError,
    IncompatibleOptionsError,
    IntegrityError,
    UnknownNameError,
)
from jasper_store.samples.declaration import Declaration, Field
from jasper_store.samples.expression import Lookup, parse_field

N = 800
TENSORS = {
    "embs": torch.arange(40.0).view(10, 4),
    "idx": torch.arange(10).flip(0),
    "pairs": torch.arange(20).view(10, 2) % 10,
    "scores": torch.rand(10),
    "flags": torch.arange(10) > 3,
    "few": torch.arange(5),
    "scalar": torch.tensor(3),
    "words.values": torch.arange(7),
    "words.offsets": torch.tensor([0, 2, 2, 7]),
}


def written(directory: Path, **tensors: torch.Tensor) -> Path:
    directory.mkdir(exist_ok=True)
    for name, value in tensors.items():
        save_file({name: value}, directory / f"{name}.safetensors")
    return directory


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return written(tmp_path / "data", **TENSORS)


def refused(path: Path, fields: Any = None, kind: type[Exception] = DeclarationError, **options: Any) -> str:
    """What is said when a dataset is opened."""
    with pytest.raises(kind) as caught:
        js.Dataset(path, fields, **options)
    assert type(caught.value) is kind
    return str(caught.value)


# --- expressions ------------------------------------------------------------------------------------------------------


def caret(message: str) -> str:
    """What stands from the caret on."""
    _, line, pointer = message.split("\n")
    assert set(pointer) <= {" ", "^"}
    return line[pointer.index("^") :]


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        ("embs[i", "[i", "never closed"),
        ("embs[i]]", "]", "unmatched"),
        ("embs[i,, 0]", ", 0]", "invalid syntax"),
        ("", "", "invalid syntax"),
        ("i", "i", "alone names no tensor"),
        ("embs", "embs", "alone names no tensor"),
        ("  embs  ", "embs", "alone names no tensor"),
        ("embs[0]", "0]", "expected i, row"),
        ("embs[-1]", "-1]", "expected i, row"),
        ("embs[i:2]", "i:2]", "expected i, row"),
        ("embs[*i]", "*i]", "expected i, row"),
        ("embs[i + 1]", "i + 1]", "expected i, row"),
        ("embs[i]; x", "; x", "invalid syntax"),
        ("embs[i][0]", "embs[i][0]", "expected the name of a tensor"),
        ("embs[idx(i)]", "idx(i)]", "expected i, row"),
        ("1[i]", "1[i]", "expected the name of a tensor"),
        ("b'embs'[i]", "b'embs'[i]", "expected the name of a tensor"),
        ("f'{embs}'[i]", "f'{embs}'[i]", "expected the name of a tensor"),
        ("embs[i, 0, 1]", "i, 0, 1]", "at most one column, found 3"),
        ("embs[()]", "()]", "at most one column, found 0"),
        ("embs[i, 0.5]", "0.5]", "a column is a whole number"),
        ("embs[i, True]", "True]", "a column is a whole number"),
        ("embs[i, --1]", "--1]", "a column is a whole number"),
        ("embs[i, j]", "j]", "a column is a whole number"),
        ("embs[i, 9223372036854775808]", "9223372036854775808]", "at most 63 bits"),
        ("éü[i, 0.5]", "0.5]", "a column is a whole number"),
        ("'日本'[i, 0.5]", "0.5]", "a column is a whole number"),
        ("embs[\n  i,\n  0.5]", "0.5]", "a column is a whole number"),
        ("embs[pairs[pairs[i, 0], x]]", "x]]", "a column is a whole number"),
        ("e" * 200 + "[i, 0.5]", "0.5]", "a column is a whole number"),
        ("(i for i in embs)", "(i for i in embs)", "expected i, row"),
        ("__import__('os').abort()", "__import__('os').abort()", "expected i, row"),
    ],
)
def test_a_caret_stands_under_the_place_that_is_wrong(text: str, place: str, why: str) -> None:
    with pytest.raises(DeclarationError, match=re.escape(why)) as caught:
        parse_field(text, "x")
    assert str(caught.value).startswith("field 'x' cannot be understood: ")
    assert caret(str(caught.value)) == place


HOSTILE = {
    "opening brackets": "[" * 100_000,
    "nested lookups": "a[" * 100_000 + "i" + "]" * 100_000,
    "3,000 nested lookups": "a[" * 3_000 + "i" + "]" * 3_000,
    "100 nested lookups": "a[" * 100 + "i" + "]" * 100,
    "dots": "a" + ".b" * 100_000 + "[i]",
    "2,000 dots": "a" + ".b" * 2_000 + "[i]",
    "minus signs": "a[i, " + "-" * 100_000 + "1]",
    "9,000 minus signs": "a[i, " + "-" * 9_000 + "1]",
    "sums": "a[i]+" * 50_000 + "a[i]",
    "parentheses": "(" * 5_000 + "a" + ")" * 5_000 + "[i]",
    "quotes": "'" * 100_000,
    "a long name": "a" * 1_000_000 + "[i]",
    "a NUL": "a\0[i]",
    "a lone surrogate": "\ud800[i]",
    "a huge integer": "a[i, " + "9" * 5_000 + "]",
    "a huge hexadecimal integer": "a[i, 0x" + "f" * 9_000 + "]",
    "a long hexadecimal integer": "a[i, 0x" + "f" * 100_000 + "]",
    "an escape": "a[i]\x1b[31m",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_expressions_are_refused_in_few_words(text: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        Declaration.parse({"x": text})
    message = str(caught.value)
    assert len(message) < 600
    assert message.replace("\n", " ").isprintable()


def test_a_crash_would_end_the_interpreter_and_does_not() -> None:
    """In a process of its own, whose end says whether the parser ran out of stack."""
    code = (
        "from jasper_store.samples.declaration import Declaration\n"
        "from jasper_store.errors import DeclarationError\n"
        "for depth in (50, 90, 150, 199, 201, 1000, 2400, 100_000):\n"
        "    for text in ('a[' * depth + 'i' + ']' * depth, '[' * depth, 'a' + '[i]' * depth, 'a[i, ' + '~' * depth):\n"
        "        try:\n"
        "            Declaration.parse({'x': text}).expanded('x')\n"
        "        except DeclarationError:\n"
        "            continue\n"
        "        assert depth == 50, depth\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_many_fields_that_name_one_another(data: Path) -> None:
    fields = {"_f0": "idx[i]", **{f"_f{k}": f"idx[_f{k - 1}]" for k in range(1, 2_000)}, "x": "embs[_f1999]"}
    assert "at most 64 lookups inside one another" in refused(data, fields)
    fields = {name: fields[name] for name in ["_f0", *(f"_f{k}" for k in range(1, 50))]} | {"x": "embs[_f49]"}
    with js.Dataset(data, fields) as ds:
        assert torch.equal(ds[3]["x"], TENSORS["embs"][3])  # flipped fifty times


def test_nested_columns_are_compiled_once_each(data: Path) -> None:
    text, row = "i", 7
    for _ in range(60):  # each level twice would end after the sun
        text, row = f"pairs[{text}, 1]", int(TENSORS["pairs"][row, 1])
    with js.Dataset(data, {"x": f"embs[{text}]"}) as ds:
        assert len(ds.graph.nodes) == 61
        assert torch.equal(ds[7]["x"], TENSORS["embs"][row])


names = st.one_of(
    st.text(min_size=1, max_size=8),
    st.sampled_from(
        ["class", "None", "a..b", ".a", "a.", "a.1", "ﬁ", "a b", "it's", 'say "x"', "a\\b", "a\nb", "emb/x"]
    ),
    st.from_regex(r"[a-z.]{1,6}", fullmatch=True),
)


@given(names, names, st.one_of(st.none(), st.integers(-(2**62), 2**62)))
def test_what_is_written_is_read_again(outer: str, inner: str, column: int | None) -> None:
    """As config.json does it. A name with a surrogate is no text of a file."""
    lookup = Lookup(outer, Lookup(inner, "i", column))
    try:
        outer.encode()
        inner.encode()
    except UnicodeEncodeError:
        return
    assert parse_field(str(lookup), "x") == lookup
    declared = Declaration.parse({"x": Field(lookup)}, {"train": inner})
    again = json.loads(json.dumps({"samples": declared.to_config()}))
    assert Declaration.from_config(again, Path("config.json")) == declared


@given(st.text(st.sampled_from("ai[],. 01-'\"\n(){}:é\0"), max_size=30))
def test_any_text_is_a_lookup_or_an_error_with_a_caret(text: str) -> None:
    try:
        found = parse_field(text, "x")
    except DeclarationError as exc:
        lines = str(exc).split("\n")
        assert lines[-1].strip() == "^"
        assert lines[-1].index("^") <= len(lines[-2]) + 1
    else:
        assert parse_field(str(found), "x") == found


# --- names, dtypes, shapes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"x": "embs[scores[i]]"}, "field 'x': scores holds float32 values, and rows are named by integers"),
        ({"x": "embs[flags[i]]"}, "field 'x': flags holds bool values, and rows are named by integers"),
        ({"x": "pairs[i, 2]"}, "field 'x': pairs has no column 2: it has columns 0 to 1"),
        ({"x": "pairs[i, -3]"}, "field 'x': pairs has no column -3: it has columns 0 to 1"),
        ({"x": "embs[pairs[i, 7]]"}, "field 'x': pairs has no column 7: it has columns 0 to 1"),
        ({"x": "idx[i, 0]"}, "field 'x': idx has no column 0: its shape is [10]"),
        ({"x": "scalar[i]"}, "field 'x': scalar is a scalar and has no rows"),
        ({"x": "embs[y]", "y": "idx[z]", "z": "idx[y]"}, "fields need each other in a circle: x -> y -> z -> y"),
        ({"x": "idx[x]"}, "fields need each other in a circle: x -> x"),
        (
            {"x": "embs[_pear]", "_pair": "idx[i]"},
            "field 'x': no field '_pear' to take rows from; did you mean '_pair'?",
        ),
        (
            {"x": "embs[i]", "y": "few[i]"},
            "tensors looked up by i should have one number of rows: embs has 10, few has 5",
        ),
        ({"_x": "embs[i]"}, "nothing is served"),
        ({}, "nothing is served"),
        ({"x": 3}, "field 'x': expected a text such as 'embeddings[i]', found 3"),
        ({"x": None}, "field 'x': expected a text"),
        ({"a b": "embs[i]"}, "a field cannot be called 'a b'"),
        ({"i": "embs[i]"}, "a field cannot be called 'i'"),
        ({"row": "embs[i]"}, "a field cannot be called 'row'"),
        ({3: "embs[i]"}, "fields should map names to texts"),
        (["embs[i]"], "fields should map names to texts"),
        ({"x": Field.parse("embs[i]", "x", torch.int64)}, "field 'x': float32 cannot be served as int64"),
        ({"x": "words[i, 0]"}, "field 'x': words is ragged: its rows have no columns"),
        ({"x": "words[words[i]]"}, "field 'x': words is ragged: expected one row of it for each sample, found several"),
        ({"x": "words[pairs[i]]"}, "field 'x': words is ragged: expected one row of it for each sample, found several"),
        ({"x": js.Choice(("embs",), (0, 1), rows="words[i]")}, "field 'x': a choice takes one row for each sample"),
        ({"x": js.Choice(("embs",), (0, 1), rows="pairs[i]")}, "field 'x': a choice takes one row for each sample"),
        ({"x": js.Choice(("scalar",), (0, 1))}, "field 'x': scalar is a scalar and has no rows"),
        (
            {"x": js.Choice(("idx", "embs"), (0, 0.5, 0.5))},
            "the tensors of a choice should have one shape and dtype, found idx torch.int64 [10], embs torch.float32 [10, 4]",
        ),
        ({"x": js.Choice(("embs",), (0, 1)), "y": js.Choice(("idx",), (0, 1))}, "at most one choice, found x, y"),
        ({"x": "embs[i]", "v": js.Variant("x")}, "field 'v': 'x' is no choice; there are none"),
        ({"x": js.Choice(("idx",), (0, 1)), "y": "embs[x]"}, "field 'y': no field 'x' to take rows from"),
    ],
)
def test_declarations_that_do_not_fit(data: Path, fields: Any, message: str) -> None:
    assert message in refused(data, fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"x": "embd[i]"}, "field 'x' names no tensor: there is no 'embd'; did you mean 'embs'?"),
        ({"x": "embs[pair[i, 0]]"}, "field 'x' names no tensor: there is no 'pair'; did you mean 'pairs'?"),
        ({"x": js.Choice(("embs", "emps"), (0, 0.5, 0.5))}, "there is no 'emps'; did you mean 'embs'?"),
        ({"x": "quite_another[i]"}, "there are 'embs', "),
    ],
)
def test_names_that_do_not_exist(data: Path, fields: Any, message: str) -> None:
    assert message in refused(data, fields, UnknownNameError)


def test_splits(data: Path) -> None:
    fields, splits = {"x": "embs[row]"}, {"train": "idx", "val": "few"}
    said = refused(data, fields, UnknownNameError, splits=splits, split="trian")
    assert said == "unknown split 'trian'; did you mean 'train'?"
    said = refused(data, fields, UnknownNameError, split="train")
    assert said == "unknown split 'train'; the dataset declares no splits"
    assert "splits= goes with fields=" in refused(data, splits=splits)
    assert "splits should map names to texts" in refused(data, fields, splits=["idx"])
    assert "splits should map names to tensors" in refused(data, fields, splits={"train": 3})
    said = refused(data, fields, UnknownNameError, splits={"train": "idy"}, split="train")
    assert "split train names no tensor: there is no 'idy'; did you mean 'idx'?" in said
    for name, found in {
        "scores": "float32 [10]",
        "flags": "bool [10]",
        "pairs": "int64 [10, 2]",
        "words": "int64 rows of different lengths",
    }.items():
        said = refused(data, fields, splits={"train": name}, split="train")
        assert "split train: " in said
        assert f"should list rows as integers [samples], found {found}" in said
    assert "scalar is a scalar" in refused(data, fields, splits={"train": "scalar"}, split="train")
    said = refused(data, {"x": "embs[row]", "y": "scores[i]"}, splits={"train": "few"}, split="train")
    assert said == "tensors looked up by i should have one number of rows: few has 5, scores has 10"


@pytest.mark.parametrize(
    ("tensors", "probabilities", "options", "message"),
    [
        (("a", "b"), (0.5, 0.5), {}, "a choice among 2 tensors needs 3 probabilities that add up to 1"),
        (("a",), (0.5, 0.6), {}, "found [0.5, 0.6] in epoch 0"),
        (("a",), (-1, 2), {}, "found [-1.0, 2.0] in epoch 0"),
        (("a",), (float("nan"), 1), {}, "found [nan, 1.0] in epoch 0"),
        (("a",), (float("inf"), 0), {}, "found [inf, 0.0] in epoch 0"),
        (("a",), ("x", "y"), {}, "found ('x', 'y') in epoch 0"),
        (("a",), None, {}, "found None in epoch 0"),
        (("a",), lambda _: 3, {}, "found 3 in epoch 0"),
        (("a",), (0, 10**400), {}, "in epoch 0"),
        (("a",), (0, 1), {"typical": (1,)}, "found [1.0] as typical"),
        ((), (1,), {}, "a choice needs at least one tensor"),
        ("ab", (0, 0.5, 0.5), {}, "a choice takes a list of tensors, found the text 'ab'"),
    ],
)
def test_choices(tensors: Any, probabilities: Any, options: Any, message: str) -> None:
    with pytest.raises(DeclarationError, match=re.escape(message)):
        js.Choice(tensors, probabilities, **options)


def test_probabilities_that_go_wrong_in_a_later_epoch_say_in_which(data: Path) -> None:
    choice = js.Choice(("embs",), lambda epoch: (0, 1) if epoch < 3 else (0.5,))
    with js.Dataset(data, {"x": choice}) as ds:
        assert torch.equal(ds[4]["x"], TENSORS["embs"][4])
        ds.set_epoch(3)
        with pytest.raises(DeclarationError, match=r"found \[0.5\] in epoch 3"):
            ds[4]


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_mmap", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        (
            [0, 3, 10, 1],
            "embs[index[i]]",
            "index references row of embs 10, but only 10 rows of embs exist (at position [2];",
        ),
        (
            [0, -1, 3, 1],
            "embs[index[i]]",
            "index references row of embs -1, but only 10 rows of embs exist (at position [1];",
        ),
        (
            [[0, 99], [1, 50]],
            "embs[index[i, 1]]",
            "row of embs 99, but only 10 rows of embs exist (at position [0, 1];",
        ),
        ([[0, 9], [1, 50]], "embs[index[i]]", "row of embs 50, but only 10 rows of embs exist (at position [1, 1];"),
        ([0, 5], "embs[idx[few[index[i]]]]", "row of few 5, but only 5 rows of few exist (at position [1];"),
    ],
)
def test_an_index_out_of_bounds(
    data: Path, use_mmap: bool, dtype: torch.dtype, values: Any, field: str, message: str
) -> None:
    written(data, index=torch.tensor(values, dtype=dtype))
    said = refused(data, {"x": field}, IntegrityError, use_mmap=use_mmap)
    assert message in said
    assert re.search(r"valid rows are 0 to \d+\); rebuild index", said)


def test_a_column_that_no_field_reads_may_hold_anything(data: Path) -> None:
    written(data, index=torch.tensor([[0, 99], [1, -5]]))
    with js.Dataset(data, {"x": "embs[index[i, 0]]"}) as ds:
        assert torch.equal(ds[1]["x"], TENSORS["embs"][1])
    assert "99" in refused(data, {"x": "embs[index[i, -1]]"}, IntegrityError)


def test_an_index_of_a_split_out_of_bounds(data: Path) -> None:
    said = refused(data, {"x": "few[row]"}, IntegrityError, splits={"train": "idx"}, split="train")
    assert "idx references row of few 9, but only 5 rows of few exist (at position [0]" in said


def test_bounds_are_checked_again_when_a_file_has_changed(data: Path) -> None:
    with js.Dataset(data, {"x": "embs[idx[i]]"}):
        pass
    written(data, idx=torch.full((10,), 77))
    assert "row of embs 77" in refused(data, {"x": "embs[idx[i]]"}, IntegrityError)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 5, 2, 7], "words: its offsets should ascend from 0 to 7, and do not at position 2"),
        ([1, 2, 5, 7], "words: its offsets should ascend from 0 to 7, and do not at position 0"),
        ([0, 2, 5, 8], "words: its offsets should ascend from 0 to 7, and do not at position 3"),
        ([0, -2, 5, 7], "words: its offsets should ascend from 0 to 7, and do not at position 1"),
        ([0, 2, 5, 6], "words: its offsets end at 6, expected 7, the number of its values"),
    ],
)
def test_offsets(data: Path, offsets: list[int], message: str) -> None:
    written(data, **{"words.offsets": torch.tensor(offsets)})
    for fields in ({"x": "words[i]"}, {"x": "embs[words[i]]"}):
        assert message in refused(data, fields, IntegrityError)


@pytest.mark.parametrize(
    "offsets", [torch.tensor([0.0, 7.0]), torch.zeros(2, 2, dtype=torch.int64), torch.empty(0).long()]
)
def test_offsets_of_another_kind(data: Path, offsets: torch.Tensor) -> None:
    written(data, **{"words.offsets": offsets})
    assert "words.offsets should be integers [rows + 1], found" in refused(data, {"x": "words[i]"})


def test_values_without_offsets(data: Path) -> None:
    (data / "words.offsets.safetensors").unlink()
    assert "there is no 'words.offsets'" in refused(data, {"x": "words[i]"}, UnknownNameError)


def test_ragged_rows_of_rows(data: Path) -> None:
    written(data, **{"words.values": torch.arange(14).view(7, 2) % 7})
    said = refused(data, {"x": "embs[words[i]]"})
    assert "words.values holds rows of shape [2], and a ragged row is named by one number" in said


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_mmap", [True, False])
def test_positions(data: Path, use_mmap: bool) -> None:
    with js.Dataset(data, {"x": "idx[i]"}, use_mmap=use_mmap) as ds:
        bad: Any
        for bad in ([0.7], torch.tensor([0.7]), np.array([0.7]), [True, False], torch.tensor([True])):
            with pytest.raises(TypeError, match="positions are whole numbers, found"):
                ds.__getitems__(bad)
        for bad in (torch.tensor([[1, 2], [3, 4]]), torch.tensor(1), np.zeros((2, 2), np.int64), [[1, 2]]):
            with pytest.raises(IndexError, match=r"of one dimension, found shape \["):
                ds.__getitems__(bad)
        for row in (-1, 10, 2**62):
            with pytest.raises(IndexError, match=str(row)):
                ds.__getitems__([0, row])
            with pytest.raises(IndexError, match=rf"Index {row} out of range \[0, 10\)"):
                ds[row]


# --- loaders ----------------------------------------------------------------------------------------------------------


def test_an_epoch_without_a_batch(tmp_path: Path) -> None:
    data = written(tmp_path / "data", embs=torch.rand(N, 2), train=torch.arange(N))
    for given_, of in (
        (js.Dataset(data, {"x": "embs[i]"}), "the dataset"),
        (js.Dataset(data, {"x": "embs[row]"}, splits={"train": "train"}, split="train"), "split 'train'"),
        (data, "the dataset"),
    ):
        with pytest.raises(IncompatibleOptionsError) as caught:
            js.create_loader(given_, batch_size=5000)
        said = str(caught.value)
        assert said.startswith(
            f"batch_size=5000 with drop_last: {of} has 800 samples, so an epoch would have no full batch"
        )
        assert "at most 800" in said
        assert "drop_last=False" in said
        assert len(list(js.create_loader(given_, batch_size=5000, drop_last=False))) == 1
    with pytest.raises(IncompatibleOptionsError, match="at most 400"):
        js.create_loader(data, batch_size=500, rank=0, world_size=2)


def test_no_samples_at_all(tmp_path: Path) -> None:
    data = written(tmp_path / "data", embs=torch.empty(0, 2))
    with js.Dataset(data, {"x": "embs[i]"}) as ds:
        assert len(ds) == 0
        assert ds.__getitems__([]).tensors["x"].shape == (0, 2)
        with pytest.raises(IncompatibleOptionsError, match="the dataset has no samples"):
            js.create_loader(ds, batch_size=1, drop_last=False)


def test_options_of_an_open_dataset(data: Path) -> None:
    with js.Dataset(data, {"x": "embs[i]"}) as ds:
        with pytest.raises(IncompatibleOptionsError, match="use_mmap=True: the dataset is open already"):
            js.create_loader(ds, batch_size=2, use_mmap=True)
        with pytest.raises(IncompatibleOptionsError, match="split='train': the dataset is open with split None"):
            js.create_loader(ds, "train", batch_size=2)
        with pytest.raises(IncompatibleOptionsError, match="needs a batch_size"):
            js.create_loader(ds)


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], 'expected {"fields": {...}, "splits": {...}}, found []'),
        ("embs[i]", "found 'embs[i]'"),
        (3, "found 3"),
        (False, "found False"),
        ({}, 'expected {"fields"'),
        ({"splits": {"train": "idx"}}, 'expected {"fields"'),
        ({"fields": {"x": "embs[i]"}, "split": {}}, 'expected {"fields"'),
        ({"fields": ["embs[i]"]}, "fields should map names to expressions"),
        ({"fields": {"x": 3}}, "fields should map names to expressions"),
        ({"fields": {"x": None}}, "fields should map names to expressions"),
        ({"fields": {"x": {"tensors": ["embs"]}}}, "fields should map names to expressions"),
        ({"fields": None}, "fields should map names to expressions"),
        ({"fields": {}}, "nothing is served"),
        ({"fields": {"x": "embs[i"}}, "'[' was never closed"),
        ({"fields": {"x": "embs[x]"}}, "in a circle: x -> x"),
        ({"fields": {"x": "embs[i]"}, "splits": ["idx"]}, "splits should map names to texts"),
        ({"fields": {"x": "embs[i]"}, "splits": {"train": 3}}, "splits should map names to tensors"),
        ({"fields": {"x": "embs[i]"}, "splits": {"train": None}}, "splits should map names to tensors"),
    ],
)
@pytest.mark.parametrize("way", ["Dataset", "create_loader"])
def test_declarations_in_config_json(data: Path, samples: Any, message: str, way: str) -> None:
    (data / "config.json").write_text(json.dumps({"samples": samples}))
    with pytest.raises(DeclarationError) as caught:
        js.Dataset(data) if way == "Dataset" else js.create_loader(data, batch_size=2)
    assert str(caught.value).startswith(f'{data / "config.json"}, "samples": ')
    assert message in str(caught.value)
    assert caught.value.path == data / "config.json"
    with js.Dataset(data, {"x": "embs[i]"}) as ds:  # what Python declares goes before
        assert len(ds) == 10


@pytest.mark.parametrize("text", ["{", "[1, 2]", "3", "\ufeff{}", "[" * 100_000])
def test_a_config_that_is_no_json_object(data: Path, text: str) -> None:
    (data / "config.json").write_text(text)
    said = refused(data, kind=CorruptFileError)
    assert str(data / "config.json") in said


def test_what_only_python_can_say_is_not_written() -> None:
    for value in (js.Choice(("a",), (0, 1)), Field.parse("a[i]", "x", torch.int64)):
        with pytest.raises(DeclarationError, match=r"cannot be written to config\.json"):
            Declaration.parse({"x": value}).to_config()


# --- nothing declared -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.rand(4, 2), "b": torch.rand(3, 2)}, "Their numbers of rows are a 4, b 3. Declare the fields"),
        ({"a": torch.tensor(1.0)}, "Their numbers of rows are none with rows"),
        (
            {"a.b": torch.rand(4), "a_b": torch.rand(4)},
            "'a.b' and 'a_b' would both be the field 'a_b'. Declare the fields",
        ),
    ],
)
def test_tensors_of_which_nothing_is_said(tmp_path: Path, tensors: Mapping[str, torch.Tensor], message: str) -> None:
    assert message in refused(written(tmp_path / "data", **tensors))
