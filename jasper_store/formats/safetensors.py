"""safetensors: an 8-byte length, a JSON header, then the bytes of every tensor without a gap.

Source: https://github.com/huggingface/safetensors, format specification in its README. The header is parsed
here, since the library does not say where in the file a tensor lies. The library is the reference all the same: what
it makes of a file that was written, or is verified, is compared with what this module makes of it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from jasper_store.errors import CorruptFileError, IncompatibleOptionsError
from jasper_store.formats.base import Extent, TensorSpec
from jasper_store.formats.files import DATA_START, check_shape, dtype_name, open_for_reading, read_at
from jasper_store.formats.flat import FlatWriter, stem_of

if TYPE_CHECKING:
    from pathlib import Path

    from jasper_store.formats.base import FormatName, Schema
    from jasper_store.formats.protocols import FileWriter

__all__ = ["SafetensorsFormat", "header_entry"]

MAX_HEADER = 10_000_000
"""Longest header that is read, in bytes, which has room for 100 000 tensors. The reference's limit is ten times as much;
but JSON can take 24 bytes of Python objects for each of its own, and 2.4 GB is too much for what a file claims."""

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class SafetensorsFormat:
    """Reads every safetensors file; writes one tensor per file with the data on a page boundary."""

    name: FormatName = "safetensors"
    suffixes: tuple[str, ...] = (".safetensors",)
    one_file: str | None = None

    def locate(self, path: Path, schema: Schema) -> list[TensorSpec]:  # noqa: ARG002 - names need no schema
        """See :meth:`jasper_store.formats.protocols.Format.locate`. A single tensor is named by its file."""
        specs = self.locate_keys(path)
        if len(specs) != 1:
            return specs
        only = specs[0]
        return [TensorSpec(stem_of(path, self.suffixes), only.dtype, only.shape, only.location)]

    def locate_keys(self, path: Path) -> list[TensorSpec]:
        """As :meth:`locate`, but each tensor is named by its key, a single one too."""
        header, data_start, data_nbytes = _read_header(path)
        entries = [(name, *_entry(path, name, value)) for name, value in header.items()]
        entries.sort(key=lambda entry: (entry[3], entry[4]))
        _check_layout(path, entries, data_nbytes)
        return [
            TensorSpec(name, dtype, shape, Extent(path, data_start + begin)) for name, dtype, shape, begin, _ in entries
        ]

    def compare_with_reference(self, path: Path) -> list[str]:
        """See :class:`jasper_store.formats.protocols.SupportsReference`: the safetensors library, which maps the file."""
        from safetensors import SafetensorError

        header, _, _ = _read_header(path)
        entries = {name: _entry(path, name, value) for name, value in header.items()}
        ours = {name: (_NAMES[dtype], shape) for name, (dtype, shape, _, _) in entries.items()}
        try:
            theirs = _reference_view(path)
        except SafetensorError as exc:
            return [f"the safetensors library refuses it: {exc}"]
        return [
            f"tensor {name!r:.100} is {_said(theirs.get(name))} to the safetensors library, {_said(ours.get(name))} to us"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]

    def writer(self, path: Path, schema: Schema, *, compression: str | None = None) -> FileWriter:  # noqa: ARG002
        """See :meth:`jasper_store.formats.protocols.Format.writer`; one tensor, rows may be unknown until the end."""
        if compression is not None:
            msg = f"safetensors has no compression, found compression={compression!r}; use None, or format='hdf5'."
            raise IncompatibleOptionsError(msg, path=path)
        return FlatWriter(path, _make_header)


def _corrupt(path: Path, what: str, *, cause: BaseException | None = None, tensor: str | None = None) -> NoReturn:
    msg = f"{path}: not a sound safetensors file: {what} Write it again, or convert it from its source."
    raise CorruptFileError(msg, path=path, tensor=tensor) from cause


def _reference_view(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor as the reference library reads them; no data is read."""
    from safetensors import safe_open

    # With any other framework than numpy the library would map the file a second time, writable.
    with safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - a file is no dictionary
        return {name: (str(found.get_dtype()), tuple(found.get_shape())) for name, found in slices.items()}


