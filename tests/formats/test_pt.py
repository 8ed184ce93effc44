from __future__ import annotations

import itertools
import os
import pickle
import zipfile
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from isal import isal_zlib

from jasper_store.errors import CorruptFileError, IntegrityError
from jasper_store.formats.base import Extent, Inline, Schema
from jasper_store.formats.files import write_at
from jasper_store.formats.protocols import SupportsRagged
from jasper_store.formats.pt import writer as pt_writer
from jasper_store.formats.registry import FORMATS
from tests.formats.conformance import DTYPES, FormatSuite, read, relaxed, same, values

int64 = st.integers(-(2**63), 2**63 - 1)
# Every width that a pickle gives to an int, and both sides of each border.
borders = st.sampled_from([0, 1, 255, 256, 65535, 65536, -1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63 - 1])
ragged = st.lists(st.lists(int64 | borders, max_size=5), max_size=12)


class TestPt(FormatSuite):
    name = "pt"

    def peer(self, path, name, dtype):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        loaded = [torch.load(path, weights_only=True, mmap=mmap) for mmap in (False, True)]
        assert all(tensor.is_contiguous() for tensor in loaded)
        return loaded

    def locate(self, tmp_path, saved, **options):
        path = self.path(tmp_path)
        torch.save(saved, path, **options)
        return {spec.name: spec for spec in self.format.locate(path, Schema())}

    @relaxed
    @given(st.sampled_from(DTYPES), st.lists(st.integers(0, 6), max_size=3), st.data())
    def test_views_of_any_shape(self, tmp_path, dtype, shape, data):
        tensor = values(dtype, shape)
        if tensor.ndim > 1:
            tensor = tensor.transpose(0, data.draw(st.integers(0, tensor.ndim - 1)))
        if tensor.ndim and len(tensor):
            tensor = tensor[data.draw(st.integers(0, len(tensor) - 1)) :: data.draw(st.integers(1, 3))]
        spec = self.locate(tmp_path, tensor)["x"]
        assert same(read(spec), tensor)
        if tensor.numel():
            assert isinstance(spec.location, Extent)

    def test_what_torch_save_writes(self, tmp_path):
        base = torch.arange(12.0)
        saved: dict[str, Any] = {
            "parameter": torch.nn.Parameter(torch.ones(2, 3)),
            "shared_a": base[:6],
            "shared_b": base[3:].reshape(3, 3),
            "expanded": torch.ones(1, 4).expand(3, 4),
            "uint16": values(torch.uint16, (5,)),
            "float8": values(torch.float8_e4m3fn, (5, 2)),
            "empty": torch.empty(0, 7),
            "scalar": torch.tensor(2.5),
            "ids": [[1, 2], [], [3]],
        }
        found = self.locate(tmp_path, saved)
        for name in saved.keys() - {"ids"}:
            assert same(read(found[name]), saved[name]), name
        assert found["ids.values"].location.values.tolist() == [1, 2, 3]
        assert found["ids.offsets"].location.values.tolist() == [0, 2, 2, 3]

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    @pytest.mark.parametrize(
        "saved", [torch.arange(6.0), {"x": torch.arange(6.0)}, torch.nn.Parameter(torch.arange(6.0))]
    )
    def test_every_pickle_protocol(self, tmp_path, saved, protocol):
        assert same(read(self.locate(tmp_path, saved, pickle_protocol=protocol)["x"]), torch.arange(6.0))

    def test_state_dict(self, tmp_path):
        found = self.locate(tmp_path, torch.nn.Linear(3, 2).state_dict())
        assert found.keys() == {"weight", "bias"}

    @pytest.mark.parametrize(
        ("saved", "expected"),
        [
            (3, torch.tensor(3)),
            (2.5, torch.tensor(2.5)),
            (True, torch.tensor(True)),
            ([1, 2, 2**40], torch.tensor([1, 2, 2**40])),
            ([1.5, 2.5], torch.tensor([1.5, 2.5])),
        ],
    )
    def test_numbers_become_tensors(self, tmp_path, saved, expected):
        assert same(read(self.locate(tmp_path, saved)["x"]), expected)

    @pytest.mark.parametrize("protocol", [2, 4])
    @relaxed
    @given(rows=ragged)
    def test_lists_of_lists(self, tmp_path, rows, protocol):
        found = self.locate(tmp_path, rows, pickle_protocol=protocol)
        self.check_ragged(found, rows)

    @relaxed
    @given(rows=ragged)
    def test_lists_of_tensors_and_tuples(self, tmp_path, rows):
        self.check_ragged(self.locate(tmp_path, [torch.tensor(row, dtype=torch.int64) for row in rows]), rows)
        self.check_ragged(self.locate(tmp_path, [tuple(row) for row in rows]), rows)

    def test_long_lists_come_in_batches(self, tmp_path):
        rows = [list(range(n)) for n in (0, 1, 999, 1000, 1001, 2001)] + [[i] for i in range(2500)]
        self.check_ragged(self.locate(tmp_path, rows), rows)

    def test_a_row_that_is_saved_once_and_used_often(self, tmp_path):
        row = [1, 2, 3]
        self.check_ragged(self.locate(tmp_path, [row] * 5), [row] * 5)

    @staticmethod
    def check_ragged(found, rows):
        assert found.keys() == {"x.values", "x.offsets"}
        flat, offsets = (found[f"x.{part}"].location.values for part in ("values", "offsets"))
        assert flat.dtype == offsets.dtype == torch.int64
        bounds = offsets.tolist()
        assert [flat[a:b].tolist() for a, b in itertools.pairwise(bounds)] == rows

    @relaxed
    @given(rows=ragged, block=st.integers(1, 8))
    def test_ragged_is_written_as_torch_would_load_it(self, tmp_path, rows, block):
        path = self.path(tmp_path)
        flat = torch.tensor([v for row in rows for v in row], dtype=torch.int64)
        offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
        self.write_ragged(path, offsets, flat.split(block) if rows else [])
        assert torch.load(path, weights_only=True) == rows
        self.check_ragged({spec.name: spec for spec in self.format.locate(path, Schema())}, rows)

    @pytest.mark.parametrize(
        ("offsets", "blocks"),
        [
            ([0, 2, 1], [[1, 2]]),
            ([1, 2], [[1, 2]]),
            ([], []),
            ([0, 2], [[1]]),
            ([0, 2], [[1, 2, 3]]),
            ([0, 2], []),
        ],
    )
    def test_ragged_that_does_not_add_up(self, tmp_path, offsets, blocks):
        path = self.path(tmp_path)
        with pytest.raises(IntegrityError, match=r"offsets|promised"):
            self.write_ragged(path, torch.tensor(offsets, dtype=torch.int64), [torch.tensor(block) for block in blocks])
        if path.exists():
            self.refused(path)

    def write_ragged(self, path, offsets, blocks):
        assert isinstance(self.format, SupportsRagged)
        self.format.write_ragged(path, offsets, blocks)

    @pytest.mark.parametrize(
        "saved",
        [
            None,
            {"a": {"b": torch.ones(2)}},
            {1: torch.ones(2)},
            [[1], ["a"]],
            [[1], [1.5]],
            [[1], None],
            [[2**70]],
            [torch.ones(2)],
            [torch.ones(2, 2, dtype=torch.int64)],
            [[1], 2],
            torch.ones(2).to_sparse(),
            torch.nn.Linear(2, 2),
            torch.Size([1]),
            {"lr": 0.1, "optimizer": {"state": {}}},
        ],
        ids=repr,
    )
    def test_what_is_no_tensor(self, tmp_path, saved):
        path = self.path(tmp_path)
        torch.save(saved, path)
        if isinstance(saved, torch.Size):
            assert self.format.locate(path, Schema())
            return
        with pytest.raises(CorruptFileError) as caught:
            self.format.locate(path, Schema())
        assert "torch.save" in str(caught.value)

    def test_legacy_file_says_how_to_save_it_again(self, tmp_path):
        path = self.path(tmp_path)
        torch.save(torch.ones(3), path, _use_new_zipfile_serialization=False)
        with pytest.raises(CorruptFileError, match=r"torch.save\(torch.load\(path, weights_only=True\), path\)"):
            self.format.locate(path, Schema())

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_torchscript_is_a_program(self, tmp_path):
        path = self.path(tmp_path)
        self.archive(path, {"data.pkl": b"\x80\x02N.", "constants.pkl": b"\x80\x02).", "code/a.py": b"..."})
        with pytest.raises(CorruptFileError, match="TorchScript"):
            self.format.locate(path, Schema())

    @staticmethod
    def archive(path, records, compression=zipfile.ZIP_STORED, prefix="x/"):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in records.items():
                archive.writestr(prefix + name, data)

    def rewritten(self, tmp_path, change, compression=zipfile.ZIP_STORED):
        """A sound file, its records passed through ``change``."""
        path = self.path(tmp_path)
        torch.save(torch.arange(6.0).reshape(2, 3), path)
        with zipfile.ZipFile(path) as archive:
            records = {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}
        change(records)
        path.unlink()
        self.archive(path, records, compression)
        return path

    def test_an_archive_of_another_tool(self, tmp_path):
        path = self.rewritten(tmp_path, lambda records: None)
        assert same(read(self.format.locate(path, Schema())[0]), torch.arange(6.0).reshape(2, 3))

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            (lambda r: r.update(byteorder=b"big"), "byte order"),
            (lambda r: r.pop("data/0"), "no record"),
            (lambda r: r.update({"data/0": bytes(20)}), "record of 20 bytes"),
            (lambda r: r.pop("data.pkl"), "exactly one record"),
            (lambda r: r.update({"data.pkl": r["data.pkl"][:-4]}), "ends in the middle"),
            (lambda r: r.update({"data.pkl": b""}), "ends in the middle"),
        ],
    )
    def test_records_that_contradict_each_other(self, tmp_path, change, why):
        with pytest.raises(CorruptFileError, match=why):
            self.format.locate(self.rewritten(tmp_path, change), Schema())

    def test_compressed_records(self, tmp_path):
        path = self.rewritten(tmp_path, lambda records: None, zipfile.ZIP_DEFLATED)
        with pytest.raises(CorruptFileError, match="compressed"):
            self.format.locate(path, Schema())

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_two_records_of_one_name(self, tmp_path):
        path = self.rewritten(tmp_path, lambda records: None)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("x/data/0", bytes(24))
        with pytest.raises(CorruptFileError, match="same name"):
            self.format.locate(path, Schema())

    @pytest.mark.parametrize(
        ("offset", "shape", "strides"),
        [
            (1, (2, 3), (3, 1)),
            (0, (3, 3), (3, 1)),
            (0, (2, 3), (4, 1)),
            (-1, (2, 3), (3, 1)),
            (0, (2, 3), (-3, 1)),
            (0, (2, -3), (3, 1)),
            (0, (2, 3), (3,)),
            (0, (2**62, 2**62), (0, 0)),
            (2**63, (1,), (1,)),
            (0, (2, 2), (2**62, 1)),
        ],
    )
    def test_tensors_that_leave_their_storage(self, tmp_path, offset, shape, strides):
        def change(records):
            records["data.pkl"] = tensor_pickle(offset, shape, strides)

        with pytest.raises(CorruptFileError):
            self.format.locate(self.rewritten(tmp_path, change), Schema())

    def test_the_pickle_of_the_test_above_is_sound(self, tmp_path):
        def change(records):
            records["data.pkl"] = tensor_pickle(0, (2, 3), (3, 1))

        path = self.rewritten(tmp_path, change)
        assert same(read(self.format.locate(path, Schema())[0]), torch.arange(6.0).reshape(2, 3))


