"""Every parser that reads what others may have written, as something that takes bytes.

A target returns if the input is opened, and raises an error of ``jasper_store.errors`` if it is refused. Any other exception,
over 10 s of work, or over 1 GB of memory is a defect.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jasper_store.errors import CorruptFileError, JasperStoreError
from jasper_store.formats.arrow.directory import dataset_files, splits_of
from jasper_store.formats.base import Schema
from jasper_store.formats.found import read_found
from jasper_store.formats.generation import read_generation
from jasper_store.formats.hdf5.deflate import InflateError, Workspace, inflate
from jasper_store.formats.hdf5.header import Headers
from jasper_store.formats.hdf5.heap import check_heaps
from jasper_store.formats.numbered import group, pick, read_index
from jasper_store.formats.pickled import strings_of
from jasper_store.formats.pt import ragged, unpickle
from jasper_store.formats.registry import format_for, readable
from jasper_store.jasper.config import parse_config
from jasper_store.samples.declaration import Declaration
from jasper_store.samples.expression import parse_field
from jasper_store.samples.opened import load_config
from jasper_store.store import manifest_file
from tests.fuzz import envelopes, seeds
from tests.fuzz.walk import walk_file, walk_specs

if TYPE_CHECKING:
    from collections.abc import Callable

    from jasper_store.formats.base import FormatName

__all__ = ["TARGETS", "Target"]

Run = "Callable[[bytes, Path], None]"


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        run: reads one input; files that it needs it makes in the folder that it is given.
        seeds: sound inputs.
        tokens: pieces that the fuzzer inserts.
        most: bytes of an input, at most.
        library: whether a C library is called, so that a damaged input may end the process.
    """

    run: Callable[[bytes, Path], None]
    seeds: Callable[[], list[bytes]]
    tokens: tuple[bytes, ...] = field(default=())
    most: int = 4096
    library: bool = False


