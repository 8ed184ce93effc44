from __future__ import annotations

import struct

import numpy as np
import pytest

import jasper_store as js
from jasper_store.errors import CorruptFileError
from jasper_store.formats.base import Extent, Schema
from jasper_store.formats.registry import locate
from tests.formats import damage
from tests.formats.places import in_place

ROWS = np.random.default_rng(0).standard_normal((30, 7), dtype=np.float32)


def flat(rows, kind=b"IxF2", metric=1, count=None):
    """What ``faiss.write_index`` writes of an ``IndexFlat``."""
    head = struct.pack("<4siqqq?i", kind, rows.shape[1], len(rows), 1 << 20, 1 << 20, True, metric)
    head += struct.pack("<f", 0) if metric > 1 else b""
    return head + struct.pack("<q", rows.size if count is None else count) + rows.tobytes()


def only(path):
    (spec,) = locate(path, "auto", Schema()).specs
    assert isinstance(spec.location, Extent)
    return spec


@pytest.mark.parametrize("suffix", [".faiss", ".index"])
@pytest.mark.parametrize("metric", [0, 1, 2])
def test_indexes_that_faiss_writes(tmp_path, suffix, metric):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlat(7, metric)
    index.add(ROWS)
    path = tmp_path / f"passages{suffix}"
    faiss.write_index(index, str(path))
    kind = {0: b"IxFI", 1: b"IxF2", 2: b"IxFl"}[metric]
    assert path.read_bytes() == flat(ROWS, kind, metric)
    spec = only(path)
    assert (spec.name, spec.shape) == ("passages", (30, 7))
    assert np.array_equal(in_place(spec), ROWS)


def test_other_indexes_are_refused(tmp_path):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexHNSWFlat(7, 4)
    index.add(ROWS)
    faiss.write_index(index, str(tmp_path / "x.faiss"))
    with pytest.raises(CorruptFileError, match=r"found b'IHNf'\. Other indexes hold no plain rows.*reconstruct_n"):
        locate(tmp_path / "x.faiss", "auto", Schema())


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"IxF2",
        flat(ROWS)[:40],
        flat(ROWS)[:-1],
        flat(ROWS) + b"\0",
        flat(ROWS, count=2**40),
        flat(ROWS, count=-1),
        flat(ROWS)[:8] + struct.pack("<q", -1) + flat(ROWS)[16:],
        flat(ROWS)[:4] + struct.pack("<iq", 2**31 - 1, 2**62) + flat(ROWS)[16:],
    ],
)
def test_indexes_that_are_damaged(tmp_path, raw):
    path = tmp_path / "x.faiss"
    path.write_bytes(raw)
    with pytest.raises(CorruptFileError, match=r"x\.faiss"):
        locate(path, "auto", Schema())


@pytest.mark.parametrize(
    ("suffix", "dtype"), [(".fbin", "float32"), (".u8bin", "uint8"), (".i8bin", "int8"), (".ibin", "int32")]
)
@pytest.mark.parametrize("n", [0, 1, 30])
def test_bin_files(tmp_path, suffix, dtype, n):
    rows = (ROWS[:n] * 50).astype(dtype)
    path = tmp_path / f"base.10K{suffix}"
    path.write_bytes(struct.pack("<II", *rows.shape) + rows.tobytes())
    spec = only(path)
    assert (spec.name, spec.shape) == ("base.10K", (n, 7))
    assert np.array_equal(in_place(spec), rows)


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b"", "the file 0"),
        (b"1234567", "the file 7"),
        (struct.pack("<II", 3, 2) + bytes(23), "need 32 bytes, found 31"),
        (struct.pack("<II", 3, 2) + bytes(48), "do distances follow"),
        (b"\xff" * 8, "more bytes than 64 bits can count"),
    ],
)
def test_bin_files_that_are_damaged(tmp_path, raw, found):
    path = tmp_path / "x.fbin"
    path.write_bytes(raw)
    with pytest.raises(CorruptFileError, match=found):
        locate(path, "auto", Schema())


def test_a_bin_file_by_another_name(tmp_path):
    (tmp_path / "x.dat").write_bytes(struct.pack("<II", 0, 2))
    with pytest.raises(CorruptFileError, match="does not say its dtype"):
        locate(tmp_path / "x.dat", "bin", Schema())


@pytest.mark.parametrize(("name", "raw"), [("faiss", flat(ROWS)), ("bin", struct.pack("<II", 30, 7) + ROWS.tobytes())])
def test_any_damage(tmp_path, name, raw):
    path = tmp_path / {"faiss": "x.faiss", "bin": "x.fbin"}[name]
    path.write_bytes(raw)
    assert damage.run(name, path, tmp_path, 0, 300)["cut refused"] > 290


def test_other_files_named_index_beside_a_dataset_are_skipped(tmp_path):
    np.save(tmp_path / "emb.npy", ROWS)
    (tmp_path / "words.index").write_text("of something else")
    located = locate(tmp_path, "auto", Schema())
    assert [spec.name for spec in located.specs] == ["emb"]
    assert [one.name for one in located.skipped] == ["words"]


@pytest.mark.parametrize("use_mmap", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
def test_rows_at_odd_bytes_are_served(tmp_path, use_mmap, shards):
    # The rows begin at byte 45.
    for i, part in enumerate(np.split(ROWS, shards)):
        (tmp_path / f"p_{i:02}.faiss").write_bytes(flat(part))
    if shards == 1:
        (tmp_path / "p_00.faiss").rename(tmp_path / "p.faiss")
    with js.open(tmp_path, use_mmap=use_mmap) as store:
        assert store["p"].placement == ("mmap" if use_mmap else "ram")
        assert np.array_equal(store["p"].take([29, 0, 14, 15]).numpy(), ROWS[[29, 0, 14, 15]])
    with js.Dataset(tmp_path, {"x": "p[i]"}, use_mmap=use_mmap) as dataset:
        batches = list(js.create_loader(dataset, batch_size=8, shuffle=False, drop_last=False))
    assert np.array_equal(np.concatenate([batch["x"].numpy() for batch in batches]), ROWS)