def _said(found: tuple[str, tuple[int, ...]] | None) -> str:
    return "not there" if found is None else f"{found[0]} {list(found[1])}"


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header's tensors, the offset of the data and the bytes of data."""
    with open_for_reading(path) as (file, size):
        if size < 8:
            _corrupt(path, f"it has {size} bytes, too few for a header (was it truncated?).")
        length = int.from_bytes(read_at(file, 0, 8), "little")
        if MAX_HEADER < length <= size - 8:
            _corrupt(
                path, f"its header has {length} bytes, at most {MAX_HEADER} are read; split it into several files."
            )
        if 8 + length > size:
            _corrupt(path, f"its header should have {length} bytes, in a file of {size} (was it truncated?).")
        raw = read_at(file, 8, length)
    if len(raw) != length:
        _corrupt(path, f"its header should have {length} bytes, only {len(raw)} could be read.")
    if not raw.startswith(b"{"):
        _corrupt(path, f"its header must begin with '{{', found {raw[:16]!r}.")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except RecursionError as exc:
        _corrupt(path, "its header is nested too deeply.", cause=exc)
    except ValueError as exc:  # UnicodeDecodeError, JSONDecodeError and the refusals of the two hooks
        _corrupt(path, f"its header is not valid JSON: {exc!s:.200}.", cause=exc)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _corrupt(path, "__metadata__ must map text to text.")
    return header, 8 + length, size - 8 - length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        msg = f"the name {twice!r:.100} occurs twice"
        raise ValueError(msg)
    return found


def _no_constants(text: str) -> NoReturn:
    msg = f"{text} is not JSON"
    raise ValueError(msg)


def _entry(path: Path, name: str, value: object) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Dtype, shape, begin and end of one tensor, checked against each other."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        _corrupt(
            path, f"tensor {name!r:.100} must have dtype, shape and data_offsets, found {value!r:.200}.", tensor=name
        )
    dtype = _DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        _corrupt(path, f"tensor {name!r:.100} has the unknown dtype {value['dtype']!r:.100}.", tensor=name)
    if not isinstance(value["shape"], list):
        _corrupt(path, f"the shape of tensor {name!r:.100} must be a list, found {value['shape']!r:.100}.", tensor=name)
    shape, nbytes = check_shape(value["shape"], dtype.itemsize, path=path, tensor=name)
    offsets = value["data_offsets"]
    sound = isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int and o >= 0 for o in offsets)
    if not sound or offsets[1] - offsets[0] != nbytes:
        _corrupt(
            path,
            f"tensor {name!r:.100} of {value['dtype']} {list(shape)} needs {nbytes} bytes, "
            f"found data_offsets {offsets!r:.100}.",
            tensor=name,
        )
    return dtype, shape, offsets[0], offsets[1]


def _check_layout(path: Path, entries: list[tuple[str, torch.dtype, tuple[int, ...], int, int]], nbytes: int) -> None:
    """Tensors, sorted by offset, must cover the data exactly: no hole, no overlap, no rest."""
    end = 0
    for name, _, _, begin, stop in entries:
        if begin != end:
            what = "overlaps the one before it" if begin < end else "leaves a hole before it"
            _corrupt(
                path, f"tensor {name!r:.100} begins at byte {begin} where {end} was expected: it {what}.", tensor=name
            )
        end = stop
    if end != nbytes:
        _corrupt(path, f"its tensors take {end} bytes, the file holds {nbytes} (was it truncated or appended to?).")


def header_entry(dtype: torch.dtype, shape: tuple[int, ...], begin: int, end: int) -> dict[str, object]:
    """What a header says of a tensor whose bytes are ``begin`` to ``end`` of the data.

    Raises:
        IncompatibleOptionsError: safetensors has no such dtype.
    """
    if dtype not in _NAMES:
        msg = f"safetensors cannot hold {dtype_name(dtype)}; convert it to another dtype first."
        raise IncompatibleOptionsError(msg)
    return {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}


def _make_header(path: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int) -> bytes:
    """The header of a file with one tensor, padded with spaces so that the data begins at ``DATA_START``."""
    if dtype not in _NAMES:
        msg = f"safetensors cannot hold {dtype_name(dtype)} (tensor {name!r}); convert it to another dtype first."
        raise IncompatibleOptionsError(msg, path=path, tensor=name)
    entry = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [0, nbytes]}
    # The name is at most 200 bytes and the shape at most 64 sizes, so the header always fits into the page.
    text = json.dumps({"__metadata__": {"format": "pt"}, name: entry}, separators=(",", ":")).encode()
    length = DATA_START - 8
    return length.to_bytes(8, "little") + text.ljust(length)