def _put(path: Path, data: bytes) -> None:
    """Write a file anew, in place."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _file(name: FormatName, suffix: str, wrap: Callable[[bytes], bytes], data: bytes, folder: Path) -> None:
    path = folder / f"x{suffix}"
    _put(path, wrap(data))
    walk_file(readable()[name], path)


def _as_it_is(data: bytes) -> bytes:
    return data


def _of(name: FormatName, suffix: str, wrap: Callable[[bytes], bytes] = _as_it_is) -> Callable[[bytes, Path], None]:
    return partial(_file, name, suffix, wrap)


def _bins(data: bytes, folder: Path) -> None:
    suffix = (".fbin", ".u8bin", ".i8bin", ".ibin")[data[0] % 4 if data else 0]
    _file("bin", suffix, _as_it_is, data[1:], folder)


def _npz_member(data: bytes) -> bytes:
    return envelopes.sound_zip([(b"a.npy", data[1:])], deflate=bool(data[:1] > b"\x7f"))


def _npy_objects(data: bytes, folder: Path) -> None:
    head = bytes(128)
    found = strings_of(io.BytesIO(head + data), len(head), len(head) + len(data))
    assert found is None or all(type(text) is str for text in found)


def _pickle_machine(data: bytes, folder: Path) -> None:
    found = ragged.parse(data)
    if found is not None:
        assert int(found[1][-1]) == len(found[0])
    try:
        unpickle.describe(unpickle.load(data))
    except unpickle.PickleError as exc:
        raise CorruptFileError(str(exc)) from exc


def _hdf5_object(data: bytes, folder: Path) -> None:
    content = envelopes.hdf5_object(data, seeds.hdf5_file("earliest"), seeds.hdf5_file("latest"))
    Headers(folder / "x.h5", io.BytesIO(content), len(content))


def _hdf5_heaps(data: bytes, folder: Path) -> None:
    _put(folder / "x.h5", data)
    check_heaps(folder / "x.h5")


def _deflate(data: bytes, folder: Path) -> None:
    stream, nbytes = (data[1:], 300) if not data or not data[0] & 1 else envelopes.deflated(data[1:], 1 << 16)
    try:
        found = inflate(stream, nbytes)
    except InflateError as exc:
        raise CorruptFileError(str(exc)) from exc
    assert found == zlib.decompressobj().decompress(stream)


def _compress(data: bytes, folder: Path) -> None:
    itemsize, count = (1, 2, 4, 8)[data[0] & 3 if data else 0], 1 + (data[0] >> 2) % 3 if data else 1
    nbytes = max(len(data) // count // itemsize * itemsize, itemsize)
    work = Workspace()
    work.fit(count, nbytes, itemsize)
    chunks = np.zeros(count * nbytes, np.uint8)
    chunks[: len(data)] = np.frombuffer(data[: count * nbytes], np.uint8)
    work.data[: count * nbytes] = chunks
    for chunk, stream in zip(chunks.reshape(count, nbytes), work.compress(count, nbytes, itemsize), strict=True):
        planes = np.frombuffer(inflate(stream, nbytes), np.uint8).reshape(itemsize, -1)
        assert np.array_equal(planes.T.reshape(-1), chunk)


def _manifest(data: bytes, folder: Path) -> None:
    _put(folder / "jasper_store.json", data)
    if not (folder / "a.npy").exists():
        (folder / "part-2").mkdir()
        for name, rows in (("a.npy", 4), ("part-2/b.npy", 1)):
            np.save(folder / name, np.zeros((rows, 3)))
            os.utime(folder / name, ns=(1, 1))
    known = manifest_file.read(folder)
    assert known is not None
    assert manifest_file._parse(folder, json.dumps(known.to_json()).encode()).to_json() == known.to_json()
    if known.generation is None:
        specs = readable()["npy"].locate(folder / "a.npy", Schema())
        known.check(specs)
        for check in known.verified:
            known.is_verified(specs, check)
        if (found := read_found(folder)) is not None and found.current_facts(folder, (".npy",)) is not None:
            walk_specs(
                found.locate(folder, found.paths(folder)), {path: path.stat().st_size for path in folder.rglob("*.npy")}
            )
        return
    generation = read_generation(folder)
    assert generation is not None
    specs = generation.locate(folder, Schema(), format_for)
    known.check(specs)
    walk_specs(specs, {path: path.stat().st_size for path in folder.rglob("*.npy")})


def _config(data: bytes, folder: Path) -> None:
    path = folder / "config.json"
    _put(path, data)
    values = load_config(path)
    declared = Declaration.from_config(values, path)
    if declared is not None:
        assert Declaration.from_config({"samples": declared.to_config()}, path) == declared
        return
    parsed = parse_config(values, path)
    for epoch in (0, 1, 10**6):
        assert abs(sum(parsed.curriculum.probabilities(epoch)) - 1) < 1e-3


def _expression(data: bytes, folder: Path) -> None:
    found = parse_field(data.decode("utf-8", "surrogateescape"), "x")
    assert parse_field(str(found), "x") == found


def _index(data: bytes, folder: Path) -> None:
    shard, path = folder / "a.safetensors", folder / "x.safetensors.index.json"
    if not shard.exists():
        shard.write_bytes(seeds.safetensors_files()[0])
    _put(path, data)
    fmt = readable()["safetensors"]
    walk_specs(pick(path, read_index(path), fmt.locate(shard, Schema())), {shard: shard.stat().st_size})


def _state(data: bytes, folder: Path) -> None:
    for name in ("data-00000-of-00001.arrow", "other.arrow"):
        if not (folder / name).exists():
            (folder / name).touch()
    files = {path: path.stem for path in folder.glob("*.arrow")}
    _put(folder / "dataset_dict.json", data)
    _put(folder / "state.json", data)
    try:
        splits_of(folder)
    finally:
        kept, skipped = dataset_files(folder, files)
        assert kept.keys() <= files.keys()
        assert all(skip.reason for skip in skipped)


def _names(data: bytes, folder: Path) -> None:
    stems = [line for line in data.decode("utf-8", "surrogateescape").split("\n") if line][:64]
    for whole in (True, False):
        groups, rest = group({folder / f"{stem}.npy": stem for stem in stems}, whole=whole)
        assert sum(len(found.files) for found in groups) + len(rest) <= len(stems)


def _sound_hdf5(data: bytes, folder: Path) -> None:
    _put(folder / "x.h5", envelopes.sound_headers(data))
    walk_file(readable()["hdf5"], folder / "x.h5")


_JSON: tuple[bytes, ...] = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"null",
    b"true",
    b"-1",
    b"1e400",
    b"0.5",
    b"\\ud800",
    b"\\u0000",
)
_JSON += (b"9223372036854775807", b"9223372036854775808", b"18446744073709551616", b"NaN", b"2147483648")
_TENSOR_KEYS = (b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"F32"', b'"BF16"', b'"I64"', b'"BOOL"')
_MANIFEST_KEYS: tuple[bytes, ...] = (
    b'"format_version"',
    b'"files"',
    b'"verified"',
    b'"generation"',
    b'"found"',
    b'"passed"',
    b'"pending"',
)
_MANIFEST_KEYS += (b'"tensors"', b'"made_from"', b'"sample"', b'"parts"', b'"whole"', b'"a.npy"', b'"part-2/b.npy"')
_CONFIG_KEYS: tuple[bytes, ...] = (
    b'"samples"',
    b'"fields"',
    b'"splits"',
    b'"embedding_dim"',
    b'"n_neg"',
    b'"curriculum"',
    b'"train"',
)
_CONFIG_KEYS += (
    b'"split_sizes"',
    b'"n_clusters"',
    b'"steering_probabilities"',
    b'"centroid"',
    b'"stages"',
    b'"emb[i]"',
)
_NPY = (
    b"'descr'",
    b"'fortran_order'",
    b"'shape'",
    b"True",
    b"'<f4'",
    b"'|O'",
    b"'<U2'",
    b"0x",
    b"(",
    b")",
    b",",
    b"1e9",
)
_PICKLE: tuple[bytes, ...] = tuple(
    bytes([op]) for op in b"\x80\x95(0N\x88\x89KMJ\x8aGX\x8c]})\x85\x86\x87taesuqr\x94hjc\x93RQbCB\x8e\x96."
)
_PICKLE += (
    b"](",
    b"q\x00",
    b"h\x00",
    b"\x85\x85\x85\x85",
    b"]r\0\0\0\0(",
    b"ctorch\nFloatStorage\n",
    b"X\x01\0\0\x000",
)
_PICKLE += (
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"X\x07\0\0\0storage",
    b"h\0h\0\x86",
)
_NUMPY = (b"\x8c\x15numpy.core.multiarray\x8c\x0c_reconstruct\x93", b"\x8c\x05numpy\x8c\x07ndarray\x93", b"\x8c\x02f4")
_ZIP = (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"\xff\xff\xff\xff")
_ARROW = (b"ARROW1", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\xff\xff\xff\x7f", b"\4\0\0\0", b"\x10\0\0\0")
_HDF5 = (b"OHDR\2", b"OCHK", b"TREE", b"SNOD\1", b"HEAP", b"GCOL\1", b"\x10\0\x10\0\0\0\0\0", b"\5\0\x10\0\0\0\0\0")
_TEXT = (b"[", b"]", b"i", b"row", b"'", b'"', b",", b"-", b".", b"0x", b"\\", b"\n", b"\xe2\x84\xaa", b"lambda", b"(")

TARGETS: dict[str, Target] = {
    "safetensors": Target(_of("safetensors", ".safetensors"), seeds.safetensors_files, _JSON + _TENSOR_KEYS),
    "safetensors-header": Target(
        _of("safetensors", ".safetensors", envelopes.safetensors_header),
        seeds.safetensors_headers,
        _JSON + _TENSOR_KEYS,
        1024,
    ),
    "npy": Target(_of("npy", ".npy"), seeds.npy, _NPY, 1024),
    "npy-header": Target(_of("npy", ".npy", envelopes.npy_header), seeds.npy_headers, _NPY, 512),
    "npy-objects": Target(_npy_objects, seeds.npy_objects, _PICKLE + _NUMPY, 1024),
    "npz": Target(_of("npz", ".npz"), seeds.npz, _ZIP + _NPY),
    "npz-member": Target(_of("npz", ".npz", _npz_member), seeds.npz_members, _NPY, 1024),
    "pt": Target(_of("pt", ".pt"), seeds.pt, _ZIP + _PICKLE),
    "pt-records": Target(_of("pt", ".pt", envelopes.pt_records), seeds.pt_pickles, _PICKLE, 2048),
    "pt-pickle": Target(_pickle_machine, seeds.pt_pickles, _PICKLE, 2048),
    "pickle": Target(_of("pickle", ".pkl"), seeds.pickles, _PICKLE + _NUMPY, 2048),
    "faiss": Target(_of("faiss", ".faiss"), seeds.faiss, (b"IxFI", b"IxF2", b"IxFl"), 512),
    "bin": Target(_bins, seeds.bins, (), 256),
    "arrow": Target(_of("arrow", ".arrow"), seeds.arrow, _ARROW),
    "hdf5-object": Target(_hdf5_object, seeds.hdf5_objects, _HDF5, 20000),
    "hdf5-heaps": Target(_hdf5_heaps, seeds.hdf5_heaps, _HDF5, 8192),
    "hdf5": Target(_sound_hdf5, seeds.hdf5, _HDF5, 20000, library=True),
    "deflate": Target(_deflate, seeds.deflates),
    "compress": Target(_compress, seeds.deflates, (), 16384),
    "manifest": Target(_manifest, seeds.manifests, _JSON + _MANIFEST_KEYS, 2048),
    "config": Target(_config, seeds.configs, _JSON + _CONFIG_KEYS + _TEXT, 1024),
    "expression": Target(_expression, seeds.expressions, _TEXT, 256),
    "index": Target(_index, seeds.indices, (*_JSON, b'"weight_map"', b'"a.safetensors"', b'"t0"', b'"t1"'), 512),
    "state": Target(_state, seeds.states, (*_JSON, b'"_data_files"', b'"filename"', b'"splits"'), 512),
    "names": Target(_names, seeds.names, (b"-of-", b"_00", b".00", b"-00001", b"\n"), 512),
}


def accepted(target: Target, data: bytes, folder: Path) -> bool:
    """Whether an input was opened, and not refused; whatever else it raises is a defect."""
    try:
        target.run(data, folder)
    except JasperStoreError:
        return False
    return True
