"""Sound inputs from which the fuzzer begins, made by the libraries that write such files."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tempfile
import zipfile
import zlib
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch

from tests.fuzz.envelopes import raw_deflate

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "arrow",
    "bins",
    "configs",
    "deflates",
    "expressions",
    "faiss",
    "hdf5",
    "hdf5_file",
    "hdf5_heaps",
    "hdf5_objects",
    "indices",
    "manifests",
    "names",
    "npy",
    "npy_headers",
    "npy_objects",
    "npz",
    "npz_members",
    "pickles",
    "pt",
    "pt_pickles",
    "safetensors_files",
    "safetensors_headers",
    "states",
]


def _written(save: Callable[[Any], object]) -> bytes:
    file = io.BytesIO()
    save(file)
    return file.getvalue()


# ---- safetensors, npy


def safetensors_files() -> list[bytes]:
    tensors = {f"t{i}": torch.ones(i, 3) for i in range(4)}
    kinds = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.tensor(3), "c": torch.ones(4, dtype=torch.bool)}
    return [
        safetensors.torch.save(tensors, {"a": "b"}),
        safetensors.torch.save(kinds),
        safetensors.torch.save({"x": torch.ones(2)}),
    ]


def safetensors_headers() -> list[bytes]:
    return [data[8 : 8 + int.from_bytes(data[:8], "little")] for data in safetensors_files()]


_ARRAYS = [
    np.arange(12.0).reshape(4, 3),
    np.asfortranarray(np.arange(24, dtype="f4").reshape(4, 6)),
    np.arange(96, dtype="u1").reshape(2, 3, 16),
    np.zeros((0, 3)),
    np.array(3),
    np.array([b"ab", b"c"]),
    np.array(["ab", "ü"]),
    np.zeros(48, [("bfloat16", "<u2")]),
    np.zeros(3, "c16"),
]


def npy() -> list[bytes]:
    objects = [np.array(["a", "bc"], object), np.array([1, None], object)]
    return [_written(partial(_save_npy, array)) for array in [*_ARRAYS, *objects]]


def _save_npy(array: np.ndarray[Any, Any], file: Any) -> None:
    np.save(file, array, allow_pickle=True)


def npy_headers() -> list[bytes]:
    return [data[10:].partition(b"\n")[0] for data in npy()]


def npy_objects() -> list[bytes]:
    kinds = [np.array(["a", "bc"] * 3, object), np.array([], object), np.array([["a"], ["b"]], object), np.array(7)]
    return [pickle.dumps(array, protocol) for array in kinds for protocol in (2, 3, 4, 5)]


def npz() -> list[bytes]:
    return [
        _written(lambda file: np.savez(file, a=_ARRAYS[0], b=_ARRAYS[1], text=_ARRAYS[6])),
        _written(lambda file: np.savez_compressed(file, a=_ARRAYS[0], c=_ARRAYS[2])),
        _written(lambda file: np.savez(file, only=_ARRAYS[3])),
    ]


def npz_members() -> list[bytes]:
    return [bytes([first]) + data for data in npy() for first in (0, 1)]


# ---- pickles


def _checkpoints() -> list[Any]:
    base = torch.arange(24.0)
    return [
        base.reshape(4, 6),
        {"a": base.reshape(4, 6).t(), "b": base[3:9], "ids": [[1, 2], [300]], "n": 3, "row": [1.5, 2.5]},
        {"a": torch.arange(12.0, dtype=torch.float64), "b": torch.arange(48).to(torch.bfloat16), "t": ["x", "y"]},
        [[i, i * 1000, i * 100_000, -(2**40)] for i in range(20)],
        [torch.arange(12) + i for i in range(3)],
        {"w": torch.nn.Parameter(base), "u": torch.arange(24).to(torch.uint32)},
        [tuple(range(i)) for i in range(5)],
        ["one", "two", "drei"],
        [1, 2, 3],
        7,
    ]


def pt() -> list[bytes]:
    return [_written(partial(torch.save, value)) for value in _checkpoints()]


def pt_pickles() -> list[bytes]:
    streams = []
    for data in pt():
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            streams.append(archive.read(name))
    lists = [[i, i * 1000] for i in range(40)]
    return streams + [pickle.dumps(lists, protocol) for protocol in (2, 3, 4, 5)]


def pickles() -> list[bytes]:
    rows = np.arange(12, dtype="f4").reshape(4, 3)
    ids = [f"d{i}" for i in range(4)]
    kinds = [rows, (rows, ids), [rows, np.arange(4)], {"a": rows, "b": np.asfortranarray(rows), "ids": ids}, ids]
    kinds += [(rows, np.array(ids, object)), (rows, np.array(ids)), (rows, [np.int64(1), np.int64(2)]), rows[0, 0]]
    return [pickle.dumps(kind, protocol) for kind in kinds for protocol in (3, 4, 5)]


# ---- vectors, Arrow


def faiss() -> list[bytes]:
    rows = np.arange(12, dtype="f4").reshape(4, 3)
    found = []
    for kind, metric in ((b"IxF2", 1), (b"IxFI", 0), (b"IxFl", 2)):
        head = struct.pack("<4siqqq?i", kind, 3, 4, 1 << 20, 1 << 20, True, metric)
        head += struct.pack("<f", 0) if metric > 1 else b""
        found.append(head + struct.pack("<q", 12) + rows.tobytes())
    return found


def bins() -> list[bytes]:
    """A first byte that says which of the suffixes, then the file."""
    kinds = [np.arange(12, dtype=dtype).reshape(4, 3) for dtype in ("f4", "u1", "i1", "i4")]
    return [bytes([i]) + struct.pack("<II", 4, 3) + rows.tobytes() for i, rows in enumerate(kinds)]


def arrow() -> list[bytes]:
    import pyarrow as pa
    from pyarrow import ipc

    rows = np.arange(18, dtype="f4").reshape(6, 3)
    tables = [
        pa.table({"emb": pa.FixedSizeListArray.from_arrays(rows.ravel(), 3), "id": np.arange(6)}),
        pa.table({"list": pa.array(rows.tolist(), pa.list_(pa.float32())), "text": [str(i) for i in range(6)]}),
        pa.table(
            {
                "large": pa.array([["a"]] * 6, pa.large_list(pa.large_string())),
                "view": pa.array(["long enough for a buffer of its own"] * 6, pa.string_view()),
                "flag": [True, None] * 3,
                "nothing": pa.nulls(6),
                "word": pa.array(["x", "y"] * 3).dictionary_encode(),
                "pair": pa.array([{"a": 1, "b": 2.5}] * 6),
            }
        ),
        pa.table({"tensor": pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.float32(), (3, 1)), pa.FixedSizeListArray.from_arrays(rows.ravel(), 3))}),
        pa.table({"deep": pa.array([[[1.0, 2.0], [3.0, 4.0]]] * 6, pa.list_(pa.list_(pa.float64(), 2)))}),
    ]  # fmt: skip
    found = []
    for table in tables:
        for make in (ipc.new_file, ipc.new_stream):
            sink = io.BytesIO()
            with make(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=4)
            found.append(sink.getvalue())
    return found


# ---- HDF5


@cache
def hdf5_file(libver: str) -> bytes:
    """A small file with every layout, filter and kind of ragged rows."""
    import h5py

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.h5"
        with h5py.File(path, "w", libver=libver) as file:
            file["group/matrix"] = np.arange(12.0).reshape(4, 3)
            file.create_dataset("fill", shape=(30, 2), dtype="f4", fillvalue=2.5)
            gzip = file.create_dataset("gzip", shape=(20, 3), dtype="i8", chunks=(4, 2), compression=4, shuffle=True)
            gzip[4:12] = np.arange(24).reshape(8, 3)
            file.create_dataset("lzf", data=np.arange(20.0), chunks=(8,), compression="lzf", fletcher32=True)
            file.create_dataset("marked", data=np.arange(5, dtype="u2")).attrs["torch_dtype"] = "bfloat16"
            for i in range(3):
                file[f"ids/{i}"] = np.arange(i)
            variable = file.create_dataset("variable", shape=(2,), dtype=h5py.vlen_dtype(np.int32))
            variable[0], variable[1] = [1, 2], [3]
            texts = file.create_dataset("texts", shape=(2,), dtype=h5py.string_dtype())
            texts[0], texts[1] = "one", "zwei"
            compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            compact.set_layout(h5py.h5d.COMPACT)
            file.create_dataset("compact", data=np.arange(4.0), dcpl=compact)
        return path.read_bytes()


@cache
def hdf5_addresses(libver: str) -> list[int]:
    """Where the object headers of :func:`hdf5_file` begin."""
    import h5py

    found: list[int] = []
    with h5py.File(io.BytesIO(hdf5_file(libver)), "r") as file:
        file.visititems(lambda _, item: found.append(int(h5py.h5o.get_info(item.id).addr)))
        found.append(int(h5py.h5o.get_info(file.id).addr))
    return sorted(found)


def hdf5_objects() -> list[bytes]:
    """Two bytes that say where an object begins, and the file behind its superblock, as far as the object's metadata."""
    found: list[bytes] = []
    for libver, skip, mark in (("earliest", 96, 0), ("latest", 48, 0x8000)):
        whole = hdf5_file(libver)
        places = {place | mark: max(place + 1024, 2048) for place in hdf5_addresses(libver)}
        found += [selector.to_bytes(2, "little") + whole[skip:end] for selector, end in places.items()]
    return found


