"""Writes ``.pt`` files that ``torch.load`` reads, also with ``weights_only=True`` and ``mmap=True``, row block by row block.

The record of bytes comes first, on a page boundary, and the pickle that describes it after it: only then is
the number of rows known. Without the zip directory, which comes last, the file opens nowhere.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
import torch
from isal import isal_zlib

from jasper_store.errors import IncompatibleOptionsError, IntegrityError
from jasper_store.formats.base import contiguous_strides
from jasper_store.formats.files import (
    DATA_START,
    TensorBeingWritten,
    create_file,
    dtype_name,
    require_open,
    tensor_bytes,
    write_at,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from typing import BinaryIO

    from numpy.typing import NDArray

__all__ = ["PtWriter", "write_ragged"]

_STORAGES = {
    torch.bool: "BoolStorage",
    torch.uint8: "ByteStorage",
    torch.int8: "CharStorage",
    torch.int16: "ShortStorage",
    torch.int32: "IntStorage",
    torch.int64: "LongStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.float32: "FloatStorage",
    torch.float64: "DoubleStorage",
    torch.complex64: "ComplexFloatStorage",
    torch.complex128: "ComplexDoubleStorage",
}
# torch has no typed storage for these; they are saved as bytes with the dtype beside them.
_UNTYPED = {torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2}

_PREFIX = "archive/"
_LIMIT = 0xFFFFFFFF
_DATE_1980 = 0x21
# As torch.save aligns every record; only the tensor's own bytes gain from a whole page.
_SMALL_ALIGNMENT = 64


class _Zip:
    """A zip archive of stored records that grows at its end."""

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = create_file(path)
        self.end = 0
        self.directory: list[bytes] = []
        self._record: tuple[bytes, int, int] | None = None
        self._crc = 0

    def begin(self, name: str, alignment: int) -> None:
        raw = (_PREFIX + name).encode()
        start = self.end
        # The local header comes when the size is known; its place is kept, padded to the alignment.
        least = start + 30 + len(raw) + 24
        self.end = -(-least // alignment) * alignment
        self._record = (raw, start, self.end)
        self._crc = 0

    def write(self, data: bytes | memoryview) -> None:
        self._crc = isal_zlib.crc32(data, self._crc)
        write_at(self.file, self.end, data)
        self.end += len(data)

    def finish_record(self) -> None:
        assert self._record is not None
        raw, start, data_start = self._record
        size = self.end - data_start
        shown = min(size, _LIMIT)
        version = 45 if size >= _LIMIT or start >= _LIMIT else 20
        big = struct.pack("<2H2Q", 1, 16, size, size) if size >= _LIMIT else b""
        padding = data_start - start - 30 - len(raw) - len(big) - 4
        extra = big + struct.pack("<2s H", b"FB", padding) + bytes(padding)
        common = (0, 0, 0, _DATE_1980, self._crc, shown, shown, len(raw))
        local = struct.pack("<4s 5H 3L 2H", b"PK\x03\x04", version, *common, len(extra))
        write_at(self.file, start, local + raw + extra)
        big = b"".join(struct.pack("<Q", v) for v in (size, size, start) if v >= _LIMIT)
        if big:
            big = struct.pack("<2H", 1, len(big)) + big
        central = struct.pack(
            "<4s 6H 3L 5H 2L", b"PK\x01\x02", version, version, *common, len(big), 0, 0, 0, 0, min(start, _LIMIT)
        )
        self.directory.append(central + raw + big)
        self._record = None

    def add(self, name: str, data: bytes) -> None:
        self.begin(name, _SMALL_ALIGNMENT)
        self.write(data)
        self.finish_record()

    def finish(self) -> None:
        """Write the directory, which makes the file whole, and close it."""
        self.add("byteorder", b"little")
        self.add("version", b"3\n")
        directory = b"".join(self.directory)
        count, start, size = len(self.directory), self.end, len(directory)
        tail = b""
        if start >= _LIMIT:
            tail = struct.pack("<4s Q 2H 2L 4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
            tail += struct.pack("<4s L Q L", b"PK\x06\x07", 0, start + size, 1)
        tail += struct.pack("<4s 4H 2L H", b"PK\x05\x06", 0, 0, count, count, size, min(start, _LIMIT), 0)
        write_at(self.file, start, directory + tail)
        self.file.close()


class PtWriter:
    """Writes one tensor to a ``.pt`` file; see :class:`jasper_store.formats.protocols.FileWriter`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensor: TensorBeingWritten | None = None
        self._ended = False
        self._zip: _Zip | None = _Zip(path)

    def begin(self, name: str, dtype: torch.dtype, row_shape: tuple[int, ...] | None, rows: int | None) -> None:
        """See :class:`jasper_store.formats.protocols.FileWriter`; exactly once."""
        archive = self._open()
        if self._tensor is not None:
            raise IncompatibleOptionsError(
                f"{self._path}: one tensor a file is written; {self._tensor.name!r} is in it already.",
                path=self._path,
                tensor=name,
            )
        if dtype not in _STORAGES and dtype not in _UNTYPED:
            raise IncompatibleOptionsError(f".pt: {dtype_name(dtype)} is not known (tensor {name!r}).", tensor=name)
        self._tensor = TensorBeingWritten(name, dtype, row_shape, rows)
        archive.begin("data/0", DATA_START)

    def append(self, rows: torch.Tensor) -> None:
        """See :class:`jasper_store.formats.protocols.FileWriter`."""
        tensor, archive = self._current()
        archive.write(tensor_bytes(tensor.take(rows)).data)

    def end(self) -> None:
        """See :class:`jasper_store.formats.protocols.FileWriter`."""
        tensor, archive = self._current()
        tensor.finish()
        archive.finish_record()
        archive.add("data.pkl", _tensor_pickle(tensor.dtype, tensor.shape))
        self._ended = True

    def close(self) -> None:
        """See :class:`jasper_store.formats.protocols.FileWriter`."""
        if self._zip is None:
            return
        if not self._ended:
            raise IncompatibleOptionsError(
                f"{self._path}: close() needs one tensor, begun and ended; use abort() to give up.", path=self._path
            )
        self._zip.finish()
        self._zip = None

    def abort(self) -> None:
        """See :class:`jasper_store.formats.protocols.FileWriter`."""
        archive, self._zip = self._zip, None
        if archive is not None:
            archive.file.close()

    def _open(self) -> _Zip:
        require_open(self._zip is not None, self._path)
        assert self._zip is not None
        return self._zip

    def _current(self) -> tuple[TensorBeingWritten, _Zip]:
        archive = self._open()
        if self._tensor is None or self._ended:
            raise IncompatibleOptionsError(
                f"{self._path}: no tensor is begun; the order is begin, append..., end, close.", path=self._path
            )
        return self._tensor, archive


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<L", len(value)) + value.encode("ascii")


