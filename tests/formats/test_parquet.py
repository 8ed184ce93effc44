from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import jasper_store as js
from jasper_store.errors import CorruptFileError, DatasetNotFoundError
from jasper_store.formats.base import Schema, Streamed
from jasper_store.formats.parquet import ParquetFormat
from jasper_store.formats.parts import join
from jasper_store.formats.registry import locate
from jasper_store.formats.streams import ByteStream
from jasper_store.formats.texts import PARTS
from tests.formats.conformance import read, same

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = np.random.default_rng(0).standard_normal((300, 8), dtype=np.float32)


def table():
    lists = [row.tolist() for row in ROWS]
    nested = [row.reshape(2, 4).tolist() for row in ROWS]
    return pa.table(
        {
            "id": [f"doc {i}" for i in range(300)],
            "fixed": pa.FixedSizeListArray.from_arrays(ROWS.ravel(), 8),
            "list": pa.array(lists, pa.list_(pa.float32())),
            "nested": pa.array(nested, pa.list_(pa.large_list(pa.float32()))),
            "n": np.arange(300, dtype=np.int32),
            "flag": np.arange(300) % 2 == 0,
            "half": ROWS[:, 0].astype(np.float16),
            "x.y": np.arange(300, dtype=np.uint16),
        }
    )


EXPECTED = {
    "fixed": ROWS,
    "list": ROWS,
    "nested": ROWS.reshape(300, 2, 4),
    "n": np.arange(300, dtype=np.int32),
    "flag": np.arange(300) % 2 == 0,
    "half": ROWS[:, 0].astype(np.float16),
    "x.y": np.arange(300, dtype=np.uint16),
}


def specs_of(path):
    return {spec.name: spec for spec in ParquetFormat().locate(path, Schema())}


def streamed(spec):
    out = torch.empty(spec.shape, dtype=spec.dtype)
    stream = ByteStream(spec)
    for part in out.split(7):
        stream.fill(part)
    stream.close()
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"row_group_size": 17},
        {"compression": "zstd", "data_page_size": 64},
        {"use_dictionary": False, "compression": "none"},
    ],
)
def test_columns(tmp_path, options):
    path = tmp_path / "x.parquet"
    pq.write_table(table(), path, **options)
    specs = specs_of(path)
    assert list(specs) == list(EXPECTED)
    for name, spec in specs.items():
        assert isinstance(spec.location, Streamed)
        assert same(streamed(spec), torch.from_numpy(EXPECTED[name]))
    (skipped,) = ParquetFormat().skipped(path, Schema())
    assert (skipped.name, skipped.reason) == ("id", "a column of string")