def hdf5_heaps() -> list[bytes]:
    whole = hdf5_file("earliest")
    at = whole.index(b"GCOL")
    return [whole[at : at + 4096], whole[at : at + 512]]


def hdf5() -> list[bytes]:
    """Files of one dataset or group each, since the library takes a millisecond for each."""
    return [_hdf5_with(fill, libver) for fill in _HDF5_KINDS for libver in ("earliest", "latest")]


def _hdf5_with(fill: Callable[[Any], object], libver: str) -> bytes:
    import h5py

    def save(target: Any) -> None:
        with h5py.File(target, "w", libver=libver) as file:
            fill(file)

    return _written(save)


def _gzip(file: Any) -> None:
    made = file.create_dataset("x", shape=(6, 3), dtype="i4", chunks=(4, 2), compression=4, shuffle=True, fillvalue=7)
    made[:4] = 5


def _variable(file: Any) -> None:
    import h5py

    made = file.create_dataset("x", shape=(2,), dtype=h5py.vlen_dtype(np.int32))
    made[0], made[1] = [1, 2], [3]


def _ids(file: Any) -> None:
    for i in range(2):
        file[f"x/{i}"] = np.arange(i + 1)


_HDF5_KINDS: list[Callable[[Any], object]] = [
    lambda file: file.create_dataset("g/x", data=np.arange(12.0).reshape(4, 3)),
    lambda file: file.create_dataset("x", shape=(5, 2), dtype="f4", fillvalue=2.5),
    lambda file: file.create_dataset("x", data=np.arange(9.0), chunks=(4,), compression="lzf", fletcher32=True),
    lambda file: file.create_dataset("x", data=np.arange(5, dtype="u2")).attrs.__setitem__("torch_dtype", "bfloat16"),
    lambda file: file.create_dataset("x", data=["one", "zwei"]),
    _gzip,
    _variable,
    _ids,
]


