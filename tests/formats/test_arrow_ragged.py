"""Arrow columns of lists of different lengths: mapped where their items lie, and kept by a conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jasper_store as js
from jasper_store.errors import CorruptFileError
from jasper_store.formats.arrow.format import ArrowFormat
from jasper_store.formats.base import Inline, Schema
from jasper_store.formats.registry import locate

pa = pytest.importorskip("pyarrow")
ipc = pytest.importorskip("pyarrow.ipc")

RNG = np.random.default_rng(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*is skipped:jasper_store.errors.JasperStoreWarning")

LISTS = [RNG.integers(-9, 9, RNG.integers(0, 6)).tolist() for _ in range(200)]


def write(path: Path, table: Any, kind: str = "file", chunk: int | None = None) -> Path:
    opened = ipc.new_file if kind == "file" else ipc.new_stream
    with opened(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=chunk)
    return path


def skipped(path: Path) -> dict[str, str]:
    return {one.name: one.reason for one in ArrowFormat().skipped(path, Schema())}


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize(("start", "stop", "chunk"), [(0, 200, None), (0, 200, 7), (31, 170, 20), (2, 9, 1)])
@pytest.mark.parametrize("item", ["int8", "uint16", "int64", "float32"])
def test_rows_are_those_of_pyarrow(
    tmp_path: Path, kind: str, start: int, stop: int, chunk: int | None, item: str
) -> None:
    lists = [[value % 100 for value in row] for row in LISTS]
    columns = {
        "small": pa.array(lists, pa.list_(getattr(pa, item)())),
        "view": pa.array(["a string that is not kept inline " * (i % 2) for i in range(200)], pa.string_view()),
        "large": pa.array(lists, pa.large_list(getattr(pa, item)())),
    }
    path = write(tmp_path / "x.arrow", pa.table(columns).slice(start, stop - start), kind, chunk)
    with js.open(path, use_mmap=True) as store:
        for name in ("small", "large"):
            assert str(store[f"{name}.values"].dtype) == f"torch.{item}"
            rows = store.ragged(name)
            assert [row.tolist() for row in rows] == lists[start:stop]
            assert store[f"{name}.values"].placement == "mmap"
    assert set(skipped(path)) == {"view"}


def test_no_items_at_all_but_in_one_record_batch(tmp_path: Path) -> None:
    lists: list[list[int]] = [[]] * 9 + [[1, 2]] + [[]] * 5
    with js.open(write(tmp_path / "x.arrow", pa.table({"x": lists}), chunk=4)) as store:
        assert [row.tolist() for row in store.ragged("x")] == lists


@pytest.mark.parametrize(
    ("column", "why"),
    [
        (pa.array([[1], [None, 2], [2, 3]]), "nulls"),
        (pa.array([[1], [2, 3]], pa.list_(pa.uint8())), "cast it to int16"),
        (pa.array([[[1], [2]], [[3, 4]]]), "lists of lists"),
    ],
)
def test_what_is_no_ragged_tensor_is_skipped(tmp_path: Path, column: Any, why: str) -> None:
    path = write(tmp_path / "x.arrow", pa.table({"x": column, "n": list(range(len(column)))}))
    assert [spec.name for spec in ArrowFormat().locate(path, Schema())] == ["n"]
    assert why in skipped(path)["x"]


def test_rows_that_are_null_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.arrow", pa.table({"x": pa.array([[1], None, [2, 3]])}))
    with pytest.raises(CorruptFileError, match="has 1 nulls"):
        ArrowFormat().locate(path, Schema())


def test_a_file_of_two_columns_that_would_be_one_tensor_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.arrow", pa.table({"x": [[1], [2, 3]], "x.values": [1, 2]}))
    with pytest.raises(CorruptFileError, match=r"2 columns are called 'x\.values'"):
        ArrowFormat().locate(path, Schema())


def test_offsets_that_leave_the_items_are_refused(tmp_path: Path) -> None:
    table = pa.table({"x": pa.array([[1, 2, 3], [4]], pa.list_(pa.int32()))})
    path = write(tmp_path / "x.arrow", table)
    raw = path.read_bytes()
    there = np.array([0, 3, 4], np.int32).tobytes()
    assert raw.count(there) == 1
    for offsets in ([0, 3, 2**30], [0, -1, 4], [-4, 3, 4], [0, 4, 3]):
        path.write_bytes(raw.replace(there, np.array(offsets, np.int32).tobytes()))
        with pytest.raises(CorruptFileError):
            ArrowFormat().locate(path, Schema())


@pytest.mark.parametrize("target", ["safetensors", "npy", "hdf5", "pt"])
def test_a_saved_dataset_of_shards_is_served_converted_and_verified(tmp_path: Path, target: str) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict(
        {"tokens": LISTS, "label": list(range(200)), "text": [str(i) for i in range(200)]}
    )
    saved.save_to_disk(tmp_path / "saved", num_shards=3)
    again = datasets.load_from_disk(tmp_path / "saved")
    with js.open(tmp_path / "saved", use_mmap=True) as store:
        assert [row.tolist() for row in store.ragged("tokens")] == again["tokens"][:]
        offsets = next(spec for spec in store.specs if spec.name == "tokens.offsets")
        assert isinstance(offsets.location, Inline)
    with js.Dataset(tmp_path / "saved") as dataset:
        batch = dataset[[7, 199, 0]]
        assert batch["tokens.values"].tolist() == LISTS[7] + LISTS[199] + LISTS[0]
    js.convert(tmp_path / "saved", tmp_path / "made", format=target)
    assert js.verify(tmp_path / "made").ok
    with js.open(tmp_path / "made") as store:
        assert [row.tolist() for row in store.ragged("tokens")] == LISTS
        assert torch.equal(store["label"].tensor(), torch.arange(200))
        assert store.ids("text").of([7]) == ["7"]


def test_shards_are_joined_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for k in range(3):
        write(tmp_path / f"part-{k:05d}-of-00003.arrow", pa.table({"x": LISTS[k * 50 : k * 50 + 50]}), chunk=8)
    specs = {spec.name: spec for spec in locate(tmp_path, "auto", Schema()).specs}
    assert specs["x.offsets"].shape == (151,)
    with js.open(tmp_path) as store:
        assert [row.tolist() for row in store.ragged("x")] == LISTS[:150]
