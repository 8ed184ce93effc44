"""``.npy``: a magic, a Python literal that describes dtype, order and shape, then the bytes.

Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, versions 1.0, 2.0 and 3.0. The
header is parsed here because numpy offers no public reader for version 3.0, and none that promises to be lazy.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, NoReturn, TypedDict, cast

import numpy as np
import torch

from jasper_store.errors import CorruptFileError, IncompatibleOptionsError
from jasper_store.formats.base import Extent, TensorSpec, contiguous_strides
from jasper_store.formats.files import DATA_START, check_shape, dtype_name, open_for_reading, read_at, shown
from jasper_store.formats.flat import FlatWriter, stem_of

if TYPE_CHECKING:
    from pathlib import Path

    from jasper_store.formats.base import FileWriter, FormatName, Schema

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
        """See :meth:`jasper_store.formats.base.Format.locate`. The array is named by its file."""
        name = stem_of(path, self.suffixes)
        header, data_start, size = _read_header(path)
        dtype, claimed = dtype_of(path, header["descr"]), header["shape"]
        shape, nbytes = check_shape(claimed, dtype.itemsize, path=path, tensor=name)
        if data_start + nbytes != size:
            _corrupt(
                path,
                f"{dtype_name(dtype)} {list(shape)} needs {nbytes} bytes of data, the file holds {size - data_start} "
                "(was it truncated or appended to?).",
            )
        return [TensorSpec(name, dtype, shape, Extent(path, data_start, strides_of(header, shape)))]

    def writer(self, path: Path, schema: Schema, *, compression: str | None = None) -> FileWriter:  # noqa: ARG002
        """See :meth:`jasper_store.formats.base.Format.writer`; one tensor, rows may be unknown until the end."""
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
        header = ast.literal_eval(raw[8 + width : start].decode(encoding).strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as exc:
        _corrupt(path, f"its header is not a Python literal: {type(exc).__name__}: {exc!s:.100}.", cause=exc)
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        _corrupt(path, f"its header must hold descr, fortran_order and shape, found {shown(header, 200)}.")
    if not isinstance(header["fortran_order"], bool) or not isinstance(header["shape"], tuple):
        _corrupt(path, f"its header must hold a truth value and a tuple of sizes, found {shown(header, 200)}.")
    return cast("_Header", header), start


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
