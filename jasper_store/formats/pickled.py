"""Pickles of numpy arrays, such as tevatron's ``(array, ids)``: read without executing anything, the array in place.

A pickle of protocol 3 or later holds an array's bytes as they are, behind a few instructions that say dtype and shape. The
machine of :mod:`jasper_store.formats.pt.machine` follows them, with numpy's functions as plain records; bytes are noted by
their place and never read.

Source: ``__reduce__`` and ``__reduce_ex__`` of ``numpy.ndarray``; https://peps.python.org/pep-3154/ for frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, NoReturn

import torch

from jasper_store.errors import CorruptFileError
from jasper_store.formats.base import Extent, Skipped, TensorSpec, contiguous_strides
from jasper_store.formats.files import check_shape, open_for_reading, read_at
from jasper_store.formats.flat import stem_of
from jasper_store.formats.pt.machine import Machine, PickleError
from jasper_store.formats.pt.unpickle import describe
from jasper_store.formats.texts import SkippedMemo, Texts, in_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from jasper_store.formats.base import FormatName, Schema

__all__ = ["PickleFormat", "strings_of"]

_DTYPES = {
    "b1": torch.bool,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "u8": torch.uint64,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "c8": torch.complex64,
    "c16": torch.complex128,
}
_MEMO = SkippedMemo()
_WINDOW_NBYTES = 1 << 16
# Instructions that are followed, which take some seconds, and the bytes of all of them without those of arrays.
_MAX_INSTRUCTIONS = 1 << 22
_MAX_NBYTES = 256 << 20
_MAX_NAME = 4096
_CHARACTERS_PER_BYTE = 16
_CHARACTERS_AT_LEAST = 1 << 18
_RESAVE = "save its array with numpy.save"


class PickleFormat:
    """Reads an array, a tuple or list of arrays and ids, or a dictionary of arrays.

    An array is named by the file, one that is not the first of its tuple by its position, too, and one of a dictionary by
    its key.
    """

    name: FormatName = "pickle"
    suffixes: tuple[str, ...] = (".pkl", ".pickle")
    one_file: str | None = None

    def locate(self, path: Path, schema: Schema) -> list[TensorSpec]:  # noqa: ARG002 - names need no schema
        """See :meth:`jasper_store.formats.protocols.ReadFormat.locate`."""
        key = _MEMO.key(path)
        found = list(_named(path, self.suffixes))
        _MEMO.put(key, _others(path, found))
        return [_spec(path, name, value) for name, value in found if _is_numbers(value)]

    def skipped(self, path: Path, schema: Schema) -> list[Skipped]:  # noqa: ARG002
        """See :class:`jasper_store.formats.protocols.SupportsSkipped`: ids, and whatever else is no array of numbers."""
        key = _MEMO.key(path)
        known = _MEMO.get(key)
        return _MEMO.put(key, _others(path, _named(path, self.suffixes))) if known is None else known

    def texts(self, path: Path, schema: Schema) -> list[Texts]:  # noqa: ARG002
        """See :class:`jasper_store.formats.texts.SupportsTexts`: lists of ``str``, all in memory as UTF-8."""
        found = []
        for name, value in _named(path, self.suffixes, whole=True):
            rows = _strings(value, path.stat().st_size)
            if rows is not None:
                found.append(in_memory(path, name, rows))
        return found


def _others(path: Path, found: Iterable[tuple[str, object]]) -> list[Skipped]:
    return [Skipped(name, path, _described(value)) for name, value in found if not _is_numbers(value)]


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Bytes of the file, by their place."""

    offset: int
    nbytes: int


@dataclass(slots=True)
class _Dtype:
    """A numpy dtype as its pickle describes it: ``"f4"`` and ``"<"``."""

    code: str
    order: str = "|"
    fields: bool = False


@dataclass(slots=True)
class _Array:
    """A numpy array as its pickle describes it, unchecked; of objects, ``data`` is something else."""

    shape: object = None
    dtype: object = None
    fortran: object = False
    data: object = None


class _Rest:
    """What follows the array and is passed over, without being looked at."""


class _Found(Exception):  # noqa: N818 - no error
    """All that is needed was read."""

    def __init__(self, value: object) -> None:
        self.value = value


_NDARRAY = object()


def _dtype(*args: Any) -> _Dtype:
    if not args or not isinstance(args[0], str) or len(args[0]) > 32:
        raise PickleError("numpy.dtype with unusual arguments")
    return _Dtype(args[0])


def _reconstruct(*args: Any) -> _Array:
    if len(args) != 3 or args[0] is not _NDARRAY:
        raise PickleError("numpy's _reconstruct with unusual arguments")
    return _Array()


def _frombuffer(*args: Any) -> _Array:
    # The fifth is an order of axes that is neither C nor Fortran.
    if len(args) not in (4, 5) or args[3] not in ("C", "F") or (len(args) == 5 and args[4] is not None):
        raise PickleError("numpy's _frombuffer with unusual arguments, as of an array whose axes were swapped")
    return _Array(args[2], args[1], args[3] == "F", args[0])


