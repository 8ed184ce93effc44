from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import jasper_store as js
from jasper_store.errors import CorruptFileError, DatasetNotFoundError
from jasper_store.formats.arrow.format import ArrowFormat
from jasper_store.formats.base import Extent, Parts, Schema
from jasper_store.formats.files import dtype_name
from jasper_store.formats.parts import join
from jasper_store.formats.registry import locate
from tests.formats import damage
from tests.formats.confined import open_confined
from tests.formats.places import in_place

pa = pytest.importorskip("pyarrow")
ipc = pytest.importorskip("pyarrow.ipc")
feather = pytest.importorskip("pyarrow.feather")

KINDS = {"file": ipc.new_file, "stream": ipc.new_stream}
RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((100, 8), dtype=np.float32)


def write(path, table, kind="file", chunk=None, **options):
    with KINDS[kind](str(path), table.schema, options=ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=chunk)
    return path


def fixed(rows):
    return pa.FixedSizeListArray.from_arrays(rows.ravel(), rows.shape[1])


def read(path):
    return {spec.name: spec for spec in ArrowFormat().locate(path, Schema())}


def skipped(path):
    return {one.name: one.reason for one in ArrowFormat().skipped(path, Schema())}


def refusal(path):
    with pytest.raises(CorruptFileError) as caught:
        read(path)
    assert caught.value.path == path
    assert str(path) in str(caught.value)
    return str(caught.value)


NUMBERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [None, 7, 1])
def test_numbers_of_every_dtype(tmp_path, kind, chunk):
    values = {name: RNG.integers(0, 100, 20).astype(name) for name in NUMBERS}
    path = write(tmp_path / "x.arrow", pa.table(values), kind, chunk)
    specs = read(path)
    assert list(specs) == list(NUMBERS)
    for name, spec in specs.items():
        assert dtype_name(spec.dtype) == name
        assert isinstance(spec.location, Extent if chunk is None else Parts)
        assert np.array_equal(in_place(spec), values[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "stop", "chunk"), [(0, 100, 100), (0, 100, 33), (13, 77, 10), (99, 100, 1)])
def test_lists_of_one_length(tmp_path, kind, start, stop, chunk):
    lists = [row.tolist() for row in ROWS]
    nested = [row.reshape(2, 4).tolist() for row in ROWS]
    table = pa.table(
        {
            "fixed": fixed(ROWS),
            "list": pa.array(lists, pa.list_(pa.float32())),
            "large": pa.array(lists, pa.large_list(pa.float32())),
            "nested": pa.array(nested, pa.list_(pa.large_list(pa.float32()))),
            "fixed_nested": pa.array(nested, pa.list_(pa.list_(pa.float32(), 4), 2)),
            "mixed": pa.array(nested, pa.list_(pa.list_(pa.float32(), 4))),
            "other": pa.array(nested, pa.list_(pa.list_(pa.float32()), 2)),
            "tensor": pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), (2, 2, 2)), fixed(ROWS)),
            "id": np.arange(100),
        }
    ).slice(start, stop - start)
    specs = read(write(tmp_path / "x.arrow", table, kind, chunk))
    assert {name: spec.shape[1:] for name, spec in specs.items()} == {
        "fixed": (8,),
        "list": (8,),
        "large": (8,),
        "nested": (2, 4),
        "fixed_nested": (2, 4),
        "mixed": (2, 4),
        "other": (2, 4),
        "tensor": (2, 2, 2),
        "id": (),
    }
    assert np.array_equal(in_place(specs.pop("id")), np.arange(start, stop))
    for spec in specs.values():
        assert np.array_equal(in_place(spec).reshape(-1, 8), ROWS[start:stop]), spec.name


