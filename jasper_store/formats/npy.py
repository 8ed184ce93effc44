"""``.npy``: a magic, a Python literal that describes dtype, order and shape, then the bytes.

Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, versions 1.0, 2.0 and 3.0. The
header is parsed here because numpy offers no public reader for version 3.0, and none that promises to be lazy.
"""

from __future__ import annotations

import ast
import re
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict, cast

import numpy as np
import torch

from jasper_store.errors import CorruptFileError, IncompatibleOptionsError
from jasper_store.formats.base import Extent, Skipped, TensorSpec, contiguous_strides
from jasper_store.formats.files import DATA_START, check_shape, dtype_name, open_for_reading, read_at, shown
from jasper_store.formats.flat import FlatWriter, stem_of
from jasper_store.formats.pickled import strings_of
from jasper_store.formats.texts import BLOCK_NBYTES, Texts, encode_bytes, encode_unicode, in_memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from jasper_store.formats.base import FormatName, Schema
    from jasper_store.formats.protocols import FileWriter
    from jasper_store.formats.texts import Block

__all__ = ["MAX_PREFIX", "NpyFormat", "dtype_of", "parse_header", "strides_of"]

_MAGIC = b"\x93NUMPY"
_VERSIONS = {b"\x01\x00": (2, "latin1"), b"\x02\x00": (4, "latin1"), b"\x03\x00": (4, "utf-8")}
# numpy itself refuses to parse longer headers: the literal parser was not made for hostile text.
_MAX_HEADER = 10_000
MAX_PREFIX = 12 + _MAX_HEADER
"""The most bytes that stand before the values."""

_DTYPES = {
    "|b1": torch.bool,
    "|u1": torch.uint8,
    "|i1": torch.int8,
    "<u2": torch.uint16,
    "<i2": torch.int16,
    "<u4": torch.uint32,
    "<i4": torch.int32,
    "<u8": torch.uint64,
    "<i8": torch.int64,
    "<f2": torch.float16,
    "<f4": torch.float32,
    "<f8": torch.float64,
    "<c8": torch.complex64,
    "<c16": torch.complex128,
}
_DESCRIPTIONS = {dtype: f"'{text}'" for text, dtype in _DTYPES.items()}
# numpy has no bfloat16. A field of that name keeps the bits and says what they are to any reader of the file.
_DESCRIPTIONS[torch.bfloat16] = "[('bfloat16', '<u2')]"


class _Header(TypedDict):
    descr: object
    fortran_order: bool
    shape: tuple[object, ...]