def _scalar(*args: Any) -> _Rest:
    if len(args) != 2:
        raise PickleError("numpy's scalar with unusual arguments")
    return _Rest()


class _ArrayMachine(Machine):
    """A machine that knows numpy's arrays, and that notes bytes by their place."""

    functions: ClassVar[Mapping[tuple[str, str], Callable[..., Any]]] = {
        ("numpy", "dtype"): _dtype,
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
        **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
        **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    }

    def __init__(self, data: _FileBytes, *, whole: bool = False) -> None:
        """``whole`` follows the pickle to its end, ids included."""
        super().__init__(data)
        self.passed = self.followed = 0
        self.whole = whole

    def find(self, module: str, name: str) -> object:
        if (module, name) == ("numpy", "ndarray"):
            return _NDARRAY
        function = self.functions.get((module, name))
        if function is None:
            raise PickleError(
                f"it asks for {module:.80}.{name:.80}, which is no array, number, text, list, tuple or dict; pickles before "
                "protocol 3 hold arrays as texts"
            )
        return function

    def describe(self, value: object) -> str:
        return describe(value)

    def instruction(self, op: bytes) -> Callable[[Any], None] | None:
        self.followed += 1
        if self.followed > _MAX_INSTRUCTIONS or self.at - self.passed > _MAX_NBYTES:
            raise PickleError("beside its arrays it holds millions of Python objects")
        return _BYTES.get(op) or super().instruction(op)

    def pass_over(self, nbytes: int) -> _Bytes:
        """Note bytes instead of reading them."""
        place = _Bytes(self.at, nbytes)
        if nbytes > len(self.data) - self.at:
            raise PickleError("it ends in the middle of an array")
        self.at += nbytes
        self.passed += nbytes
        return place

    def reduce(self) -> Any:
        made = super().reduce()
        if isinstance(made, _Array) and made.data is not None:
            self.stop_before_ids(made, [])
        return made

    def build(self) -> None:
        state = self.pop()
        target = self.stack[-1] if self.stack else None
        if isinstance(target, _Array):
            if not isinstance(state, tuple) or len(state) != 5:
                raise PickleError("an array with an unusual state")
            _, target.shape, target.dtype, target.fortran, target.data = state
            self.stop_before_ids(target, [target])
        elif isinstance(target, _Dtype):
            if not isinstance(state, tuple) or len(state) < 5 or not isinstance(state[1], str):
                raise PickleError("a numpy dtype with an unusual state")
            target.order, target.fields = state[1], any(part is not None for part in state[2:5])
        else:
            self.stack.append(state)
            super().build()

    def stop_before_ids(self, array: _Array, alone: list[object]) -> None:
        """End the run where the array is the first of a pair whose second is a list, which may be of millions of ids.

        The pair is recognised by how the pickle ends; had it another meaning, the array would be there all the same.
        """
        if (
            self.whole
            or len(self.stack) != len(alone)
            or any(a is not b for a, b in zip(self.stack, alone, strict=True))
        ):
            return
        ahead = self.data[self.at : min(self.at + 10, len(self.data))].removeprefix(b"\x94")  # MEMOIZE
        if ahead.startswith(b"\x95"):  # FRAME, and its length
            ahead = self.data[self.at : min(self.at + 11, len(self.data))].removeprefix(b"\x94")[9:]
        if (
            ahead.startswith(b"]") and self.data[len(self.data) - 3 :] == b"\x86\x94."
        ):  # EMPTY_LIST; TUPLE2, MEMOIZE, STOP
            raise _Found((array, _Rest()))


def _bytes(width: int) -> Callable[[_ArrayMachine], None]:
    def instruction(machine: _ArrayMachine) -> None:
        machine.stack.append(machine.pass_over(machine.unsigned(width)))

    return instruction


# SHORT_BINBYTES, BINBYTES, BINBYTES8, BYTEARRAY8.
_BYTES: dict[bytes, Callable[[_ArrayMachine], None]] = {
    b"C": _bytes(1),
    b"B": _bytes(4),
    b"\x8e": _bytes(8),
    b"\x96": _bytes(8),
}


class _FileBytes:
    """The bytes of an open file, read a window at a time."""

    def __init__(self, file: BinaryIO, size: int, begin: int = 0) -> None:
        """``size`` bytes from byte ``begin`` of the file on."""
        self._file = file
        self._size = size
        self._begin = begin
        self._start = 0
        self._window = b""

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, where: slice, /) -> bytes:
        start, stop, _ = where.indices(self._size)
        if start < self._start or stop > self._start + len(self._window):
            self._start = start
            self._window = read_at(self._file, self._begin + start, max(stop - start, _WINDOW_NBYTES))
        found = self._window[start - self._start : stop - self._start]
        if len(found) < stop - start:
            raise PickleError("it was cut while it was read")
        return found

    def find(self, sub: bytes, start: int, /) -> int:
        """As ``bytes.find``, within one window: what is looked for ends a name of a module or function."""
        at = self[start : min(start + _WINDOW_NBYTES, self._size)].find(sub)
        return at if at < 0 else start + at