def deflates() -> list[bytes]:
    """A byte that says whether the checksum is mended, then the stream."""
    contents = [b"", b"a", b"abc" * 100, bytes(range(256)) * 4, np.arange(300.0).tobytes()]
    raw = [raw_deflate(content, level) for content in contents for level in (0, 1, 9)]
    return [b"\1" + stream for stream in raw] + [b"\0" + zlib.compress(content) for content in contents]


# ---- JSON and texts


def _entry(name: str, dtype: str, shape: list[int]) -> dict[str, Any]:
    print_ = {"size": 224, "mtime_ns": 5, "sample": "0" * 32}
    tensors = {name: {"dtype": dtype, "shape": shape, "xxh3_128": "f" * 32}}
    return {**print_, "tensors": tensors, "made_from": [{"path": "old/a.pt", **print_}]}


def manifests() -> list[bytes]:
    files = {"a.npy": _entry("a", "float64", [4, 3]), "gone.npy": _entry("b", "bfloat16", [1])}
    mark = {"size": 224, "mtime_ns": 5, "sample": None}
    parts: dict[str, Any] = {
        "number": 2,
        "format": "npy",
        "files": {"names": ["a.npy", "part-2/b.npy"], "sizes": [224, 152], "mtimes_ns": [1, 1], "samples": [None, "a" * 32]},
        "parts": {
            "emb": {
                "dtype": "float64", "row_shape": [3], "files": [0, 1], "offsets": [128, 128], "rows": [4, 1],
                "since": [1, 2], "until": [0, 0], "xxh3_128": [None, "b" * 32],
            }
        },
        "whole": {"a": {"file": 0, "dtype": "float64", "shape": [4, 3], "xxh3_128": None}},
    }  # fmt: skip
    found = {**parts, "number": 1, "whole": {}, "passed": {"headers": "c" * 16}}
    found["files"] = {name: column[:1] for name, column in parts["files"].items()}
    emb = {name: column[:1] for name, column in parts["parts"]["emb"].items() if name not in ("dtype", "row_shape")}
    found["parts"] = {"emb": {**emb, "dtype": "float64", "row_shape": [3]}}
    raw: list[dict[str, Any]] = [
        {"format_version": 1, "files": files, "verified": {"values": {"a.npy": mark}}, "pending": ["b.npy"]},
        {"format_version": 1, "files": {}, "verified": {}, "found": found},
        {"format_version": 2, "generation": parts, "verified_parts": {"values": "d" * 32}, "files": {}, "verified": {}},
    ]
    return [json.dumps(each).encode() for each in raw]