class NpyFormat:
    """Reads and writes one array per file; Fortran order becomes strides, bfloat16 a structured dtype."""

    name: FormatName = "npy"
    suffixes: tuple[str, ...] = (".npy",)
    one_file: str | None = None

    def locate(self, path: Path, schema: Schema) -> list[TensorSpec]:  # noqa: ARG002 - names need no schema
        """See :meth:`jasper_store.formats.protocols.Format.locate`. The array is named by its file."""
        name = stem_of(path, self.suffixes)
        header, data_start, size = _read_header(path)
        if _is_text(header["descr"]):
            return []
        dtype = dtype_of(path, header["descr"])
        shape = _check_sizes(path, header, dtype_name(dtype), dtype.itemsize, data_start, size)
        return [TensorSpec(name, dtype, shape, Extent(path, data_start, strides_of(header, shape)))]

    def skipped(self, path: Path, schema: Schema) -> list[Skipped]:  # noqa: ARG002 - names need no schema
        """See :class:`jasper_store.formats.protocols.SupportsSkipped`: an array of strings, or of Python objects."""
        header, data_start, size = _read_header(path)
        description = header["descr"]
        if not _is_text(description):
            return []
        name = stem_of(path, self.suffixes)
        if description == "|O":
            reason = (
                "it holds pickled Python objects, which are never executed; only strings among them can be converted"
            )
            return [Skipped(name, path, reason)]
        stored = np.dtype(str(description))
        shape = _check_sizes(path, header, stored.str, stored.itemsize, data_start, size)
        return [Skipped(name, path, f"it holds strings ({stored.str}, shape {list(shape)}), not numbers")]

    def texts(self, path: Path, schema: Schema) -> list[Texts]:  # noqa: ARG002 - names need no schema
        """See :class:`jasper_store.formats.texts.SupportsTexts`: an array of fixed-width strings, or of ``str`` objects."""
        header, data_start, size = _read_header(path)
        description = header["descr"]
        if not _is_text(description):
            return []
        if description == "|O":
            with open_for_reading(path) as (file, _):
                objects = strings_of(file, data_start, size)
            return [] if objects is None else [in_memory(path, stem_of(path, self.suffixes), objects)]
        stored = np.dtype(str(description))
        shape = _check_sizes(path, header, stored.str, stored.itemsize, data_start, size)
        # Strings without room for a character take no bytes, so their number may be anything.
        if len(shape) != 1 or not stored.itemsize:
            return []
        name, rows = stem_of(path, self.suffixes), shape[0]
        return [Texts(name, (path,), rows, partial(_read_texts, path, name, stored, rows, data_start))]

    def writer(self, path: Path, schema: Schema, *, compression: str | None = None) -> FileWriter:  # noqa: ARG002
        """See :meth:`jasper_store.formats.protocols.Format.writer`; one tensor, rows may be unknown until the end."""
        if compression is not None:
            msg = f".npy has no compression, found compression={compression!r}; use None, or format='hdf5'."
            raise IncompatibleOptionsError(msg, path=path)
        return FlatWriter(path, _make_header)


def _corrupt(path: Path, what: str, *, cause: BaseException | None = None) -> NoReturn:
    msg = f"{path}: not a .npy file that can be read: {what} Save it again with numpy.save."
    raise CorruptFileError(msg, path=path) from cause


def _read_header(path: Path) -> tuple[_Header, int, int]:
    """The header, the offset of the data and the size of the file."""
    with open_for_reading(path) as (file, size):
        raw = read_at(file, 0, MAX_PREFIX)
    return *parse_header(path, raw, size), size


@lru_cache(maxsize=8)
def _literal(text: bytes, encoding: str) -> Any:
    """What a header says, to be looked at only: those of ten thousand shards say the same, and compiling takes 50 us."""
    return ast.literal_eval(text.decode(encoding).strip())


def parse_header(path: Path, raw: bytes, size: int) -> tuple[_Header, int]:
    """The header that begins with ``raw``, of ``size`` bytes in all; and where the values begin.

    Raises:
        CorruptFileError: it is not that of a ``.npy`` file.
    """
    if not raw.startswith(_MAGIC):
        _corrupt(path, f"it must begin with {_MAGIC!r}, found {raw[:6]!r}.")
    version = raw[6:8]
    if version not in _VERSIONS:
        _corrupt(path, f"format versions 1.0, 2.0 and 3.0 are known, found {version!r}.")
    width, encoding = _VERSIONS[version]
    length = int.from_bytes(raw[8 : 8 + width], "little")
    start = 8 + width + length
    if length > _MAX_HEADER or start > len(raw):
        _corrupt(path, f"its header should have {length} bytes, in a file of {size} (was it truncated?).")
    try:
        header = _literal(raw[8 + width : start], encoding)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as exc:
        _corrupt(path, f"its header is not a Python literal: {type(exc).__name__}: {exc!s:.100}.", cause=exc)
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        _corrupt(path, f"its header must hold descr, fortran_order and shape, found {shown(header, 200)}.")
    if not isinstance(header["fortran_order"], bool) or not isinstance(header["shape"], tuple):
        _corrupt(path, f"its header must hold a truth value and a tuple of sizes, found {shown(header, 200)}.")
    return cast("_Header", header), start