def test_columns_beside_strings_and_whatever_else(tmp_path):
    # Each type takes another number of buffers, so that numbers behind them are found only if all are counted right.
    n = len(ROWS)
    others = {
        "text": pa.array([str(i) for i in range(n)]),
        "large_text": pa.array([str(i) for i in range(n)], pa.large_string()),
        "view": pa.array(["long enough for a buffer of its own " * (i % 3) for i in range(n)], pa.string_view()),
        "bytes": pa.array([b"a"] * n),
        "width": pa.array([b"abcd"] * n, pa.binary(4)),
        "flag": pa.array([True, None] * (n // 2)),
        "nothing": pa.nulls(n),
        "struct": pa.array([{"a": 1, "b": "x"}] * n),
        "map": pa.array([[("k", 1)]] * n, pa.map_(pa.string(), pa.int64())),
        "sparse": pa.UnionArray.from_sparse(pa.array([0] * n, pa.int8()), [pa.array([1] * n)]),
        "dense": pa.UnionArray.from_dense(
            pa.array([0] * n, pa.int8()), pa.array(range(n), pa.int32()), [pa.array([1] * n)]
        ),
        "run": pa.RunEndEncodedArray.from_arrays([n], [1]),
        "word": pa.array(["a", "b"] * (n // 2)).dictionary_encode(),
        "words": pa.array([["a"]] * n),
        "when": pa.array([1] * n, pa.timestamp("s")),
        "list_view": pa.array([[1.0]] * n, pa.list_view(pa.float64())),
        "ragged": pa.array([[1] * (i % 3) for i in range(n)]),
        "view_again": pa.array(["another that is not kept inline " * (i % 2) for i in range(n)], pa.binary_view()),
    }
    columns = {}
    for i, (name, column) in enumerate(others.items()):
        columns[name] = column
        columns[f"n{i}"] = fixed(ROWS + i)
    table = pa.table(columns)
    for kind in KINDS:
        for batches in (None, 30):
            whole = table if batches is None else table.drop_columns(["run"])
            path = write(tmp_path / f"{kind}-{batches}.arrow", whole, kind, batches)
            specs = read(path)
            assert list(specs) == [*(f"n{i}" for i in range(len(others))), "ragged.values", "ragged.offsets"]
            for i in range(len(others)):
                assert np.array_equal(in_place(specs[f"n{i}"]), ROWS + i), list(others)[i]
            assert set(skipped(path)) == set(whole.column_names) - set(specs) - {"ragged"}
    reasons = skipped(path)
    assert reasons["text"] == reasons["word"] == "a column of strings"
    assert reasons["words"] == "a column of lists of strings"
    assert "cast it to int8" in reasons["flag"]


def test_lengths_that_differ_between_record_batches_only(tmp_path):
    rows = [[1.0, 2.0]] * 5 + [[1.0, 2.0, 3.0]] * 5
    path = write(tmp_path / "x.arrow", pa.table({"x": rows, "n": np.arange(10)}), chunk=5)
    assert list(read(path)) == ["n", "x.values", "x.offsets"]
    grids = [[[1.0, 2.0]]] * 5 + [[[1.0], [2.0]]] * 5
    path = write(tmp_path / "y.arrow", pa.table({"x": grids, "n": np.arange(10)}), chunk=5)
    assert list(read(path)) == ["n"]
    assert "[1, 2] and [2, 1]" in skipped(path)["x"]


def test_no_rows_and_empty_lists(tmp_path):
    table = pa.table(
        {
            "x": fixed(ROWS),
            "n": np.arange(100),
            "list": pa.array([[1]] * 100),
            "e": pa.array([[]] * 100, pa.list_(pa.int64())),
        }
    )
    shapes = {name: spec.shape for name, spec in read(write(tmp_path / "a.arrow", table, chunk=9)).items()}
    assert shapes == {"x": (100, 8), "n": (100,), "list": (100, 1), "e": (100, 0)}
    for kind in KINDS:
        specs = read(write(tmp_path / f"{kind}.arrow", table.slice(0, 0), kind))
        assert {name: spec.shape for name, spec in specs.items()} == {
            "x": (0, 8),
            "n": (0,),
            "list": (0, 0),
            "e": (0, 0),
        }


def test_record_batches_without_rows_are_no_parts(tmp_path):
    batch = pa.table({"x": fixed(ROWS)}).to_batches()[0]
    path = tmp_path / "x.arrow"
    with ipc.new_stream(str(path), batch.schema) as writer:
        for one in (batch.slice(0, 0), batch, batch.slice(0, 0), batch.slice(50), batch.slice(0, 0)):
            writer.write_batch(one)
    (spec,) = read(path).values()
    assert isinstance(spec.location, Parts)
    assert len(spec.location) == 2
    assert np.array_equal(in_place(spec), np.concatenate([ROWS, ROWS[50:]]))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_table(tmp_path, data):
    n = data.draw(st.integers(0, 40))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = data.draw(st.sampled_from(NUMBERS))
    values = np.arange(n * int(np.prod(shape, dtype=int)), dtype=np.int64).astype(dtype)
    array = pa.array(values)
    for size in reversed(shape):
        lists = data.draw(st.sampled_from(["fixed", "list", "large"]))
        # Offsets and fixed sizes from the innermost dimension out; a fixed size of 0 would lose the number of rows.
        rows = len(array) // size if size else 0
        if lists == "fixed" and size:
            array = pa.FixedSizeListArray.from_arrays(array, size)
        else:
            offsets = np.arange(rows + 1) * size
            kind = pa.LargeListArray if lists == "large" else pa.ListArray
            array = kind.from_arrays(pa.array(offsets, pa.int64() if lists == "large" else pa.int32()), array)
    table = pa.table({"skipped": [str(i) for i in range(len(array))], "x": array, "id": np.arange(len(array))})
    start = data.draw(st.integers(0, len(table)))
    table = table.slice(start, data.draw(st.integers(0, len(table) - start)))
    kind, chunk = data.draw(st.sampled_from(list(KINDS))), data.draw(st.sampled_from([None, 1, 3, 16]))
    specs = read(write(tmp_path / "x.arrow", table, kind, chunk))
    assert np.array_equal(in_place(specs["id"]), table["id"].to_numpy())
    found = in_place(specs["x"])
    assert found.tolist() == table["x"].to_pylist()


# ---- what is refused


def test_nulls_are_refused_wherever_they_are(tmp_path):
    for name, column in {
        "row": pa.array([1.0, None, 3.0]),
        "list": pa.array([[1.0], None, [2.0]], pa.list_(pa.float32(), 1)),
        "item": pa.array([[1.0], [None], [2.0]]),
    }.items():
        text = refusal(write(tmp_path / "x.arrow", pa.table({name: column})))
        assert f"'{name}'" in text
        assert "1 nulls" in text
        assert "fill_null" in text


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("kind", KINDS)
def test_compression_is_refused(tmp_path, compression, kind):
    path = write(tmp_path / "x.arrow", pa.table({"emb": fixed(ROWS)}), kind, compression=compression)
    assert "column 'emb' cannot be read in place: it is compressed; write it again without" in refusal(path)


def test_feather(tmp_path):
    table = pa.table({"x": fixed(ROWS)})
    path = tmp_path / "x.feather"
    feather.write_feather(table, path, compression="uncompressed")
    (spec,) = locate(path, "auto", Schema()).specs
    assert np.array_equal(in_place(spec), ROWS)
    feather.write_feather(table, path)
    assert "compression='uncompressed'" in refusal(path)
    path.write_bytes(b"FEA1" + bytes(100) + b"FEA1")
    assert "version 2" in refusal(path)


def test_dictionaries_of_numbers_are_refused(tmp_path):
    path = write(tmp_path / "x.arrow", pa.table({"kind": pa.array([5, 5, 7]).dictionary_encode()}), "stream")
    assert "column 'kind' cannot be read in place: it is encoded by a dictionary; decode it" in refusal(path)


def test_two_columns_of_one_name(tmp_path):
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["n", "n"])
    assert "2 columns are called 'n'" in refusal(write(tmp_path / "x.arrow", table))


def test_big_endian_is_refused(tmp_path):
    path = write(tmp_path / "x.arrow", pa.table({"n": [1]}), "stream")
    raw = bytearray(path.read_bytes())
    (root,) = struct.unpack_from("<I", raw, 8)
    header = 8 + root + field_at(raw, 8 + root, 2)
    schema = header + struct.unpack_from("<I", raw, header)[0]
    # The byte order is the schema's first field, which pyarrow leaves out where it is little. So the vtable is told that
    # it is where two bytes are 1: the number of columns.
    assert field_at(raw, schema, 0) == 0
    columns = schema + field_at(raw, schema, 1)
    columns += struct.unpack_from("<I", raw, columns)[0]
    struct.pack_into("<H", raw, schema - struct.unpack_from("<i", raw, schema)[0] + 4, columns - schema)
    path.write_bytes(raw)
    assert "big-endian" in refusal(path)


def field_at(raw, table, number):
    vtable = table - struct.unpack_from("<i", raw, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", raw, vtable)[0]:
        return 0
    return struct.unpack_from("<H", raw, vtable + 4 + 2 * number)[0]


# ---- damage


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"ARROW1", b"ARROW1\0\0" * 10, b"\xff" * 8, b"\xff" * 4 + bytes(4), b"x" * 10_000]
)
def test_what_is_of_no_format(tmp_path, content):
    path = tmp_path / "x.arrow"
    path.write_bytes(content)
    refusal(path)


def test_a_stream_that_was_never_finished_is_refused(tmp_path):
    path = write(tmp_path / "x.arrow", pa.table({"x": fixed(ROWS)}), "stream", 10)
    raw = path.read_bytes()
    path.write_bytes(raw[:-8])
    assert "end mark was expected" in refusal(path)
    assert len(ipc.open_stream(str(path)).read_all()) == 100  # pyarrow takes what is there for all


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_or_read_inside_the_file(tmp_path, kind):
    table = pa.table(
        {
            "t": [str(i) for i in range(20)],
            "x": fixed(ROWS[:20]),
            "l": ROWS[:20].tolist(),
            "r": [[i] * (i % 3) for i in range(20)],
            "n": np.arange(20),
        }
    )
    path = write(tmp_path / "x.arrow", table, kind, 6)
    outcomes = damage.run("arrow", path, tmp_path, 1, 600)
    assert outcomes["cut refused"] > 500
    assert outcomes["flip refused"] > 20


def test_hostile_claims_take_neither_time_nor_memory(tmp_path):
    table = pa.table({"l": ROWS.tolist(), "x": fixed(ROWS), "r": [[i] * (i % 3) for i in range(100)]})
    sound = write(tmp_path / "sound.arrow", table, "file", 10).read_bytes()
    footer = int.from_bytes(sound[-10:-6], "little")
    start = len(sound) - 10 - footer
    paths = []
    # Every number of 4 bytes of the metadata becomes as large as it can be, with a sign or without, in turn.
    places = [*range(8, 400, 4), *range(start, len(sound) - 10, 4)]
    for i, place in enumerate(places):
        raw = bytearray(sound)
        raw[place : place + 4] = (b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff")[i % 2]
        path = tmp_path / f"{i}.arrow"
        path.write_bytes(raw)
        paths.append(path)
    for name, outcome in open_confined("arrow", paths, seconds=10, nbytes=1 << 30).items():
        assert outcome.what in {"refused", "opened"}, (name, outcome)
        assert outcome.grown < 32 << 20, (name, outcome)


def test_a_batch_that_the_footer_lists_twice(tmp_path):
    path = write(tmp_path / "x.arrow", pa.table({"x": fixed(ROWS)}), "file", 50)
    raw = bytearray(path.read_bytes())
    with ipc.open_file(str(path)) as reader:
        assert reader.num_record_batches == 2
    footer = len(raw) - 10 - int.from_bytes(raw[-10:-6], "little")
    root = footer + struct.unpack_from("<I", raw, footer)[0]
    blocks = root + field_at(raw, root, 3)
    blocks += struct.unpack_from("<I", raw, blocks)[0]
    assert struct.unpack_from("<I", raw, blocks)[0] == 2
    raw[blocks + 4 + 24 : blocks + 4 + 48] = raw[blocks + 4 : blocks + 4 + 24]
    path.write_bytes(raw)
    assert "not one after another" in refusal(path)


def test_pyarrow_is_not_needed(tmp_path):
    path = write(tmp_path / "x.arrow", pa.table({"x": fixed(ROWS)}), "stream", 10)
    code = (
        "import sys, pathlib\n"
        "sys.modules['pyarrow'] = None\n"
        "from jasper_store.formats.registry import locate\n"
        "from jasper_store.formats.base import Schema\n"
        f"(spec,) = locate(pathlib.Path({str(path)!r}), 'auto', Schema()).specs\n"
        "assert spec.shape == (100, 8)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- what the library datasets writes


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    home = tmp_path_factory.mktemp("hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        found = pytest.importorskip("datasets")
        found.disable_progress_bars()
        yield found


def hf_dataset(datasets):
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "emb": datasets.Sequence(datasets.Value("float32")),
            "fixed": datasets.Sequence(datasets.Value("float32"), length=8),
            "grid": datasets.Array2D((2, 4), "float32"),
            "label": datasets.ClassLabel(names=["a", "b"]),
        }
    )
    data = {
        "id": [f"doc {i}" for i in range(100)],
        "emb": ROWS.tolist(),
        "fixed": ROWS.tolist(),
        "grid": ROWS.reshape(-1, 2, 4).tolist(),
        "label": [i % 2 for i in range(100)],
    }
    return datasets.Dataset.from_dict(data, features=features)


def test_shards_of_save_to_disk(tmp_path, datasets):
    root = tmp_path / "saved"
    hf_dataset(datasets).save_to_disk(root, num_shards=3)
    shards = sorted(root.glob("data-*-of-00003.arrow"))
    assert len(shards) == 3
    located = [read(path) for path in shards]
    assert list(located[0]) == ["emb", "fixed", "grid", "label"]
    again = datasets.load_from_disk(root).with_format("numpy")
    for name in located[0]:
        whole = join(name, [specs[name] for specs in located])
        assert np.array_equal(in_place(whole), again[:][name])
    assert skipped(shards[0]) == {"id": "a column of strings"}


def test_a_directory_of_one_file(tmp_path, datasets):
    root = tmp_path / "saved"
    hf_dataset(datasets).save_to_disk(root)
    (root / "cache-0123456789abcdef.arrow").write_bytes(b"of map")
    (root / "left-over.arrow").write_bytes(b"of an earlier save")
    located = locate(root, "auto", Schema())
    assert located.format == "arrow"
    assert {spec.name: spec.shape for spec in located.specs} == {
        "emb": (100, 8),
        "fixed": (100, 8),
        "grid": (100, 2, 4),
        "label": (100,),
    }
    assert {one.name for one in located.skipped} == {"id", "cache-0123456789abcdef", "left-over"}
    (root / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(CorruptFileError, match=r"lists the file 'data-00000-of-00001\.arrow', which is not there"):
        locate(root, "auto", Schema())


def test_a_directory_of_shards(tmp_path, datasets):
    root = tmp_path / "saved"
    hf_dataset(datasets).save_to_disk(root, num_shards=3)
    specs = {spec.name: spec for spec in locate(root, "auto", Schema()).specs}
    assert list(specs) == ["emb", "fixed", "grid", "label"]
    assert np.array_equal(in_place(specs["grid"]).reshape(100, 8), ROWS)
    assert len(specs["emb"].paths) == 3


@pytest.mark.filterwarnings("ignore:.*is skipped:jasper_store.errors.JasperStoreWarning")
@pytest.mark.parametrize("use_mmap", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_saved_dataset_is_opened_trained_from_verified_and_converted(tmp_path, datasets, use_mmap, shards):
    root = tmp_path / "saved"
    saved = hf_dataset(datasets)
    saved.save_to_disk(root, num_shards=shards)
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    rows = np.array([99, 0, 34, 33, 67, 0])
    with pytest.warns(js.errors.JasperStoreWarning, match="'id' is skipped: a column of strings"):
        js.open(root).close()
    with js.open(root, use_mmap=use_mmap) as store:
        assert store["emb"].placement == ("mmap" if use_mmap else "ram")
        assert np.array_equal(store["emb"].take(torch.from_numpy(rows)).numpy(), ROWS[rows])
        assert np.array_equal(store["label"].take(torch.from_numpy(rows)).numpy(), rows % 2)
    with js.Dataset(root, {"x": "emb[i]", "grid": "grid[i]", "y": "label[i]"}, use_mmap=use_mmap) as dataset:
        loader = js.create_loader(dataset, batch_size=32, shuffle=False, drop_last=False)
        batches = list(loader)
    assert np.array_equal(torch.cat([batch["x"] for batch in batches]).numpy(), ROWS)
    assert np.array_equal(torch.cat([batch["grid"] for batch in batches]).numpy(), ROWS.reshape(-1, 2, 4))
    assert torch.cat([batch["y"] for batch in batches]).tolist() == saved["label"]
    assert js.verify(root).ok
    js.convert(root, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.json")} == {"dataset_info.json", "jasper_store.json"}
    (emb,) = [spec for spec in locate(tmp_path / "out", "safetensors", Schema()).specs if spec.name == "emb"]
    assert np.array_equal(in_place(emb), ROWS)
    after = {path.name: path.read_bytes() for path in root.iterdir() if path.name != "jasper_store.json"}
    assert after.keys() - before.keys() <= {name for name in after if name.startswith(".")}
    assert all(after[name] == content for name, content in before.items())


def test_a_dataset_dict_says_which_directory_to_open(tmp_path, datasets):
    root = tmp_path / "saved"
    datasets.DatasetDict({"train": hf_dataset(datasets), "test": hf_dataset(datasets)}).save_to_disk(root)
    with pytest.raises(DatasetNotFoundError, match="open one of them") as caught:
        locate(root, "auto", Schema())
    assert str(root / "train") in str(caught.value)
    assert len(locate(root / "train", "auto", Schema()).specs) == 4


def test_splits_beside_each_other_as_in_the_cache_of_the_hub(tmp_path, datasets):
    hf_dataset(datasets).save_to_disk(tmp_path / "saved")
    raw = (tmp_path / "saved" / "data-00000-of-00001.arrow").read_bytes()
    root = tmp_path / "cache"
    root.mkdir()
    (root / "dataset_info.json").write_text("{}")
    (root / "emb-train-00000-of-00001.arrow").write_bytes(raw)
    assert len(locate(root, "auto", Schema()).specs) == 4
    (root / "emb-test.arrow").write_bytes(raw)
    with pytest.raises(
        DatasetNotFoundError, match=r"expected the files of one split, found those of emb-test, emb-train"
    ):
        locate(root, "auto", Schema())
    assert len(locate((root / "emb-test.arrow",), "auto", Schema()).specs) == 4


@pytest.mark.parametrize(
    "state",
    [
        "[]",
        "{",
        '{"_data_files": 3}',
        '{"_data_files": [{"filename": "../x.arrow"}]}',
        '{"_data_files": [{}]}',
        '{"_data_files": [{"filename": "' + 300 * "a" + '"}]}',
    ],
)
def test_a_state_that_makes_no_sense(tmp_path, state):
    write(tmp_path / "x.arrow", pa.table({"n": [1]}))
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(CorruptFileError, match=r"state\.json"):
        locate(tmp_path, "arrow", Schema())


def test_rows_selected_by_another_file(tmp_path):
    write(tmp_path / "dataset.arrow", pa.table({"n": [1]}))
    (tmp_path / "state.json").write_text(
        '{"_data_files": [{"filename": "dataset.arrow"}], "_indices_data_files": [{"filename": "indices.arrow"}]}'
    )
    with pytest.raises(CorruptFileError, match="flatten_indices"):
        locate(tmp_path, "arrow", Schema())


# ---- beside other formats


def test_tensors_beside_those_of_other_formats(tmp_path):
    np.save(tmp_path / "labels.npy", np.arange(100))
    write(tmp_path / "emb.arrow", pa.table({"emb": fixed(ROWS), "id": ["x"] * 100}))
    (tmp_path / "broken.arrow").write_bytes(b"not at all")
    located = locate(tmp_path, "auto", Schema())
    assert located.format == "npy"
    assert {spec.name for spec in located.specs} == {"labels", "emb"}
    assert {one.name: one.path.name for one in located.skipped} == {"broken": "broken.arrow", "id": "emb.arrow"}
    with pytest.raises(CorruptFileError, match=r"broken\.arrow"):
        locate(tmp_path, "arrow", Schema())


def test_a_tensor_that_is_there_twice_is_the_one_that_is_written_here(tmp_path):
    np.save(tmp_path / "emb.npy", ROWS)
    write(tmp_path / "emb.arrow", pa.table({"emb": fixed(ROWS), "n": np.arange(100)}))
    located = locate(tmp_path, "auto", Schema())
    assert {spec.name: spec.path.suffix for spec in located.specs} == {"emb": ".npy", "n": ".arrow"}


def test_nothing_but_strings(tmp_path):
    path = write(tmp_path / "x.arrow", pa.table({"id": ["a"]}))
    for place in (path, tmp_path):
        with pytest.raises(DatasetNotFoundError, match=r"id \(a column of strings\)"):
            locate(place, "auto", Schema())


def test_torch_dtypes(tmp_path):
    (spec,) = read(write(tmp_path / "x.arrow", pa.table({"x": fixed(ROWS)}))).values()
    assert (spec.dtype, spec.shape, spec.path) == (torch.float32, (100, 8), Path(tmp_path / "x.arrow"))


def test_a_state_of_another_program_is_copied_by_a_conversion(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write(source / "x.arrow", pa.table({"n": [1]}))
    (source / "state.json").write_text('{"step": 3}')
    js.convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "state.json").read_text() == '{"step": 3}'