def configs() -> list[bytes]:
    samples = {"fields": {"a": "emb[i]", "n": "emb[neg[i], 0]"}, "splits": {"train": "train_idx"}}
    raw: list[dict[str, Any]] = [
        {"embedding_dim": 8, "n_neg": 4, "n_clusters": 3, "split_sizes": {"train": 10, "val": 2}},
        {
            "embedding_dim": 8,
            "n_neg": 4,
            "steering_probabilities": {"zero": 0.5, "centroid": 0.5},
            "curriculum": {"zero_prob_start": 0.9, "zero_prob_end": 0.1, "warmup_epochs": 3},
        },
        {"samples": samples},
    ]
    return [json.dumps(each).encode() for each in raw]


def expressions() -> list[bytes]:
    texts = ["emb[i]", "emb[neg[i], 0]", "'a/b'[row]", "a.b[c[d[i]], -1]", "x[anchor]", '"ü"[i]', "a[i, 0x10]"]
    return [text.encode() for text in texts]


def indices() -> list[bytes]:
    names = {"weight_map": {"t0": "a.safetensors", "t1": "a.safetensors"}, "metadata": {"total_size": 3}}
    return [json.dumps(names).encode(), json.dumps({"weight_map": {"x": "b.safetensors"}}).encode()]


def states() -> list[bytes]:
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train", "_indices_data_files": None}
    return [json.dumps(state).encode(), json.dumps({"splits": ["train", "test"]}).encode()]


def names() -> list[bytes]:
    return [b"a-00000-of-00002\na-00001-of-00002", b"e_00\ne_01\ne_02\nx", b"p.10\np.11", b"a-001\na-002\nb_000"]
