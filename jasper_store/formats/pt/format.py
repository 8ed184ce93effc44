"""``.pt``: a zip of stored records, one pickle that describes the tensors and one record of bytes per storage.

Reading parses the zip directory and the pickle (:mod:`jasper_store.formats.pt.unpickle`), and returns where in
the file each tensor's bytes lie. ``torch.load`` is not used: it would execute what the pickle asks for (or
parse it after a second of imports), and its map of a file larger than memory is refused.
"""

from __future__ import annotations

import struct
import zipfile
from array import array
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import torch

from jasper_store.errors import CorruptFileError, IncompatibleOptionsError
from jasper_store.formats.base import Extent, Inline, Skipped, TensorSpec, contiguous_strides
from jasper_store.formats.files import check_shape, open_for_reading, read_at
from jasper_store.formats.flat import stem_of
from jasper_store.formats.pt import ragged as pt_ragged, unpickle as pt_pickle
from jasper_store.formats.pt.unpickle import PickleError, PtTensor, describe
from jasper_store.formats.texts import SkippedMemo, Texts, in_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from jasper_store.formats.base import FormatName, Schema
    from jasper_store.formats.protocols import FileWriter

__all__ = ["PtFormat"]

_MEMO = SkippedMemo()

_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
# A pickle may name one row, list or storage many times. So the values that are made of it are counted, and these many
# for each byte of the file are made; a row that is saved once and used often needs some, every other file under one.
_VALUES_PER_BYTE = 16
_VALUES_AT_LEAST = 1 << 18
_MAX_NAME = 4096


class PtFormat:
    """Reads what ``torch.save`` writes for tensors, dicts of tensors and lists of lists; writes one tensor per file."""

    name: FormatName = "pt"
    suffixes: tuple[str, ...] = (".pt", ".pth")
    one_file: str | None = None

    def locate(self, path: Path, schema: Schema) -> list[TensorSpec]:  # noqa: ARG002 - names need no schema
        """See :meth:`jasper_store.formats.protocols.Format.locate`.

        A tensor is named by its file, tensors in a dictionary by their keys. A list of lists of ints, or of 1-D
        tensors of ints, is a ragged tensor: ``X.values`` and ``X.offsets``. A number or a flat list of numbers
        becomes a tensor as ``torch.tensor`` would make it.
        """
        key = _MEMO.key(path)
        specs, skipped = _read(path, stem_of(path, self.suffixes))
        _MEMO.put(key, skipped)
        return specs

    def skipped(self, path: Path, schema: Schema) -> list[Skipped]:  # noqa: ARG002 - names need no schema
        """See :class:`jasper_store.formats.protocols.SupportsSkipped`: texts, and lists that hold a text."""
        key = _MEMO.key(path)
        known = _MEMO.get(key)
        return _MEMO.put(key, _read(path, stem_of(path, self.suffixes))[1]) if known is None else known

    def texts(self, path: Path, schema: Schema) -> list[Texts]:  # noqa: ARG002 - names need no schema
        """See :class:`jasper_store.formats.texts.SupportsTexts`: lists of texts, all in memory as UTF-8."""
        return [in_memory(path, name, rows) for name, rows in _columns(path, stem_of(path, self.suffixes)).items()]

    def writer(self, path: Path, schema: Schema, *, compression: str | None = None) -> FileWriter:  # noqa: ARG002
        """See :meth:`jasper_store.formats.protocols.Format.writer`; one tensor, rows may be unknown until the end."""
        from jasper_store.formats.pt.writer import PtWriter

        if compression is not None:
            raise IncompatibleOptionsError(
                f".pt has no compression, found compression={compression!r}; use None, or format='hdf5'.", path=path
            )
        return PtWriter(path)

    def write_ragged(self, path: Path, offsets: torch.Tensor, blocks: Iterable[torch.Tensor]) -> None:
        """See :class:`jasper_store.formats.protocols.SupportsRagged`: a list of lists of ints."""
        from jasper_store.formats.pt.writer import write_ragged

        write_ragged(path, offsets, blocks)