def _int(value: int) -> bytes:
    if 0 <= value < 2**31:
        return b"J" + struct.pack("<l", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _ints(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"


def _tensor_pickle(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """The pickle of one contiguous tensor whose bytes are in record ``data/0``, as ``torch.save`` would write it."""
    numel = int(np.prod(shape, dtype=object))
    typed = dtype in _STORAGES
    storage = f"ctorch\n{_STORAGES[dtype]}\n" if typed else "ctorch.storage\nUntypedStorage\n"
    size = numel if typed else numel * dtype.itemsize
    reference = b"(" + _text("storage") + storage.encode() + _text("0") + _text("cpu") + _int(size) + b"tQ"
    strides = contiguous_strides(shape)
    arguments = reference + _int(0) + _ints(shape) + _ints(strides) + b"\x89ccollections\nOrderedDict\n)R"
    if not typed:
        arguments += f"ctorch\n{dtype_name(dtype)}\n".encode()
    function = f"ctorch._utils\n_rebuild_tensor_{'v2' if typed else 'v3'}\n".encode()
    return b"\x80\x02" + function + b"(" + arguments + b"tR."


def write_ragged(path: Path, offsets: torch.Tensor, blocks: Iterable[torch.Tensor]) -> None:
    """See :class:`jasper_store.formats.protocols.SupportsRagged`: a pickled list of lists, with the memory of one block."""
    bounds = offsets.numpy()
    if offsets.dtype != torch.int64 or offsets.ndim != 1 or not len(bounds) or bounds[0] or (np.diff(bounds) < 0).any():
        raise IntegrityError(f"{path}: offsets must be int64, begin with 0 and never descend.", path=path)
    archive = _Zip(path)
    try:
        archive.begin("data.pkl", _SMALL_ALIGNMENT)
        archive.write(b"\x80\x02](")
        row, done = 0, 0
        rest = np.empty(0, dtype=np.int64)
        for block in blocks:
            rest = np.concatenate([rest, block.to(torch.int64).numpy()])
            # Rows that end within what has come; a row's other half waits for the next block.
            last = int(np.searchsorted(bounds, done + len(rest), side="right")) - 1
            if last > row:
                taken = int(bounds[last]) - done
                archive.write(_rows_pickle(rest[:taken], np.diff(bounds[row : last + 1])))
                rest, done, row = rest[taken:], int(bounds[last]), last
        archive.write(b"]" * int((bounds[row + 1 :] == done).sum()) + b"e.")
        if len(rest) or done != bounds[-1]:
            raise IntegrityError(f"{path}: {bounds[-1]} values were promised, {done + len(rest)} came.", path=path)
        archive.finish_record()
        archive.finish()
    finally:
        archive.file.close()


def _rows_pickle(values: NDArray[np.int64], lengths: NDArray[np.int64]) -> bytes:
    """Pickle instructions for whole rows: ``](`` values ``e``, an empty row only ``]``; made without a Python loop."""
    narrow = (values >= 0) & (values < 2**8)
    short = (values >= 0) & (values < 2**16) & ~narrow
    word = (values >= -(2**31)) & (values < 2**31) & ~narrow & ~short
    widths = np.select([narrow, short, word], [2, 3, 5], default=10)
    bytes_before = np.concatenate([[0], np.cumsum(widths)])
    overhead = np.where(lengths > 0, 3, 1)
    ends = np.cumsum(lengths)
    overhead_before = np.cumsum(overhead) - overhead
    row_starts = overhead_before + bytes_before[ends - lengths]
    row_ends = overhead_before + overhead + bytes_before[ends]
    starts = bytes_before[:-1] + np.repeat(overhead_before + 2, lengths)
    filled = lengths > 0
    out = np.zeros(int(widths.sum() + overhead.sum()), dtype=np.uint8)
    out[row_starts] = ord("]")
    out[row_starts[filled] + 1] = ord("(")
    out[row_ends[filled] - 1] = ord("e")
    raw = values.astype("<i8").view(np.uint8).reshape(-1, 8)
    kinds = ((narrow, b"K", 1), (short, b"M", 2), (word, b"J", 4), (widths == 10, b"\x8a\x08", 8))
    for chosen, instruction, nbytes in kinds:
        at = starts[chosen]
        for i, code in enumerate(instruction):
            out[at + i] = code
        out[(at + len(instruction))[:, None] + np.arange(nbytes)] = raw[chosen, :nbytes]
    return out.tobytes()
