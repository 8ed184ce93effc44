"""Vectors as search libraries keep them: a header of some bytes, then rows. Two formats, each with one matrix a file.

Sources: https://github.com/facebookresearch/faiss, faiss/impl/index_write.cpp, for ``IndexFlat``;
https://big-ann-benchmarks.com for ``.fbin`` and its kin.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NoReturn

import torch

from jasper_store.errors import CorruptFileError
from jasper_store.formats.base import Extent, TensorSpec
from jasper_store.formats.files import check_shape, open_for_reading, read_at
from jasper_store.formats.flat import stem_of

if TYPE_CHECKING:
    from pathlib import Path

    from jasper_store.formats.base import FormatName, Schema

__all__ = ["BinFormat", "FaissFormat"]

# Four letters that say the kind, dimensions, rows, two numbers that mean nothing any more, is_trained, metric.
_FAISS = struct.Struct("<4siqqq?i")
# metric_arg, only of metrics beyond inner product and L2.
_METRIC_ARGUMENT = 4
_FLAT = (b"IxFI", b"IxF2", b"IxFl")
_BIN_DTYPES = {".fbin": torch.float32, ".u8bin": torch.uint8, ".i8bin": torch.int8, ".ibin": torch.int32}
_BIN = struct.Struct("<II")


class FaissFormat:
    """Reads FAISS ``IndexFlat`` files, whose rows are float32 from byte 45 or 49 on; the tensor is named by the file."""

    name: FormatName = "faiss"
    suffixes: tuple[str, ...] = (".faiss", ".index")
    one_file: str | None = None

    def locate(self, path: Path, schema: Schema) -> list[TensorSpec]:  # noqa: ARG002 - names need no schema
        """See :meth:`jasper_store.formats.protocols.ReadFormat.locate`."""
        name = stem_of(path, self.suffixes)
        with open_for_reading(path) as (file, size):
            head = read_at(file, 0, _FAISS.size + _METRIC_ARGUMENT + 8)
        kind = head[:4]
        if kind not in _FLAT:
            _corrupt(
                path,
                f"a FAISS IndexFlat was expected, which begins with IxFI, IxF2 or IxFl, found {kind!r}.",
                "Other indexes hold no plain rows: take them out with index.reconstruct_n(0, index.ntotal) and numpy.save.",
            )
        if len(head) < _FAISS.size:
            _corrupt(path, f"its header has {_FAISS.size} bytes, the file {size}.", "Write it again.")
        _, dimensions, rows, _, _, _, metric = _FAISS.unpack_from(head)
        start = _FAISS.size + (_METRIC_ARGUMENT if metric > 1 else 0)
        shape, nbytes = check_shape((rows, dimensions), torch.float32.itemsize, path=path, tensor=name)
        count = int.from_bytes(head[start : start + 8], "little")
        start += 8
        if count * torch.float32.itemsize != nbytes or start + nbytes != size:
            _corrupt(
                path,
                f"{rows} rows of {dimensions} numbers need {start + nbytes} bytes and a length of {rows * dimensions}, found "
                f"{size} bytes and a length of {count} (was it truncated?).",
                "Write it again with faiss.write_index.",
            )
        return [TensorSpec(name, torch.float32, shape, Extent(path, start))]


class BinFormat:
    """Reads ``.fbin`` (float32), ``.u8bin``, ``.i8bin`` and ``.ibin`` (int32): rows and columns as uint32, then the rows."""

    name: FormatName = "bin"
    suffixes: tuple[str, ...] = tuple(_BIN_DTYPES)
    one_file: str | None = None

    def locate(self, path: Path, schema: Schema) -> list[TensorSpec]:  # noqa: ARG002 - names need no schema
        """See :meth:`jasper_store.formats.protocols.ReadFormat.locate`. The dtype is in the file's name alone."""
        name = stem_of(path, self.suffixes)
        with open_for_reading(path) as (file, size):
            head = read_at(file, 0, _BIN.size)
        dtype = next((dtype for suffix, dtype in _BIN_DTYPES.items() if path.name.lower().endswith(suffix)), None)
        if dtype is None:
            _corrupt(path, "its name does not say its dtype.", f"Rename it to end in one of {', '.join(_BIN_DTYPES)}.")
        if len(head) < _BIN.size:
            _corrupt(path, f"its header has {_BIN.size} bytes, the file {size}.", "Write it again.")
        shape, nbytes = check_shape(_BIN.unpack(head), dtype.itemsize, path=path, tensor=name)
        if _BIN.size + nbytes != size:
            _corrupt(
                path,
                f"{shape[0]} rows of {shape[1]} numbers need {_BIN.size + nbytes} bytes, found {size} (was it truncated, "
                "or do distances follow?).",
                "Write the rows alone, behind their number and their length as uint32.",
            )
        return [TensorSpec(name, dtype, shape, Extent(path, _BIN.size))]


def _corrupt(path: Path, found: str, remedy: str) -> NoReturn:
    msg = f"{path}: not a file of vectors that can be read: {found} {remedy}"
    raise CorruptFileError(msg, path=path)