def strings_of(file: BinaryIO, begin: int, size: int) -> list[str] | None:
    """The strings of a pickled array of objects, as ``numpy.save`` writes it behind its header.

    Args:
        file: the open file.
        begin: where the pickle begins.
        size: bytes of the file.

    Returns:
        The strings, or ``None`` if it is no array of one dimension, holds anything else, or names a string so often that its
        bytes do not explain the characters.
    """
    try:
        found = _ArrayMachine(_FileBytes(file, size - begin, begin), whole=True).run()
    except (PickleError, ValueError, TypeError, RecursionError, OverflowError):
        return None  # what is refused stays what it was: objects, which are skipped
    return _strings(found, size)


def _strings(value: object, size: int) -> list[str] | None:
    """A list of strings, or an array of such objects, of one dimension; ``None`` for anything else."""
    rows = value
    if isinstance(value, _Array):
        rows = value.data if isinstance(value.data, list) and value.shape == (len(value.data),) else None
    if not isinstance(rows, list) or not all(type(row) is str for row in rows):
        return None
    return rows if sum(map(len, rows)) <= max(_CHARACTERS_PER_BYTE * size, _CHARACTERS_AT_LEAST) else None


def _named(path: Path, suffixes: tuple[str, ...], *, whole: bool = False) -> Iterator[tuple[str, object]]:
    """What a pickle holds, by the names that it gets; with ``whole``, also the ids that follow an array."""
    with open_for_reading(path) as (file, size):
        if read_at(file, 0, 1) != b"\x80":
            _refuse(path, f"it begins with {read_at(file, 0, 4)!r}, and no pickle of protocol 2 or later does", _RESAVE)
        try:
            found = _ArrayMachine(_FileBytes(file, size), whole=whole).run()
        except _Found as exc:
            found = exc.value
        except (PickleError, ValueError, TypeError, RecursionError, OverflowError) as exc:
            _refuse(path, f"{exc!s:.200}", _RESAVE, cause=exc)
    stem = stem_of(path, suffixes)
    if isinstance(found, _Array):
        yield stem, found
    elif isinstance(found, dict):
        for key, value in found.items():
            if len(key) > _MAX_NAME:
                _refuse(path, f"a name of {len(key)} characters", _RESAVE)
            yield key, value
    elif isinstance(found, list | tuple) and found and isinstance(found[0], _Array):
        yield stem, found[0]
        second = "ids" if len(found) == 2 and not isinstance(found[1], _Array) else "1"
        for i, value in enumerate(found[1:], 1):
            yield f"{stem}.{second if i == 1 else i}", value
    else:
        _refuse(
            path, f"an array, (array, ids) or a dictionary of arrays was expected, found {_described(found)}", _RESAVE
        )


def _is_numbers(value: object) -> bool:
    # Strings, objects and fields are skipped; numbers that cannot be read are errors.
    if not isinstance(value, _Array):
        return False
    return not isinstance(value.dtype, _Dtype) or not (value.dtype.fields or value.dtype.code[:1] in "USOV")


def _described(value: object) -> str:
    if isinstance(value, _Array):
        return "an array of strings or objects"
    if isinstance(value, _Rest):
        return "a list beside the array"
    return describe(value)


def _spec(path: Path, name: str, value: object) -> TensorSpec:
    """Where an array lies, checked against the bytes that it has in the file."""
    assert isinstance(value, _Array)
    dtype, data = value.dtype, value.data
    if not isinstance(dtype, _Dtype) or not isinstance(data, _Bytes) or not isinstance(value.shape, tuple):
        _refuse(path, f"array {name!r:.100} has no bytes of its own", _RESAVE)
    found = _DTYPES.get(dtype.code)
    if found is None or dtype.order == ">":
        _refuse(
            path,
            f"array {name!r:.100} has the dtype {dtype.order + dtype.code!r:.40}, which torch has not",
            "convert it with array.astype and save it again",
        )
    if len(value.shape) > 64 or (type(value.fortran) is not bool and value.fortran not in (0, 1)):
        _refuse(path, f"array {name!r:.100} has {len(value.shape)} dimensions", _RESAVE)
    shape, nbytes = check_shape(value.shape, found.itemsize, path=path, tensor=name)
    if nbytes != data.nbytes:
        _refuse(path, f"array {name!r:.100} of shape {list(shape)} needs {nbytes} bytes, found {data.nbytes}", _RESAVE)
    strides = contiguous_strides(shape[::-1])[::-1] if value.fortran and len(shape) > 1 else None
    return TensorSpec(name, found, shape, Extent(path, data.offset, strides))


def _refuse(path: Path, found: str, remedy: str, *, cause: BaseException | None = None) -> NoReturn:
    msg = f"{path}: not a pickle that can be read, and none is ever executed: {found}; {remedy}."
    raise CorruptFileError(msg, path=path) from cause