def tensor_pickle(offset, shape, strides) -> bytes:
    """A tensor's pickle with any numbers in it, made by the pickler itself."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            return (torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, strides, False, None))

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, "0", "cpu", 6) if isinstance(obj, Storage) else None

    import io

    out = io.BytesIO()
    Pickler(out, protocol=2).dump(Tensor())
    return out.getvalue()


class Evil:
    """Pickles to a call."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class TestHostilePickles:
    @pytest.mark.parametrize("protocol", [0, 1, 2, 4])
    @pytest.mark.parametrize("wrap", [lambda e: e, lambda e: [e], lambda e: {"x": e}, lambda e: [[1], [e]]])
    def test_nothing_is_executed(self, tmp_path, wrap, protocol):
        target = tmp_path / "executed"
        for evil in (
            Evil(os.system, f"touch {target}"),
            Evil(eval, f"open({str(target)!r}, 'w')"),
            Evil(exec, f"open({str(target)!r}, 'w')"),
            Evil(getattr, os, "system"),
            Evil(torch.load, str(target)),
            Evil(torch.hub.load, "a/b", "c"),
            Evil(print),
        ):
            path = tmp_path / "x.pt"
            path.unlink(missing_ok=True)
            try:
                stream = pickle.dumps(wrap(evil), protocol=protocol)
            except (pickle.PicklingError, TypeError):
                continue  # modules do not pickle: that gadget needs a hand-made stream
            TestPt.archive(path, {"data.pkl": stream, "version": b"3\n"})
            with pytest.raises(CorruptFileError):
                FORMATS["pt"].locate(path, Schema())
            assert not target.exists()

    @pytest.mark.parametrize(
        "stream",
        [
            b"cos\nsystem\n(S'touch x'\ntR.",
            b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
            b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.",
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR.",
            b"\x80\x02ctorch\nFloatStorage\n)R.",
            b"\x80\x02ctorch\n_C\n.",
            b"\x80\x02X\x07\x00\x00\x00storageQ.",
            b"\x80\x02]]R.",
            b"\x80\x02}]K\x01s.",
            b"\x80\x02]r\xff\xff\xff\xffj\xfe\xff\xff\xff.",
            b"\x80\x02X\xff\xff\xff\xff.",
            b"\x80\x02\x8a\xff.",
            b"\x80\x02K\x01K\x02e.",
            b"\x80\x02(((((.",
            b"\x80\x02R.",
            b"\x80\x02h\x00.",
            b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
            b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
            b"\x80\x02" + b"(" * 100_000,
            b"\x80\x02c\xff\n\xff\n.",
            b"i__builtin__\neval\n.",
            b"\x82\x01.",
            b"\x80\x02(K\x01o.",
        ],
        ids=lambda stream: repr(stream[:24]),
    )
    def test_hand_made_streams(self, tmp_path, stream):
        TestPt.archive(tmp_path / "x.pt", {"data.pkl": stream, "version": b"3\n"})
        with pytest.raises(CorruptFileError):
            FORMATS["pt"].locate(tmp_path / "x.pt", Schema())

    def test_a_small_file_cannot_ask_for_much_memory(self, tmp_path):
        # One list of 250 ints, named three thousand times.
        row = b"](" + b"K\x01" * 250 + b"eq\x00"
        stream = b"\x80\x02](" + row + b"h\x00" * 3000 + b"e."
        TestPt.archive(tmp_path / "x.pt", {"data.pkl": stream, "version": b"3\n"})
        with pytest.raises(CorruptFileError, match="row"):
            FORMATS["pt"].locate(tmp_path / "x.pt", Schema())

    @relaxed
    @given(st.binary(max_size=60), st.booleans())
    def test_any_bytes(self, tmp_path, stream, framed):
        path = tmp_path / "x.pt"
        path.unlink(missing_ok=True)
        TestPt.archive(path, {"data.pkl": b"\x80\x02" * framed + stream, "version": b"3\n"})
        try:
            specs = FORMATS["pt"].locate(path, Schema())
        except CorruptFileError:
            return
        assert all(isinstance(spec.location, Inline) for spec in specs)


