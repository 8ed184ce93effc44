"""``.npz``: a zip archive of ``.npy`` files. What ``numpy.savez`` stores lies in place, what it deflates is a stream.

Source: https://numpy.org/doc/stable/reference/generated/numpy.savez.html; each member is read as :mod:`jasper_store.formats.npy`
says.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from jasper_store.errors import CorruptFileError
from jasper_store.formats.base import Extent, Skipped, Streamed, TensorSpec
from jasper_store.formats.files import check_shape, open_for_reading, read_at
from jasper_store.formats.flat import stem_of
from jasper_store.formats.npy import MAX_PREFIX, dtype_of, parse_header, strides_of
from jasper_store.formats.texts import SkippedMemo

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from jasper_store.formats.base import FormatName, Schema

__all__ = ["NpzFormat", "member_bytes"]

_MEMO = SkippedMemo()
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_READ_NBYTES = 1 << 18
_NO_TENSORS = {"U": "strings", "S": "bytes", "O": "pickled Python objects, which are never executed"}


class NpzFormat:
    """Reads archives of arrays; an only array is named by its file, several by their own names."""

    name: FormatName = "npz"
    suffixes: tuple[str, ...] = (".npz",)
    one_file: str | None = None

    def locate(self, path: Path, schema: Schema) -> list[TensorSpec]:  # noqa: ARG002 - names need no schema
        """See :meth:`jasper_store.formats.protocols.ReadFormat.locate`."""
        key = _MEMO.key(path)
        specs, skipped = _read(path)
        _MEMO.put(key, skipped)
        if len(specs) != 1:
            return specs
        (only,) = specs
        return [TensorSpec(stem_of(path, self.suffixes), only.dtype, only.shape, only.location)]

    def skipped(self, path: Path, schema: Schema) -> list[Skipped]:  # noqa: ARG002
        """See :class:`jasper_store.formats.protocols.SupportsSkipped`: strings, bytes, structured arrays and objects."""
        key = _MEMO.key(path)
        known = _MEMO.get(key)
        return _MEMO.put(key, _read(path)[1]) if known is None else known


def member_bytes(path: Path, member: str) -> Iterator[bytes]:
    """The values of a deflated array, a block at a time; its checksum is compared at the end.

    Raises:
        CorruptFileError: the archive is damaged.
    """
    with open_for_reading(path) as (file, _), _translated(path):
        archive = zipfile.ZipFile(file)
        info = archive.NameToInfo.get(member)
        if info is None:
            _corrupt(path, f"the member {member!r:.100} is not in it any more.")
        with archive.open(info) as stream:
            raw = stream.read(MAX_PREFIX)
            _, start = parse_header(path, raw, info.file_size)
            block = raw[start:]
            while block:
                yield block
                block = stream.read(_READ_NBYTES)


def _read(path: Path) -> tuple[list[TensorSpec], list[Skipped]]:
    specs: list[TensorSpec] = []
    skipped: list[Skipped] = []
    with open_for_reading(path) as (file, size), _translated(path):
        archive = zipfile.ZipFile(file)
        if len(archive.NameToInfo) != len(archive.infolist()):
            _corrupt(path, "two members have the same name.")
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename:
                skipped.append(Skipped(name, path, "a member that is no .npy file"))
                continue
            found = _member(path, file, size, archive, info, name)
            if isinstance(found, str):
                skipped.append(Skipped(name, path, found))
            else:
                specs.append(found)
    return specs, skipped


def _member(
    path: Path, file: BinaryIO, size: int, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str
) -> TensorSpec | str:
    """The tensor that a member is, or what else it is."""
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        _corrupt(path, f"member {info.filename!r:.100} is encrypted, or compressed as numpy never does.")
    begin = _begin(path, file, size, info)
    with archive.open(info) as stream:
        raw = stream.read(min(MAX_PREFIX, info.file_size))
    header, start = parse_header(path, raw, info.file_size)
    description = header["descr"]
    if isinstance(description, str) and description.lstrip("<>=|")[:1] in _NO_TENSORS:
        return f"an array of {_NO_TENSORS[description.lstrip('<>=|')[:1]]}"
    if isinstance(description, list) and description != [("bfloat16", "<u2")]:
        return "a structured array; save each field alone to have it"
    dtype = dtype_of(path, description)
    shape, nbytes = check_shape(header["shape"], dtype.itemsize, path=path, tensor=name)
    if start + nbytes != info.file_size:
        _corrupt(path, f"member {info.filename!r:.100} has {info.file_size} bytes, its header says {start + nbytes}.")
    strides = strides_of(header, shape)
    if info.compress_type == zipfile.ZIP_STORED:
        return TensorSpec(name, dtype, shape, Extent(path, begin + start, strides))
    if strides is not None:
        _corrupt(
            path,
            f"array {name!r:.100} is compressed and in Fortran order, so its rows cannot be read one after another; save "
            "numpy.ascontiguousarray of it.",
        )
    return TensorSpec(name, dtype, shape, Streamed((path,), "npz", info.filename))


def _begin(path: Path, file: BinaryIO, size: int, info: zipfile.ZipInfo) -> int:
    """Offset of a member's bytes in the file."""
    # Python's zipfile takes a directory in the wrong place for a prefix before the archive, and subtracts it.
    head = read_at(file, info.header_offset, _LOCAL_HEADER.size) if info.header_offset >= 0 else b""
    if len(head) != _LOCAL_HEADER.size or not head.startswith(b"PK\x03\x04"):
        _corrupt(path, f"member {info.filename!r:.100} is not where the zip directory says.")
    *_, name_length, extra_length = _LOCAL_HEADER.unpack(head)
    begin: int = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    stored = info.compress_type == zipfile.ZIP_STORED
    if begin + info.compress_size > size or (stored and info.compress_size != info.file_size):
        _corrupt(path, f"member {info.filename!r:.100} ends beyond the end of the file (was it truncated?).")
    return begin


def _corrupt(path: Path, found: str, *, cause: BaseException | None = None) -> NoReturn:
    msg = f"{path}: not a .npz file that can be read: {found} Save it again with numpy.savez."
    raise CorruptFileError(msg, path=path) from cause


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Every way in which a damaged zip archive can fail, as CorruptFileError."""
    try:
        yield
    except CorruptFileError:
        raise
    except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError) as exc:
        _corrupt(path, f"its zip archive is damaged or truncated: {exc!s:.100}.", cause=exc)
    except (ValueError, KeyError, OverflowError, struct.error, RuntimeError, NotImplementedError) as exc:
        _corrupt(path, f"its zip directory is damaged: {type(exc).__name__}: {exc!s:.100}.", cause=exc)