def _read(path: Path, name: str) -> tuple[list[TensorSpec], list[Skipped]]:
    """The tensors of a file, and what else is in it."""
    with open_for_reading(path) as (file, size), _translated(path):
        archive = _Archive(path, file, size)
        pickled = archive.pickle()
        ragged = pt_ragged.parse(pickled)
        if ragged is not None and len(ragged[1]) > 1:
            return archive.ragged(name, *ragged), []
        specs: list[TensorSpec] = []
        skipped: list[Skipped] = []
        for key, value in _named(path, name, pt_pickle.load(pickled)):
            reason = _why_no_tensor(value)
            if reason:
                skipped.append(Skipped(key, path, reason))
            else:
                specs += archive.specs(key, value)
        return specs, skipped


def _named(path: Path, name: str, found: Any) -> list[tuple[str, Any]]:
    """What a pickle holds by name: a dictionary's values by their keys, anything else by the file's name."""
    return [(_key(path, key), value) for key, value in found.items()] if isinstance(found, dict) else [(name, found)]


def _why_no_tensor(value: Any) -> str:
    """What is said of a text, or of a list with a text in it; ``""`` of anything else."""
    if isinstance(value, str):
        return f"it is a text, {describe(value)}"
    if isinstance(value, list | tuple) and any(isinstance(row, str) for row in value):
        return f"it holds strings ({describe(value)}), not numbers"
    return ""


def _columns(path: Path, name: str) -> dict[str, list[str]]:
    """The lists of texts in a file by name."""
    with open_for_reading(path) as (file, size), _translated(path):
        archive = _Archive(path, file, size)
        named = _named(path, name, pt_pickle.load(archive.pickle()))
        found = {key: rows for key, rows in named if isinstance(rows, list | tuple) and rows}
        columns = {key: list(rows) for key, rows in found.items() if all(isinstance(row, str) for row in rows)}
        for key, rows in columns.items():
            archive.spend(key, sum(map(len, rows)) + len(rows))  # one text may be in the list many times
    return columns


def _corrupt(path: Path, what: str, *, cause: BaseException | None = None, tensor: str | None = None) -> NoReturn:
    msg = f"{path}: not a .pt file that can be read: {what} Save its tensors again with torch.save."
    raise CorruptFileError(msg, path=path, tensor=tensor) from cause


