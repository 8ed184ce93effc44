"""Strings beside tensors: named as skipped by every command, kept by a conversion and by a writer."""

from __future__ import annotations

import json
import pickle
import re
import warnings

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from typer.testing import CliRunner

import jasper_store as js
from jasper_store.cli.app import app
from jasper_store.conversion.converter import convert
from jasper_store.conversion.writer import DirectoryWriter
from jasper_store.errors import (
    CorruptFileError,
    DatasetNotFoundError,
    IncompatibleOptionsError,
    IntegrityError,
    JasperStoreError,
    JasperStoreWarning,
)
from jasper_store.formats.base import Schema
from jasper_store.formats.registry import FORMATS, locate
from jasper_store.formats.texts import PARTS
from tests.conversion.samples import FORMAT_NAMES
from tests.formats.conformance import relaxed

IDS = ["a", "größe", "", "日本語", "😀 x", "c"]
EMBS = torch.arange(12.0).reshape(6, 2)


def mixed(folder, kind):
    """A tensor, and ids of its rows as one library or another saves them."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "hdf5":
        with h5py.File(folder / "dataset.h5", "w") as file:
            file["embs"], file["ids"] = EMBS.numpy(), IDS
        return folder
    if kind == "pt":
        torch.save({"embs": EMBS, "ids": IDS, "title": "a title"}, folder / "data.pt")
        return folder
    if kind in {"arrow", "parquet"}:
        pa = pytest.importorskip("pyarrow")
        table = pa.table({"embs": list(EMBS.numpy()), "ids": IDS})
        if kind == "parquet":
            pytest.importorskip("pyarrow.parquet").write_table(table, folder / "data.parquet", row_group_size=4)
        else:
            pytest.importorskip("pyarrow.feather").write_feather(
                table, folder / "data.arrow", "uncompressed", chunksize=4
            )
        return folder
    np.save(folder / "embs.npy", EMBS.numpy())
    made = {
        "unicode": np.array(IDS),
        "bytes": np.array([text.encode() for text in IDS]),
        "objects": np.array(IDS, dtype=object),
    }
    np.save(folder / "ids.npy", made[kind], allow_pickle=True)
    return folder


KINDS = ("unicode", "bytes", "objects", "pt", "hdf5", "arrow", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_each_command_names_what_it_skips(tmp_path, kind):
    folder = mixed(tmp_path / "data", kind)
    with pytest.warns(JasperStoreWarning, match="'ids' is skipped: (it holds|a column of string)") as caught:
        store = js.open(folder)
    with store:
        assert list(store) == ["embs"]
        assert torch.equal(store["embs"].tensor(), EMBS)
        assert "ids" in {skip.name for skip in store.skipped}
        for ask in (store.ids, store.__getitem__):
            with pytest.raises(KeyError, match="'ids' is skipped"):
                ask("ids")
    assert len(caught) == 1
    assert any("'ids' is skipped" in note for note in js.plan(folder).notes)
    found = js.verify(folder)
    assert found.ok
    assert "ids" in [finding.tensor for finding in found.warnings if finding.check == "skipped"]
    for command in ("inspect", "plan", "verify"):
        result = CliRunner().invoke(app, [command, str(folder)], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        assert "ids" in result.stdout
        assert "skipped" in result.stdout
    shown = json.loads(CliRunner().invoke(app, ["inspect", str(folder), "--json"]).stdout)
    assert [tensor["name"] for tensor in shown["tensors"]] == ["embs"]
    assert shown["skipped"][0]["name"] == "ids"
    assert shown["skipped"][0]["reason"]
    report = js.convert(folder, tmp_path / "out")
    assert any(note.startswith("ids: 6 strings, kept") or "'ids' is skipped" in note for note in report.notes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", [*FORMAT_NAMES, "gzip"])
def test_a_conversion_keeps_them_and_the_next_one_too(tmp_path, kind, fmt):
    source = mixed(tmp_path / "data", kind)
    options = ("hdf5", "gzip") if fmt == "gzip" else (fmt, None)
    convert(source, tmp_path / "one", *options)
    convert(tmp_path / "one", tmp_path / "two", "safetensors")
    convert(tmp_path / "two", tmp_path / "three", *options)
    again = convert(source, tmp_path / "one", *options)
    assert all(row.skipped for row in again.tensors)
    for name in ("one", "two", "three"):
        with js.open(tmp_path / name) as store:
            ids = store.ids("ids")
            assert ids.of(range(6)) == IDS
            assert ids.rows(IDS[::-1]).tolist() == [5, 4, 3, 2, 1, 0]
            assert ids._trusted() is not None
            assert store["ids.values"].dtype == torch.uint8
        assert js.verify(tmp_path / name).ok
        assert not js.verify(tmp_path / name).warnings


def test_in_place(tmp_path):
    folder = mixed(tmp_path / "data", "unicode")
    js.convert(folder)
    located = locate(folder, "auto", Schema())
    assert located.format == "safetensors"
    assert not located.skipped
    assert not [finding for finding in js.verify(folder).warnings if finding.check == "skipped"]
    np.save(folder / "ids.npy", np.array([text.upper() for text in IDS]))
    js.convert(folder, overwrite=True)
    with js.open(folder) as store:
        assert store.ids("ids").rows(["A", "GRÖSSE"]).tolist() == [0, 1]


def test_in_place_where_strings_are_all_that_a_format_has(tmp_path):
    np.save(tmp_path / "ids.npy", np.array(IDS))
    torch.save(EMBS, tmp_path / "embs.pt")
    js.convert(tmp_path)
    with js.open(tmp_path) as store:
        assert store.ids("ids").rows(["c"]).tolist() == [5]
        assert store.format == "safetensors"


def test_one_file_of_strings(tmp_path):
    np.save(tmp_path / "ids.npy", np.array(IDS))
    for ask in (js.open, js.plan, js.verify):
        with pytest.raises(DatasetNotFoundError, match=r"expected tensors, found .*it holds strings"):
            ask(tmp_path / "ids.npy")
    js.convert(tmp_path / "ids.npy", tmp_path / "out")
    with js.open(tmp_path / "out") as store:
        assert store.ids("ids").of([1]) == ["größe"]


@pytest.mark.parametrize("required", [(), ("embs",)])
def test_nothing_but_strings_and_what_cannot_be_read(tmp_path, required):
    folder = tmp_path / "data"
    folder.mkdir()
    np.save(folder / "ids.npy", np.array(IDS))
    torch.save({"title": "text"}, folder / "x.pt")
    if required:
        (folder / "junk.npy").write_bytes(b"junk")
        declared = {"samples": {"fields": {"emb": "embs[i]"}}}
        (folder / "config.json").write_text(json.dumps(declared))
    for ask in (js.open, js.plan, js.convert, lambda path: js.convert(path, tmp_path / "out")):
        with pytest.raises(JasperStoreError, match=r"expected tensors|junk"):
            ask(folder)
    for command in (["inspect"], ["plan"], ["verify"], ["convert"]):
        result = CliRunner().invoke(app, [*command, str(folder)])
        assert result.exit_code in {3, 4}, result.output
        assert "0 tensors" not in result.output


def test_a_required_tensor_that_holds_strings(tmp_path):
    folder = mixed(tmp_path / "data", "unicode")
    (folder / "config.json").write_text(json.dumps({"samples": {"fields": {"emb": "embs[i]", "id": "ids[i]"}}}))
    with pytest.raises(CorruptFileError, match=r"expected the tensor 'ids', found that it holds strings"):
        js.open(folder)


def test_a_list_of_files(tmp_path):
    folder = mixed(tmp_path / "data", "unicode")
    with pytest.warns(JasperStoreWarning, match="skipped"):
        store = js.open([folder / "ids.npy", folder / "embs.npy"])
    with store:
        assert list(store) == ["embs"]
    with pytest.raises(DatasetNotFoundError, match=r"expected tensors, found ids \(it holds strings"):
        js.open([folder / "ids.npy"])


@pytest.mark.parametrize(
    ("array", "why"),
    [(np.array([b"ok", b"\xff\xfe"]), "row 1 is no text"), (np.array([["a"], ["b"]]), r"shape \[2, 1\]")],
)
def test_strings_that_cannot_be_kept(tmp_path, array, why):
    np.save(tmp_path / "embs.npy", EMBS.numpy())
    np.save(tmp_path / "ids.npy", array)
    report = js.convert(tmp_path, tmp_path / "out")
    assert {row.name for row in report.tensors} == {"embs"}
    assert re.search(why, " ".join(report.notes))


def test_strings_and_a_tensor_of_one_name(tmp_path):
    torch.save(torch.arange(3), tmp_path / "ids.pt")
    np.save(tmp_path / "ids.npy", np.array(IDS))
    assert [skip.name for skip in locate(tmp_path, "auto", Schema()).skipped] == ["ids"]
    report = js.convert(tmp_path, tmp_path / "out")
    assert [row.name for row in report.tensors] == ["ids"]
    assert "ids.npy: the strings 'ids' are skipped; a tensor has their name" in str(report)


@pytest.mark.parametrize("names", [("ids_00", "ids_01", "ids_02"), tuple(f"ids-{i}-of-11" for i in range(11))])
def test_numbered_files_of_strings_are_one(tmp_path, names):
    every = []
    for i, name in enumerate(names):
        rows = [f"{i} {text}" for text in IDS[: i + 1]]
        every += rows
        np.save(tmp_path / f"{name}.npy", np.array(rows))
        np.save(tmp_path / f"{name.replace('ids', 'embs')}.npy", np.full((len(rows), 2), i, "f4"))
    report = js.convert(tmp_path, tmp_path / "out")
    assert f"ids: {len(every)} strings of {len(names)} numbered files, kept" in str(report)
    with js.open(tmp_path / "out") as store:
        assert store.ids("ids").of(range(len(every))) == every
        assert store["embs"].take(store.ids("ids").rows(["2 a"])).tolist() == [[2, 2]]
    assert all(row.skipped for row in js.convert(tmp_path, tmp_path / "out").tensors)
    np.save(tmp_path / f"{names[1]}.npy", np.array(["new", "and more"]))
    changed = js.convert(tmp_path, tmp_path / "out", overwrite=True)
    assert {row.name for row in changed.tensors if not row.skipped} == {f"ids.{part}" for part in PARTS}
    js.convert(tmp_path / f"{names[2]}.npy", tmp_path / "one")
    with js.open(tmp_path / "one") as store:
        assert store.ids(names[2]).of([0]) == ["2 a"]


@pytest.mark.parametrize("fmt", ["pt", "hdf5"])
def test_numbered_files_that_hold_strings_of_one_name(tmp_path, fmt):
    """What is skipped in each of them is told once, and all of it is kept."""
    for i in range(3):
        rows = [f"{i} a", f"{i} b"]
        if fmt == "pt":
            torch.save({"embs": torch.full((2, 2), i), "ids": rows}, tmp_path / f"data_{i:02}.pt")
        else:
            with h5py.File(tmp_path / f"data_{i:02}.h5", "w") as file:
                file["embs"], file["ids"] = np.full((2, 2), i), rows
    js.convert(tmp_path, tmp_path / "out")
    with js.open(tmp_path / "out") as store:
        assert store.ids("ids").of(range(6)) == ["0 a", "0 b", "1 a", "1 b", "2 a", "2 b"]
        assert store["embs"].take(store.ids("ids").rows(["2 a"])).tolist() == [[2, 2]]


def test_two_files_that_hold_strings_of_one_name(tmp_path):
    for name in "ab":
        torch.save({name: torch.ones(1), "ids": [name]}, tmp_path / f"{name}.pt")
    with pytest.raises(CorruptFileError, match=r"b\.pt: holds the strings 'ids', and so does .*a\.pt; remove one"):
        js.convert(tmp_path, tmp_path / "out")


def test_two_formats_that_hold_strings_of_one_name(tmp_path):
    np.save(tmp_path / "ids.npy", np.array(["npy"]))
    torch.save({"embs": torch.ones(1), "ids": ["pt"]}, tmp_path / "a.pt")
    js.convert(tmp_path, tmp_path / "out")
    with js.open(tmp_path / "out") as store:
        assert store.ids("ids").of([0]) == ["npy"]


def test_numbered_files_of_which_one_lacks_its_strings(tmp_path):
    for i in range(3):
        held = {"embs": torch.ones(2, 2), **({"ids": ["a", "b"]} if i != 1 else {"title": "text"})}
        torch.save(held, tmp_path / f"data_{i:02}.pt")
    with pytest.raises(CorruptFileError, match="data_0"):
        js.convert(tmp_path, tmp_path / "out")


def test_chosen_tensors(tmp_path):
    source = mixed(tmp_path / "data", "unicode")
    report = js.convert(source, tmp_path / "out", tensors=["ids"])
    assert {row.name for row in report.tensors} == {"ids.values", "ids.offsets", "ids.hashes", "ids.order"}
    assert {row.name for row in js.convert(source, tmp_path / "more", tensors=["embs"]).tensors} == {"embs"}


def test_a_dataset_without_a_declaration_has_no_field_of_strings(tmp_path):
    js.convert(mixed(tmp_path / "data", "unicode"), tmp_path / "out")
    with js.Dataset(tmp_path / "out") as dataset:
        assert list(dataset[0]) == ["embs"]
    entries = {entry.name: entry.reads_per_sample for entry in js.plan(tmp_path / "out").entries}
    assert entries["ids.values"] == entries["ids.hashes"] == 0
    assert entries["embs"] == 1


# ---- the writer


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_a_writer_keeps_ids(tmp_path, fmt):
    with js.DatasetWriter(tmp_path / "set", fmt) as writer:
        writer.append("embs", EMBS)
        writer.append("ids", IDS[:2])
        writer.append_ids("ids", [])
        writer.append("ids", np.array(IDS[2:4]))
        writer.append("ids", tuple(IDS[4:]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with js.open(tmp_path / "set") as store:
            ids = store.ids("ids")
            assert ids.of(range(6)) == IDS
            assert ids.rows(IDS).tolist() == list(range(6))
            assert ids._trusted() is not None
    assert js.verify(tmp_path / "set").ok


def test_a_writer_of_no_ids(tmp_path):
    with js.DatasetWriter(tmp_path / "set") as writer:
        writer.append_ids("ids", [])
    with js.open(tmp_path / "set") as store:
        assert len(store.ids("ids")) == 0
        assert store.ids("ids").rows([]).shape == (0,)


def test_what_a_writer_refuses(tmp_path):
    with DirectoryWriter(tmp_path / "set") as writer:
        writer.append("ids", ["a"])
        with pytest.raises(IntegrityError, match="found a int at position 1"):
            writer.append("ids", ["b", 3])
        with pytest.raises(IntegrityError, match="UTF-8 cannot hold at position 0"):
            writer.append("ids", ["\ud800"])
        with pytest.raises(IntegrityError, match=r"through append_ids\(\), as before, found append\(\)"):
            writer.append("ids", torch.ones(2))
        with pytest.raises(IntegrityError, match=r"through append_ids\(\), as before, found append_ragged\(\)"):
            writer.append_ragged("ids", [[1]])
        writer.append_ragged("words", [[1]])
        with pytest.raises(IntegrityError, match=r"through append_ragged\(\), as before, found append_ids\(\)"):
            writer.append("words", ["a"])
        writer.append("embs", torch.ones(1))
        with pytest.raises(IntegrityError, match=r"through append\(\), as before, found append_ids\(\)"):
            writer.append("embs", ["a"])
        with pytest.raises(IncompatibleOptionsError, match="cannot name a tensor"):
            writer.append("../ids", ["a"])
        writer.append("ids", ["b"])
    with js.open(tmp_path / "set") as store:
        assert store.ids("ids").of([0, 1]) == ["a", "b"]


@relaxed
@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), min_size=1), min_size=1, max_size=4
    )
)
def test_blocks_of_any_strings(tmp_path, blocks):
    with DirectoryWriter(tmp_path / "set", overwrite=True) as writer:
        for block in blocks:
            writer.append("ids", block)
    every = [text for block in blocks for text in block]
    with js.open(tmp_path / "set") as store:
        assert store.ids("ids").of(range(len(every))) == every


def test_formats_that_skip_are_those_that_can_hold_strings():
    assert {name for name, fmt in FORMATS.items() if hasattr(fmt, "skipped")} == {"npy", "hdf5", "pt"}


# ---- columns of other libraries


def kept(source, target):
    convert(source, target, "safetensors")
    with js.open(target) as store:
        ids = store.ids("ids" if "ids" in {name.split(".")[0] for name in store} else "embs.ids")
        return ids.of(range(len(ids)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_a_slice_of_an_arrow_table_in_many_batches(tmp_path, stream, large):
    pa = pytest.importorskip("pyarrow")
    texts = [f"{text}-{i}" * (i % 3) for i in range(40) for text in IDS]
    table = pa.table(
        {
            "before": pa.array(["a view of some bytes that are not kept inline"] * len(texts), pa.string_view()),
            "ids": pa.array(texts, pa.large_string() if large else pa.string()),
            "word": pa.array(["x", "y"] * (len(texts) // 2)).dictionary_encode(),
            "embs": np.arange(len(texts)),
        }
    ).slice(3, 200)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    assert kept(tmp_path / "x.arrow", tmp_path / "out") == texts[3:203]


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_columns_of_strings_with_nulls_are_named_and_left_out(tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"embs": [1, 2], "ids": ["a", None]})
    if kind == "arrow":
        pytest.importorskip("pyarrow.feather").write_feather(table, tmp_path / "x.arrow", "uncompressed")
    else:
        pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "x.parquet")
    report = js.convert(tmp_path / f"x.{kind}", tmp_path / "out")
    assert any("'ids' is skipped: the column has 1 nulls in 2 rows from row 0 on" in note for note in report.notes)
    with js.open(tmp_path / "out") as store:
        assert list(store) == ["embs"]


def test_ids_of_a_directory_of_the_library_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"embs": EMBS.tolist(), "ids": IDS})
    table.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    (tmp_path / "saved" / "cache-0123456789abcdef.arrow").write_bytes(
        (tmp_path / "saved" / "data-00000-of-00003.arrow").read_bytes()
    )
    assert kept(tmp_path / "saved", tmp_path / "out") == IDS


def test_ids_of_pickles_that_are_numbered(tmp_path):
    (tmp_path / "set").mkdir()
    for number, rows in enumerate((slice(0, 2), slice(2, 6))):
        with (tmp_path / "set" / f"embs_{number:02d}.pkl").open("wb") as file:
            pickle.dump((EMBS[rows].numpy(), IDS[rows]), file, protocol=4)
    assert kept(tmp_path / "set", tmp_path / "out") == IDS
    with js.open(tmp_path / "out") as store:
        assert torch.equal(store["embs"].tensor(), EMBS)


# ---- ids that are appended


@pytest.mark.parametrize("fmt", ["safetensors", "npy", "hdf5"])
def test_ids_are_appended_with_their_rows(tmp_path, fmt):
    with js.DatasetWriter(tmp_path / "set", fmt) as writer:
        writer.append("embs", EMBS[:2])
        writer.append("ids", IDS[:2])
    for rows in (slice(2, 3), slice(3, 6)):
        with js.DatasetWriter(tmp_path / "set", mode="append") as writer:
            writer.append("embs", EMBS[rows])
            writer.append("ids", IDS[rows])
    js.convert(tmp_path / "set", tmp_path / "copy")
    for compacted in (False, True):
        if compacted:
            js.compact(tmp_path / "set", remove_old=True)
        for name in ("set", "copy"):
            with js.open(tmp_path / name) as store:
                ids = store.ids("ids")
                assert ids.of(range(6)) == IDS
                assert ids._trusted() is not None
                assert ids.rows(IDS[::-1]).tolist() == [5, 4, 3, 2, 1, 0]
                assert torch.equal(store["embs"].tensor(), EMBS)
            assert js.verify(tmp_path / name).ok


def test_rows_without_their_ids_are_not_appended(tmp_path):
    with js.DatasetWriter(tmp_path / "set") as writer:
        writer.append("embs", EMBS)
        writer.append("ids", IDS)
    writer = js.DatasetWriter(tmp_path / "set", mode="append")
    writer.append("embs", EMBS)
    with pytest.raises(IntegrityError, match="to grow alike"):
        writer.close()
    with js.open(tmp_path / "set") as store:
        assert len(store.ids("ids")) == store["embs"].n_rows == 6


def test_ids_in_shards(tmp_path):
    for number, rows in enumerate((slice(0, 1), slice(1, 4), slice(4, 6))):
        with js.DatasetWriter(tmp_path / "set", shard=number, shards=3) as writer:
            writer.append("embs", EMBS[rows])
            writer.append("ids", IDS[rows])
    with pytest.raises(DatasetNotFoundError, match="shards that were not committed"):
        js.open(tmp_path / "set")
    js.commit(tmp_path / "set")
    for number in range(2):
        with js.DatasetWriter(tmp_path / "set", mode="append", shard=number, shards=2) as writer:
            writer.append("embs", EMBS[:1])
            writer.append("ids", [f"new {number}"])
    js.commit(tmp_path / "set")
    with js.open(tmp_path / "set") as store:
        ids = store.ids("ids")
        assert ids.of(range(8)) == [*IDS, "new 0", "new 1"]
        assert ids._trusted() is not None
        assert ids.rows(["new 1", "c", "new 0", "a"]).tolist() == [7, 5, 6, 0]
    assert js.verify(tmp_path / "set").ok
