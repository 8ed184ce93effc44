from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from jasper_store.errors import (
    CorruptFileError,
    IncompatibleOptionsError,
    UnknownNameError,
)
from jasper_store.formats.base import Chunked, Extent, Inline, Schema
from jasper_store.formats.files import open_for_reading
from jasper_store.formats.hdf5.header import Headers
from jasper_store.formats.hdf5.writer import CHUNK_NBYTES
from jasper_store.formats.registry import skipped_in
from tests.formats.conformance import FormatSuite, read, relaxed, same, values, write

PLUGINS = ("blosc", "zstd", "lz4") if importlib.util.find_spec("hdf5plugin") else ()
SCHEMA = Schema(
    required=frozenset({"rows", "ids", "other"}),
    hdf5_paths={"rows": "embeddings/rows", "ids": "pairs/ids", "other": "other/one"},
    hdf5_aliases={"old/rows": "rows", "one": "other"},
)


class TestHdf5(FormatSuite):
    name = "hdf5"
    compressions = (None, "gzip", "lzf", *PLUGINS)
    rows_may_be_unknown = False

    def peer(self, path, name, dtype):
        if PLUGINS:
            import hdf5plugin  # noqa: F401 - registers the filters with h5py
        with h5py.File(path) as file:
            tensor = torch.from_numpy(np.asarray(file[name][()]))
            if dtype == torch.bfloat16:
                assert file[name].attrs["torch_dtype"] == b"bfloat16"
                tensor = tensor.view(torch.bfloat16)
        return [tensor]

    def locate(self, path, schema=None):
        return {spec.name: spec for spec in self.format.locate(path, schema or Schema())}

    def test_several_tensors_at_the_paths_of_the_schema(self, tmp_path):
        path = self.path(tmp_path)
        tensors = {
            "rows": values(torch.bfloat16, (300, 4)),
            "ids.values": torch.arange(7),
            "ids.offsets": torch.tensor([0, 3, 7]),
            "extra": torch.tensor(3.5),
        }
        for compression in self.compressions:
            path.unlink(missing_ok=True)
            writer = self.format.writer(path, SCHEMA, compression=compression)
            for name, tensor in tensors.items():
                write(writer, name, tensor, block=70)
            writer.close()
            found = self.locate(path, SCHEMA)
            assert found.keys() == tensors.keys()
            assert all(same(read(found[name]), tensors[name]) for name in tensors)
            with h5py.File(path) as file:
                assert set(file) == {"embeddings", "pairs", "extra"}
                assert set(file["pairs/ids"]) == {"values", "offsets"}

    def test_begin_needs_the_end_of_the_one_before(self, tmp_path):
        writer = self.format.writer(self.path(tmp_path), Schema())
        writer.begin("x", torch.float32, (3,), 4)
        with pytest.raises(IncompatibleOptionsError, match="must end before"):
            writer.begin("y", torch.float32, (3,), 4)
        writer.abort()

    def test_a_name_twice(self, tmp_path):
        writer = self.format.writer(self.path(tmp_path), Schema())
        write(writer, "x", torch.ones(3))
        with pytest.raises(IncompatibleOptionsError, match="written already"):
            writer.begin("x", torch.float32, (3,), 4)
        writer.abort()

    def test_unknown_compression_lists_the_known_ones(self, tmp_path):
        with pytest.raises(UnknownNameError, match="'gzip', 'lzf', 'blosc', 'zstd', 'lz4'"):
            self.format.writer(self.path(tmp_path), Schema(), compression="bz2")

    def test_a_plugin_that_is_not_installed(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "hdf5plugin", None)
        with pytest.raises(IncompatibleOptionsError, match="pip install"):
            self.format.writer(self.path(tmp_path), Schema(), compression="zstd")

    def test_gzip_is_smaller_than_the_library_makes_it(self, tmp_path):
        rows = torch.nn.functional.normalize(torch.randn(2000, 96, generator=torch.Generator().manual_seed(0)), dim=1)
        ours = self.written(tmp_path, rows, "gzip").stat().st_size
        with h5py.File(tmp_path / "theirs.h5", "w") as file:
            file.create_dataset("x", data=rows.numpy(), compression="gzip")
        assert ours < (tmp_path / "theirs.h5").stat().st_size
        assert ours < rows.nbytes

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
    def test_gzip_of_every_number_of_chunks(self, tmp_path, dtype):
        # One element, one chunk and a bit, a batch of chunks exactly, two batches and a bit; in one file, one by one.
        per_chunk = CHUNK_NBYTES // dtype.itemsize
        tensors = {f"x{n}": values(dtype, (n,)) for n in (0, 1, per_chunk + 1, 16 * per_chunk, 33 * per_chunk + 7)}
        paths = [tmp_path / "one.h5", tmp_path / "same.h5"]
        for path in paths:
            writer = self.format.writer(path, Schema(), compression="gzip")
            for name, tensor in tensors.items():
                write(writer, name, tensor, block=100_000)
            writer.close()
        with h5py.File(paths[0]) as one, h5py.File(paths[1]) as other:
            for name, tensor in tensors.items():
                (found,) = self.peer(paths[0], name, dtype)
                assert same(found, tensor)
                for start in range(0, len(tensor), per_chunk):
                    # The threads have no say in it.
                    streams = [file[name].id.read_direct_chunk((start,)) for file in (one, other)]
                    assert streams[0] == streams[1]

    @pytest.mark.parametrize("calm_first", [False, True])
    def test_gzip_of_data_that_changes_midway(self, tmp_path, calm_first):
        # In the midst of a batch of 16 chunks.
        noise = torch.randint(-(2**31), 2**31, (9 * 42 + 5, 384), generator=torch.Generator().manual_seed(0))
        noise = noise.to(torch.int32).view(torch.float32)
        for calm in (torch.full((3000, 384), 0.25), torch.arange(384.0).repeat(3000, 1)):
            both = torch.cat([calm, noise] if calm_first else [noise, calm])
            path = self.written(tmp_path, both, "gzip")
            assert path.stat().st_size < noise.nbytes + 0.03 * calm.nbytes
            (found,) = self.peer(path, "x", torch.float32)
            assert same(found, both)
            path.unlink()

    def test_what_others_write(self, tmp_path):
        path = tmp_path / "x.h5"
        with h5py.File(path, "w") as file:
            file["group/deeper/matrix"] = np.arange(12.0).reshape(3, 4)
            file["flag"] = np.array([True, False])
            file["scalar"] = np.int16(7)
            file.create_dataset("marked", data=np.arange(3, dtype="u2")).attrs["torch_dtype"] = "bfloat16"
            file.create_dataset("unwritten", shape=(3, 2), dtype="f4", fillvalue=2.5)
            file.create_dataset("unwritten_scalar", shape=(), dtype="f4", fillvalue=1.5)
            file.create_dataset("chunked", data=np.arange(60).reshape(20, 3), chunks=(7, 2))
            compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            compact.set_layout(h5py.h5d.COMPACT)
            file.create_dataset("compact", data=np.arange(4.0), dcpl=compact)
        found = self.locate(path)
        with h5py.File(path) as file:
            for name, spec in found.items():
                expected = torch.from_numpy(np.asarray(file[name][()]))
                assert same(read(spec), expected.view(torch.bfloat16) if name == "marked" else expected), name
        kinds = {name: type(spec.location) for name, spec in found.items()}
        assert kinds == {
            "group/deeper/matrix": Extent,
            "flag": Extent,
            "scalar": Extent,
            "marked": Extent,
            "unwritten": Chunked,
            "unwritten_scalar": Inline,
            "chunked": Chunked,
            "compact": Inline,
        }

    def test_a_user_block_counts(self, tmp_path):
        path = tmp_path / "x.h5"
        matrix = np.arange(600.0).reshape(200, 3)
        with h5py.File(path, "w", userblock_size=1024) as file:
            file["plain"] = matrix
            file.create_dataset("chunked", data=matrix, compression="gzip", chunks=(30, 3))
        found = self.locate(path)
        assert all(same(read(spec), torch.from_numpy(matrix)) for spec in found.values())

    @pytest.mark.parametrize("dtype", [">f4", ">i8"])
    def test_big_endian_says_what_to_do(self, tmp_path, dtype):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["x"] = np.arange(3).astype(dtype)
        with pytest.raises(CorruptFileError, match="big-endian; write it as little-endian"):
            self.locate(tmp_path / "x.h5")

    def test_numbers_of_odd_width(self, tmp_path):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            odd = h5py.h5t.STD_I16LE.copy()
            odd.set_precision(12)
            space = h5py.h5s.create_simple((3,))
            h5py.h5d.create(file.id, b"x", odd, space)
        with pytest.raises(CorruptFileError, match="number type that torch does not have"):
            self.locate(tmp_path / "x.h5")

    @pytest.mark.parametrize("mark", ["float8", 3])
    def test_an_unknown_mark(self, tmp_path, mark):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file.create_dataset("x", data=np.arange(3, dtype="u2")).attrs["torch_dtype"] = mark
        with pytest.raises(CorruptFileError, match="torch_dtype"):
            self.locate(tmp_path / "x.h5")

    def test_what_is_no_number_is_skipped(self, tmp_path):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["text"] = "hello"
            file["empty"] = h5py.Empty("f4")
            file["x"] = [1, 2]
        assert self.locate(tmp_path / "x.h5").keys() == {"x"}
        found = {skip.name: skip.reason for skip in skipped_in(self.format, tmp_path / "x.h5", Schema())}
        assert found == {"empty": "it has no shape (a null dataspace)", "text": "it holds strings, not numbers"}

    @pytest.mark.parametrize("libver", ["earliest", "v108", "v110", "v112", "latest"])
    def test_every_kind_of_datatype(self, tmp_path, libver):
        """Skipped, and not taken for damage; on datasets and on attributes."""
        pair = np.dtype([("a", "<i4"), ("a longer name", "<f8", (2, 3)), ("inner", [("b", "u1"), ("c", "S5")])])
        kinds = {
            "pair": np.zeros(2, dtype=pair),
            "opaque": np.zeros(2, dtype="V13"),
            "enum": np.zeros(2, dtype=h5py.enum_dtype({"RED": 1, "GREEN and BLUE": 70_000}, basetype="i4")),
            "array": np.zeros(2, dtype=np.dtype(("<f4", (3, 2)))),
            "text": np.array(["a", "bc"], dtype=h5py.string_dtype()),
            "fixed": np.array([b"a", b"bc"]),
            "complex": np.zeros(2, dtype="c16"),
            "wide": np.zeros(2, dtype=np.longdouble),
            "time": np.zeros(2, dtype="<M8[s]").astype(h5py.opaque_dtype("<M8[s]")),
        }
        with h5py.File(tmp_path / "x.h5", "w", libver=libver) as file:
            file["x"] = [1.0]
            for name, array in kinds.items():
                file.create_dataset(name, data=array, dtype=array.dtype)
                file["x"].attrs[name] = array
            file["rows of pairs"] = h5py.Empty(h5py.vlen_dtype(pair))
            file.create_dataset("link", data=file["x"].ref, dtype=h5py.ref_dtype)
            file.create_dataset("region", data=file["x"].regionref[:1], dtype=h5py.regionref_dtype)
            file["named"] = pair
            file["x"].attrs.create("named", np.zeros((), dtype=pair), dtype=file["named"])
            file.create_dataset("of a named type", shape=(3,), dtype=file["named"])
        with open_for_reading(tmp_path / "x.h5") as (raw, size), h5py.File(tmp_path / "x.h5") as file:
            headers = Headers(tmp_path / "x.h5", raw, size)
            for name in file:
                header = headers.read(file.id.links.get_info(name.encode()).u, name)
                # What varies in length is a pointer in memory.
                if isinstance(file[name], h5py.Dataset) and name not in {"text", "rows of pairs"}:
                    assert header.type_nbytes == file[name].id.get_type().get_size(), name

    def test_what_is_required_must_be_numbers(self, tmp_path):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["embeddings/rows"] = "hello"
        with pytest.raises(CorruptFileError, match="should hold numbers"):
            self.locate(tmp_path / "x.h5", SCHEMA)

    def test_aliases(self, tmp_path):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["old/rows"] = [1.0]
            file["one"] = [2.0]
            file["elsewhere"] = [3.0]
        assert self.locate(tmp_path / "x.h5", SCHEMA).keys() == {"rows", "other", "elsewhere"}

    def test_two_datasets_that_mean_one_tensor(self, tmp_path):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["old/rows"] = [1.0]
            file["embeddings/rows"] = [1.0]
        with pytest.raises(CorruptFileError, match="two of its datasets mean 'rows'"):
            self.locate(tmp_path / "x.h5", SCHEMA)

    def test_links_are_not_followed(self, tmp_path):
        with h5py.File(tmp_path / "secret.h5", "w") as file:
            file["x"] = [1, 2, 3]
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["own"] = [1.0]
            file["soft"] = h5py.SoftLink("/own")
            file["dangling"] = h5py.SoftLink("/nothing")
            file["external"] = h5py.ExternalLink("secret.h5", "x")
        assert self.locate(tmp_path / "x.h5").keys() == {"own"}

    @pytest.mark.parametrize("libver", ["earliest", "v108", "v110", "latest"])
    @pytest.mark.parametrize("where", ["x", "group/x", "ids/0"])
    def test_values_in_other_files(self, tmp_path, libver, where):
        (tmp_path / "secret").write_bytes(bytes(range(64)))
        with h5py.File(tmp_path / "x.h5", "w", libver=libver) as file:
            shape = (64,) if where == "ids/0" else (1, 64)
            file.create_dataset(where, shape=shape, dtype="u1", external=[(str(tmp_path / "secret"), 0, 64)])
        with pytest.raises(CorruptFileError, match=f"'{where}' lie in external files; .* Copy them"):
            self.locate(tmp_path / "x.h5")

    @pytest.mark.parametrize("libver", ["earliest", "v110", "latest"])
    @pytest.mark.parametrize("source", [".", "secret.h5"])
    def test_values_in_other_datasets(self, tmp_path, libver, source):
        for name in ("secret.h5", "x.h5"):
            with h5py.File(tmp_path / name, "w", libver=libver) as file:
                file["source"] = np.arange(4.0)
                layout = h5py.VirtualLayout(shape=(2, 4), dtype="f8")
                for i in range(2):
                    layout[i] = h5py.VirtualSource(source, "source", shape=(4,))
                file.create_virtual_dataset("group/x", layout)
        with pytest.raises(CorruptFileError, match="'group/x' lie in a virtual dataset"):
            self.locate(tmp_path / "x.h5")

    def test_a_dataset_that_is_replaced_by_a_link(self, tmp_path):
        for name in ("secret.h5", "x.h5"):
            with h5py.File(tmp_path / name, "w") as file:
                file.create_dataset("group/x", data=np.zeros((4, 2)), chunks=(2, 2))
        spec = self.locate(tmp_path / "x.h5")["group/x"]
        for key in ("group", "group/x"):
            with h5py.File(tmp_path / "x.h5", "w") as file:
                file[key] = h5py.ExternalLink("secret.h5", key)
            with pytest.raises(CorruptFileError, match="link to another place"):
                read(spec)

    @pytest.mark.parametrize("libver", ["earliest", "latest"])
    def test_headers_that_continue(self, tmp_path, libver):
        with h5py.File(tmp_path / "x.h5", "w", libver=libver, track_order=True) as file:
            dataset = file.create_dataset("x", shape=(6, 2), chunks=(2, 2), dtype="f4", fillvalue=2.5)
            for i in range(40):
                dataset.attrs[f"attribute {i}"] = "a text that makes the header long"
        found = self.locate(tmp_path / "x.h5")
        assert same(read(found["x"]), torch.full((6, 2), 2.5))

    @pytest.mark.parametrize("libver", ["earliest", "v108", "latest"])
    def test_indices_of_several_levels(self, tmp_path, libver):
        matrix = np.arange(6000.0).reshape(3000, 2)
        with h5py.File(tmp_path / "x.h5", "w", libver=libver) as file:
            file.create_dataset("chunked", data=matrix, chunks=(1, 1))
            for i in range(700):
                file[f"group/tensor {i}"] = [i]
            del file["group/tensor 5"]
            file["group/soft"] = h5py.SoftLink("/chunked")
        found = self.locate(tmp_path / "x.h5")
        assert len(found) == 700
        assert same(read(found["chunked"]), torch.from_numpy(matrix))

    def test_a_fill_value_of_a_committed_type(self, tmp_path):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["type"] = np.dtype("<f4")
            file.create_dataset("x", shape=(6, 2), chunks=(2, 2), dtype=file["type"], fillvalue=2.5)
        assert same(read(self.locate(tmp_path / "x.h5")["x"]), torch.full((6, 2), 2.5))

    def test_a_group_that_contains_itself(self, tmp_path):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["a/b/x"] = [1.0]
            file["a/b/again"] = file["a"]
        with pytest.raises(CorruptFileError, match="contains itself"):
            self.locate(tmp_path / "x.h5")

    def test_groups_nested_too_deeply(self, tmp_path):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["/".join("abcdefgh" * 5)] = [1.0]
        with pytest.raises(CorruptFileError, match="over 32 deep"):
            self.locate(tmp_path / "x.h5")

    @relaxed
    @given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4), min_size=1, max_size=12), st.booleans())
    def test_ragged_rows_of_other_builders(self, tmp_path, rows, variable):
        path = self.path(tmp_path)
        with h5py.File(path, "w") as file:
            if variable:
                dataset = file.create_dataset("pairs/ids", shape=(len(rows),), dtype=h5py.vlen_dtype(np.int32))
                for i, row in enumerate(rows):
                    dataset[i] = row
            else:
                for i, row in enumerate(rows):
                    file[f"pairs/ids/{i}"] = row
        found = self.locate(path, SCHEMA)
        assert found.keys() == {"ids.values", "ids.offsets"}
        offsets = found["ids.offsets"].location.values.tolist()
        flat = found["ids.values"].location.values
        assert flat.dtype == torch.int64
        assert [flat[a:b].tolist() for a, b in itertools.pairwise(offsets)] == rows

    def test_ragged_rows_in_odd_forms(self, tmp_path):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["ids/0"] = np.array([3, -1], dtype="i2")
            file["ids/1"] = np.array([], dtype="f4")
            file["ids/2"] = np.uint8(7)
            file.create_dataset("ids/3", data=[1, 2], maxshape=(None,), compression="gzip")
            file["ids/4"] = np.array([1], dtype=">u4")
            file["ids/5"] = np.empty((0, 3))
            file["ids/6"] = h5py.Empty("f4")
        found = self.locate(tmp_path / "x.h5")
        assert found["ids.values"].location.values.tolist() == [3, -1, 7, 1, 2, 1]
        assert found["ids.offsets"].location.values.tolist() == [0, 2, 2, 3, 5, 6, 6, 6]

    def test_numbered_matrices_are_not_ragged(self, tmp_path):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["layers/0"] = np.ones((2, 2))
            file["layers/1"] = [1, 2]
        assert self.locate(tmp_path / "x.h5").keys() == {"layers/0", "layers/1"}

    def test_truncated_data(self, tmp_path):
        path = self.written(tmp_path, torch.ones(3000))
        os.truncate(path, path.stat().st_size - 4096)
        with pytest.raises(CorruptFileError, match="truncated"):
            self.locate(path)

    def test_open_elsewhere_in_this_process(self, tmp_path):
        path = self.written(tmp_path, torch.ones(3), "gzip")
        for locking in (None, False, True):
            with h5py.File(path, "r", locking=locking):
                assert same(read(self.locate(path)["x"]), torch.ones(3))

    def test_open_for_writing_elsewhere(self, tmp_path):
        path = tmp_path / "x.h5"
        code = f"import h5py; f = h5py.File({str(path)!r}, 'w'); f['x'] = [1]; f.flush(); print(flush=True); input()"
        with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            with pytest.raises(CorruptFileError, match="writ"):
                self.locate(path)
            writer.communicate(b"\n")
        assert self.locate(path).keys() == {"x"}

    def test_a_read_only_directory(self, tmp_path):
        path = self.written(tmp_path, torch.ones(3), "gzip")
        path.chmod(0o444)
        tmp_path.chmod(0o555)
        try:
            assert same(read(self.locate(path)["x"]), torch.ones(3))
        finally:
            tmp_path.chmod(0o755)

    def test_a_heap_that_would_be_walked_for_ever(self, tmp_path):
        path = tmp_path / "x.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("x", data=np.arange(3, dtype="u2")).attrs["torch_dtype"] = "bfloat16"
        content = path.read_bytes()
        heap = content.index(b"GCOL")
        for size in (2**64 - 16, 2**64 - 1, 0, 8, 2**40):
            # The size of the free space, the last object, then that of the text itself.
            for at in (heap + 24, content.index(bytes(2), heap + 40) // 8 * 8 + 8):
                path.write_bytes(content[:at] + size.to_bytes(8, "little") + content[at + 8 :])
                # That it ends is the point: the size of the text may be wrong in ways that do no harm.
                with contextlib.suppress(CorruptFileError):
                    self.locate(path)