def test_files_larger_than_four_gigabytes(tmp_path, monkeypatch):
    """Sizes beyond 32 bits need the zip64 fields; the file is sparse, so it takes no room."""
    rows, row = 70, 1 << 26
    monkeypatch.setattr(pt_writer, "write_at", sparsely)
    # The checksum of four gigabytes is not what is tested.
    monkeypatch.setattr(isal_zlib, "crc32", lambda data, crc=0: zlib.crc32(data, crc) if len(data) < row else crc)
    writer = FORMATS["pt"].writer(tmp_path / "x.pt", Schema())
    writer.begin("x", torch.uint8, (row,), None)
    block = torch.zeros(1, row, dtype=torch.uint8)
    for _ in range(rows):
        writer.append(block)
    writer.end()
    writer.close()
    assert (tmp_path / "x.pt").stat().st_size > 2**32
    (spec,) = FORMATS["pt"].locate(tmp_path / "x.pt", Schema())
    assert spec.shape == (rows, row)
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.getinfo("archive/data/0").file_size == rows * row
    loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert loaded.shape == (rows, row)
    assert loaded[-1, -1] == 0


def sparsely(file, offset, data):
    """Write only what is not zeros."""
    if len(data) >= 1 << 26:
        file.truncate(offset + len(data))
    else:
        write_at(file, offset, data)


@pytest.mark.parametrize("value", [[torch.ones(3), torch.ones(4)], {"a": [torch.ones(3)]}, [{"x": torch.ones(2)}]])
def test_a_list_of_tensors_is_refused_in_the_words_of_torch(tmp_path, value):
    torch.save(value, tmp_path / "list.pt")
    with pytest.raises(CorruptFileError) as caught:
        FORMATS["pt"].locate(tmp_path / "list.pt", Schema())
    assert "Pt" not in str(caught.value).replace(str(tmp_path), "")
    assert "a tensor, float32 [3]" in str(caught.value) or "dict" in str(caught.value)