def _check_sizes(path: Path, header: _Header, kind: str, itemsize: int, data_start: int, size: int) -> tuple[int, ...]:
    """The shape, after it was compared with the bytes of the file."""
    shape, nbytes = check_shape(header["shape"], itemsize, path=path, tensor=stem_of(path, NpyFormat.suffixes))
    if data_start + nbytes != size:
        _corrupt(
            path,
            f"{kind} {list(shape)} needs {nbytes} bytes of data, the file holds {size - data_start} "
            "(was it truncated or appended to?).",
        )
    return shape


def _is_text(description: object) -> bool:
    """Whether ``descr`` says strings, or objects, which mostly are strings."""
    return isinstance(description, str) and re.fullmatch(r"\|O|[<>=|][US]\d{1,9}", description) is not None


def _read_texts(path: Path, name: str, stored: np.dtype[Any], rows: int, data_start: int) -> Iterator[Block]:
    """The strings as UTF-8, some megabytes of the file at a time."""
    step = max(BLOCK_NBYTES // stored.itemsize, 1)
    with open_for_reading(path) as (file, _):
        for first in range(0, rows, step):
            n = min(step, rows - first)
            raw = read_at(file, data_start + first * stored.itemsize, n * stored.itemsize)
            if len(raw) != n * stored.itemsize:
                _corrupt(path, "it was truncated while it was read.")
            if stored.kind == "S":
                yield encode_bytes(name, np.frombuffer(raw, np.uint8).reshape(n, -1), first)
            else:
                codes = np.frombuffer(raw, stored.byteorder.replace("=", "<") + "u4").astype(np.uint32)
                yield encode_unicode(name, codes.reshape(n, -1), first)


def strides_of(header: _Header, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides of an array in Fortran order; ``None`` in C order."""
    return contiguous_strides(shape[::-1])[::-1] if header["fortran_order"] and len(shape) > 1 else None


def dtype_of(path: Path, description: object) -> torch.dtype:
    """Torch dtype of a ``descr`` entry.

    Raises:
        CorruptFileError: torch has none, or it is big-endian.
    """
    # '<V2' is what numpy.save writes for the bfloat16 of the ml_dtypes package.
    if description in ("<V2", "|V2", [("bfloat16", "<u2")]):
        return torch.bfloat16
    if not isinstance(description, str):
        _corrupt(
            path, f"structured arrays are not tensors, found dtype {shown(description, 200)}; save each field alone."
        )
    # What numpy.save writes for numbers. numpy's own reader of such texts knows whole languages, and warns of some.
    if not re.fullmatch(r"[<>=|]?[B-Zb-z?]\d{0,3}", description):
        _corrupt(path, f"dtype {shown(description, 100)} has no torch equal; save plain numbers, such as float32.")
    try:
        found = np.dtype(description)
    except (TypeError, ValueError, SyntaxError) as exc:
        _corrupt(path, f"it has the unknown dtype {shown(description, 100)}.", cause=exc)
    if found.hasobject:
        _corrupt(path, "it holds pickled Python objects, which are never executed; save numbers.")
    if found.byteorder == ">":
        _corrupt(path, f"it is big-endian ({found.str}); use array.astype(array.dtype.newbyteorder('<')).")
    if found.str not in _DTYPES:
        _corrupt(path, f"dtype {found.str} has no torch equal; use array.astype('float32') or another number.")
    return _DTYPES[found.str]


def _make_header(path: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int) -> bytes:  # noqa: ARG001
    """A version 1.0 header, padded so that the data begins at ``DATA_START``."""
    if dtype not in _DESCRIPTIONS:
        msg = f".npy cannot hold {dtype_name(dtype)} (tensor {name!r}); use format='safetensors'."
        raise IncompatibleOptionsError(msg, path=path, tensor=name)
    length = DATA_START - 10
    text = f"{{'descr': {_DESCRIPTIONS[dtype]}, 'fortran_order': False, 'shape': {shape!r}, }}"
    return _MAGIC + b"\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1).encode("latin1") + b"\n"