@pytest.mark.filterwarnings("ignore:.*is skipped:jasper_store.errors.JasperStoreWarning")
def test_conversion(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(table(), path, row_group_size=50)
    js.convert(path, tmp_path / "out")
    specs = {spec.name: spec for spec in locate(tmp_path / "out", "safetensors", Schema()).specs}
    assert specs.keys() == EXPECTED.keys() | {f"id.{part}" for part in PARTS}
    for name, values in EXPECTED.items():
        assert same(read(specs[name]), torch.from_numpy(values))
    with js.open(path) as store:
        assert np.array_equal(store["list"].take([299, 3]).numpy(), ROWS[[299, 3]])


def test_shards_are_one_stream(tmp_path):
    paths = [tmp_path / f"train-{i:05}-of-00003.parquet" for i in range(3)]
    for i, path in enumerate(paths):
        pq.write_table(table().slice(100 * i, 100), path)
    spec = join("fixed", [specs_of(path)["fixed"] for path in paths])
    assert spec.paths == tuple(paths)
    assert same(streamed(spec), torch.from_numpy(ROWS))
    np.save(tmp_path / "n.npy", EXPECTED["n"])
    mixed = [*locate(tmp_path / "n.npy", "auto", Schema()).specs, specs_of(paths[1])["n"]]
    with pytest.raises(CorruptFileError, match="expected a part of 'n'"):
        join("n", mixed)


@pytest.mark.filterwarnings("ignore:.*is skipped:jasper_store.errors.JasperStoreWarning")
def test_a_directory_of_shards(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(3):
        pq.write_table(table().slice(100 * i, 100), source / f"train-{i:05}-of-00003.parquet")
    with js.open(source) as store:
        assert np.array_equal(store["list"].take([299, 3, 150]).numpy(), ROWS[[299, 3, 150]])
    js.convert(source, tmp_path / "out")
    specs = {spec.name: spec for spec in locate(tmp_path / "out", "safetensors", Schema()).specs}
    assert {
        name: same(read(specs[name]), torch.from_numpy(values)) for name, values in EXPECTED.items()
    } == dict.fromkeys(EXPECTED, True)
    (skipped,) = [one for one in locate(source, "auto", Schema()).skipped if one.name == "id"]
    assert skipped.path == source / "train-00000-of-00003.parquet"


def test_no_rows(tmp_path):
    pq.write_table(table().slice(0, 0), tmp_path / "x.parquet")
    assert {name: spec.shape for name, spec in specs_of(tmp_path / "x.parquet").items()} == {
        "fixed": (0, 8),
        "list": (0, 0),
        "nested": (0, 0, 0),
        "n": (0,),
        "flag": (0,),
        "half": (0,),
        "x.y": (0,),
    }


@pytest.mark.parametrize(
    ("column", "found"),
    [
        ([[1.0, 2.0]] * 20 + [[1.0]], "has lists of 2 and of 1 values"),
        ([1.0] * 20 + [None], "has 1 nulls"),
        ([[1.0, 2.0]] * 20 + [[1.0, None]], "has 1 nulls"),
        ([[1.0, 2.0]] * 20 + [None], "has 1 nulls"),
    ],
)
def test_rows_that_do_not_fit_are_found_when_they_are_read(tmp_path, column, found):
    pq.write_table(pa.table({"emb": column}), tmp_path / "x.parquet")
    with pytest.raises(CorruptFileError, match=f"column 'emb' {found}"):
        streamed(specs_of(tmp_path / "x.parquet")["emb"])
    with pytest.raises(CorruptFileError, match=f"column 'emb' {found}"):
        js.convert(tmp_path / "x.parquet", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_two_columns_of_one_name(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["n", "n"]), tmp_path / "x.parquet")
    with pytest.raises(CorruptFileError, match="2 columns are called 'n'"):
        specs_of(tmp_path / "x.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 100, b"x" * 1000])
def test_what_is_no_parquet(tmp_path, content):
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(CorruptFileError, match="pyarrow says"):
        specs_of(tmp_path / "x.parquet")


def test_nothing_there(tmp_path):
    with pytest.raises(DatasetNotFoundError, match="no such file"):
        specs_of(tmp_path / "x.parquet")


def test_damaged_files(tmp_path):
    # In a process of its own: what is damaged is parsed by pyarrow.
    pq.write_table(table().slice(0, 20), tmp_path / "x.parquet", row_group_size=7)
    done = subprocess.run(
        [sys.executable, "-m", "tests.formats.damage", "parquet", "0", "200", tmp_path / "x.parquet"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_without_pyarrow(tmp_path):
    pq.write_table(table(), tmp_path / "x.parquet")
    code = (
        "import sys, pathlib\n"
        "sys.modules['pyarrow'] = None\n"
        "import numpy as np\n"
        "from jasper_store.errors import IncompatibleOptionsError\n"
        "from jasper_store.formats.registry import locate\n"
        "from jasper_store.formats.base import Schema\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "for place in (folder, folder / 'x.parquet'):\n"
        "    try:\n"
        "        locate(place, 'auto', Schema())\n"
        "    except IncompatibleOptionsError as exc:\n"
        "        assert \"pip install 'jasper-store[arrow]'\" in str(exc)\n"
        "    else:\n"
        "        raise SystemExit('no error')\n"
        "np.save(folder / 'emb.npy', np.ones(3))\n"
        "located = locate(folder, 'auto', Schema())\n"
        "assert [s.name for s in located.specs] == ['emb'], located\n"
        "assert [s.name for s in located.skipped] == ['x'], located\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_written_in_a_format_that_is_only_read(tmp_path):
    np.save(tmp_path / "emb.npy", ROWS)
    for name in ("arrow", "faiss", "bin", "npz", "parquet"):
        with pytest.raises(js.errors.UnknownNameError, match=f"{name} is read and never written"):
            js.convert(tmp_path / "emb.npy", tmp_path / "out", format=name)
        with pytest.raises(js.errors.UnknownNameError, match=f"{name} is read and never written"):
            js.DatasetWriter(tmp_path / "out", format=name)
    assert not (tmp_path / "out").exists()