def _key(path: Path, key: object) -> str:
    if not isinstance(key, str):
        _corrupt(path, f"a dictionary of tensors needs texts as keys, found {describe(key)}.")
    # The name is repeated in what is made of each tensor.
    if len(key) > _MAX_NAME:
        _corrupt(path, f"a name of a tensor may have at most {_MAX_NAME} characters, found {len(key)}.")
    return key


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Every way in which a damaged zip or pickle can fail, as CorruptFileError."""
    try:
        yield
    except PickleError as exc:
        _corrupt(path, f"its pickle is refused: {exc}.", cause=exc)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError) as exc:
        _corrupt(path, f"its zip archive is damaged or truncated: {exc}.", cause=exc)
    except CorruptFileError:
        raise
    except (
        ValueError,
        KeyError,
        OverflowError,
        struct.error,
        RuntimeError,
        OSError,
    ) as exc:  # zipfile on odd directories
        _corrupt(path, f"its zip directory is damaged: {type(exc).__name__}: {exc!s:.100}.", cause=exc)


class _Archive:
    """The zip directory of one file, while it is open."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.file = file
        self.size = size
        self.budget = max(_VALUES_PER_BYTE * size, _VALUES_AT_LEAST)
        magic = read_at(file, 0, 4)
        if magic != b"PK\x03\x04":
            if magic[:1] == b"\x80":
                _corrupt(
                    path,
                    "it has the legacy form of before torch 1.6, which cannot be mapped; "
                    "rewrite it with torch.save(torch.load(path, weights_only=True), path).",
                )
            _corrupt(path, f"a zip archive was expected, found {magic!r} (was it truncated?).")
        self.zip = zipfile.ZipFile(file)
        pickles = [
            i.filename for i in self.zip.infolist() if i.filename.count("/") == 1 and i.filename.endswith("/data.pkl")
        ]
        if len(pickles) != 1:
            _corrupt(path, f"exactly one record */data.pkl was expected, found {len(pickles)}.")
        self.prefix = pickles[0].removesuffix("data.pkl")
        if len(self.prefix) > _MAX_NAME:
            _corrupt(path, f"its records' names begin with {len(self.prefix)} characters that are the same.")
        names, code = self.zip.NameToInfo, self.prefix + "code/"
        if len(names) != len(self.zip.infolist()):
            _corrupt(path, "two records have the same name.")
        if self.prefix + "constants.pkl" in names or any(n.startswith(code) for n in names):
            _corrupt(path, "it is a TorchScript archive, which holds a program and not tensors.")
        self._check_byte_order()

    def _check_byte_order(self) -> None:
        if self.prefix + "byteorder" in self.zip.NameToInfo:
            order = self._small("byteorder")
            if order != b"little":
                _corrupt(self.path, f"its byte order must be little, found {order!r:.40}.")

    def _small(self, record: str) -> bytes:
        info = self.zip.NameToInfo[self.prefix + record]
        offset = self._extent(info)
        if info.CRC == 0:
            # torch.serialization.set_crc32_options(False) leaves it out, and zipfile would take 0 for a checksum.
            return read_at(self.file, offset, info.file_size)
        return self.zip.read(info)

    def pickle(self) -> bytes:
        """The pickle, its checksum verified by zipfile."""
        return self._small("data.pkl")

    def _extent(self, info: zipfile.ZipInfo) -> int:
        """Offset of a record's bytes, after its local header was compared with the directory."""
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            _corrupt(self.path, f"record {info.filename!r:.100} is compressed or encrypted; torch.save stores plainly.")
        # Python's zipfile takes a directory in the wrong place for a prefix before the archive, and subtracts it.
        if info.header_offset < 0:
            _corrupt(self.path, f"record {info.filename!r:.100} lies before the file begins.")
        header = read_at(self.file, info.header_offset, _LOCAL_HEADER.size)
        if len(header) != _LOCAL_HEADER.size:
            _corrupt(self.path, f"record {info.filename!r:.100} lies beyond the end of the file (was it truncated?).")
        signature, _, flags, method, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        name = read_at(self.file, info.header_offset + _LOCAL_HEADER.size, name_length)
        expected = info.orig_filename.encode("utf-8" if flags & 0x800 else "cp437")
        if signature != b"PK\x03\x04" or method != zipfile.ZIP_STORED or name != expected:
            _corrupt(self.path, f"record {info.filename!r:.100} and the zip directory disagree.")
        offset: int = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if offset + info.file_size > self.size:
            _corrupt(self.path, f"record {info.filename!r:.100} ends beyond the end of the file (was it truncated?).")
        return offset

    def specs(self, name: str, value: Any) -> list[TensorSpec]:
        """The one or two specs of one saved value."""
        if isinstance(value, PtTensor):
            return [self._tensor(name, value)]
        if isinstance(value, bool | int | float):
            return [self._inline(name, torch.tensor(value))]
        if isinstance(value, list | tuple):
            return self._list(name, list(value))
        _corrupt(
            self.path,
            f"{name!r:.100} should be a tensor, a list of lists of ints or a number, found a {type(value).__name__}.",
            tensor=name,
        )

    def _inline(self, name: str, values: torch.Tensor) -> TensorSpec:
        return TensorSpec(name, values.dtype, tuple(values.shape), Inline(self.path, values))

    def ragged(self, name: str, values: torch.Tensor, offsets: torch.Tensor) -> list[TensorSpec]:
        """The two specs of a ragged tensor whose values came with the pickle."""
        return [self._inline(f"{name}.values", values), self._inline(f"{name}.offsets", offsets)]

    def _list(self, name: str, rows: list[Any]) -> list[TensorSpec]:
        if rows and all(type(row) in (int, float, bool) for row in rows):
            self.spend(name, len(rows))
            return [self._inline(name, _as_tensor(self.path, name, rows))]
        values, lengths = array("q"), array("q")
        for i, row in enumerate(rows):
            before = len(values)
            self._add_row(name, i, row, values)
            lengths.append(len(values) - before)
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int64)
        torch.cumsum(_int64(lengths), 0, out=offsets[1:])
        return self.ragged(name, _int64(values), offsets)

    def spend(self, name: str, n: int) -> None:
        """Count values that are made of the pickle, and refuse more than the file's bytes explain."""
        self.budget -= n
        if self.budget < 0:
            _corrupt(
                self.path,
                f"the pickle repeats rows until there are more values than its {self.size} bytes explain, at {name!r:.100}.",
                tensor=name,
            )

    def _add_row(self, name: str, i: int, row: object, values: array[int]) -> None:
        """Append one row of a ragged tensor."""
        if isinstance(row, list | tuple):
            self.spend(name, len(row))
            if all(type(v) is int for v in row):
                try:
                    values.extend(row)
                except OverflowError as exc:
                    _corrupt(
                        self.path, f"row {i} of {name!r:.100} holds an int of over 64 bits.", cause=exc, tensor=name
                    )
                return
        elif isinstance(row, PtTensor) and len(row.shape) == 1 and row.dtype in _INTEGERS:
            location = self._tensor(name, row).location
            n = row.shape[0]
            if isinstance(location, Extent):
                span = (n - 1) * row.strides[0] + 1
                self.spend(name, max(n, span))
                raw = bytearray(read_at(self.file, location.offset, span * row.dtype.itemsize))
                read = torch.frombuffer(raw, dtype=row.dtype).as_strided((n,), (row.strides[0],))
                values.frombytes(read.to(torch.int64).numpy().tobytes())
            return
        _corrupt(
            self.path,
            f"row {i} of {name!r:.100} should be a list of ints or a 1-D tensor of ints, found {describe(row)}.",
            tensor=name,
        )

    def _tensor(self, name: str, value: PtTensor) -> TensorSpec:
        """Where one tensor lies, checked against the bytes of its storage's record."""
        itemsize = value.dtype.itemsize
        shape, nbytes = check_shape(value.shape, itemsize, path=self.path, tensor=name)
        if len(value.strides) != len(shape) or min(value.strides, default=0) < 0 or value.offset < 0:
            _corrupt(
                self.path,
                f"tensor {name!r:.100} has shape {shape}, strides {value.strides} and offset {value.offset}.",
                tensor=name,
            )
        if nbytes == 0:
            return TensorSpec(name, value.dtype, shape, Inline(self.path, torch.empty(shape, dtype=value.dtype)))
        info = self.zip.NameToInfo.get(f"{self.prefix}data/{value.storage.key}")
        if info is None or info.file_size != value.storage.nbytes:
            held = "no record" if info is None else f"a record of {info.file_size} bytes"
            _corrupt(
                self.path,
                f"the storage of tensor {name!r:.100} should have {value.storage.nbytes} bytes, found {held}.",
                tensor=name,
            )
        last = value.offset + sum((n - 1) * step for n, step in zip(shape, value.strides, strict=True))
        if (last + 1) * itemsize > info.file_size:
            _corrupt(
                self.path,
                f"tensor {name!r:.100} reaches to byte {(last + 1) * itemsize} of a storage of {info.file_size}.",
                tensor=name,
            )
        plain = all(n == 1 or s == e for n, s, e in zip(shape, value.strides, contiguous_strides(shape), strict=True))
        offset = self._extent(info) + value.offset * itemsize
        return TensorSpec(name, value.dtype, shape, Extent(self.path, offset, None if plain else value.strides))


def _int64(values: array[int]) -> torch.Tensor:
    """A view of the values; ``torch.frombuffer`` refuses to view none."""
    return torch.frombuffer(values, dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)


def _as_tensor(path: Path, name: str, values: list[Any]) -> torch.Tensor:
    try:
        return torch.tensor(values)
    except (ValueError, TypeError, RuntimeError, OverflowError) as exc:
        _corrupt(path, f"the numbers of {name!r:.100} do not fit a tensor: {exc!s:.100}.", cause=exc, tensor=name)
