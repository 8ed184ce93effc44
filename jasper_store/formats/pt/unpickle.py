"""Reads the pickle inside a ``.pt`` file without the pickle module: nothing that the stream names is ever executed.

The few functions that rebuild a tensor are known to the machine of :mod:`jasper_store.formats.pt.machine`, and return a
:class:`PtTensor`, a plain record.

Source: https://pytorch.org/docs/stable/notes/serialization.html for what torch writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from jasper_store.formats.files import MAX_DIMENSIONS
from jasper_store.formats.pt.machine import Machine, PickleError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["PickleError", "PtStorage", "PtTensor", "describe", "load"]

_MAX_KEY = 255


@dataclass(frozen=True, slots=True)
class PtStorage:
    """A storage that the pickle refers to by the name of its record.

    Attributes:
        key: name of the record under ``data/``.
        nbytes: bytes that it should have.
        dtype: element type, ``None`` for an untyped storage.
    """

    key: str
    nbytes: int
    dtype: torch.dtype | None


@dataclass(frozen=True, slots=True)
class PtTensor:
    """A tensor as the pickle describes it; ``offset``, ``shape`` and ``strides`` count elements, unchecked."""

    storage: PtStorage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def describe(value: object) -> str:
    """A few words for a message. ``repr`` would write out a shared value as often as it is held."""
    if isinstance(value, str):
        return repr(value[:60])
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, PtTensor):
        return f"a tensor, {str(value.dtype).removeprefix('torch.')} {list(value.shape[:8])}"
    if isinstance(value, PtStorage):
        return "a storage of a tensor"
    return f"{value!r:.80}" if value is None or isinstance(value, int | float) else f"a {type(value).__name__}"


_STORAGES: dict[str, torch.dtype | None] = {
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(dtype for dtype in _STORAGES.values() if dtype is not None),
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
}


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: torch.dtype | None


def _ints(value: object) -> tuple[int, ...]:
    # One tuple can be the sizes of many tensors, so it must be short before it is looked through.
    if not isinstance(value, tuple) or len(value) > MAX_DIMENSIONS or not all(type(v) is int for v in value):
        raise PickleError(f"a tensor's sizes and strides must be tuples of at most {MAX_DIMENSIONS} ints")
    return value


def _rebuild_v2(*args: Any) -> PtTensor:
    if len(args) not in (6, 7) or not isinstance(args[0], PtStorage) or args[0].dtype is None:
        raise PickleError("_rebuild_tensor_v2 with unusual arguments")
    if type(args[1]) is not int:
        raise PickleError("a tensor's storage offset must be an int")
    return PtTensor(args[0], args[0].dtype, args[1], _ints(args[2]), _ints(args[3]))


def _rebuild_v3(*args: Any) -> PtTensor:
    if len(args) not in (7, 8) or not isinstance(args[0], PtStorage) or not isinstance(args[6], torch.dtype):
        raise PickleError("_rebuild_tensor_v3 with unusual arguments")
    if type(args[1]) is not int:
        raise PickleError("a tensor's storage offset must be an int")
    return PtTensor(args[0], args[6], args[1], _ints(args[2]), _ints(args[3]))


def _rebuild_parameter(*args: Any) -> PtTensor:
    if len(args) < 3 or not isinstance(args[0], PtTensor):
        raise PickleError("_rebuild_parameter with unusual arguments")
    return args[0]


def _ordered_dict(*args: Any) -> dict[Any, Any]:
    if args:
        raise PickleError("an OrderedDict with arguments")
    return {}


def _size(*args: Any) -> tuple[int, ...]:
    if len(args) != 1:
        raise PickleError("torch.Size with unusual arguments")
    return _ints(args[0])


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch", "Size"): _size,
}


def _find(module: str, name: str) -> object:
    function = _FUNCTIONS.get((module, name))
    if function is not None:
        return function
    if module == "torch" and name in _STORAGES:
        return _StorageType(_STORAGES[name])
    if (module, name) == ("torch.storage", "UntypedStorage"):
        return _StorageType(None)
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    raise PickleError(
        f"it asks for {module:.80}.{name:.80}, which is neither a tensor, a number, a text, a list nor a dict"
    )


def _storage(pid: object) -> PtStorage:
    if not isinstance(pid, tuple) or len(pid) != 5:
        raise PickleError("a storage reference must have five parts")
    kind, storage_type, key, _location, numel = pid
    if kind != "storage" or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
        raise PickleError("a storage reference of an unknown kind")
    if type(numel) is not int or numel < 0:
        raise PickleError("a storage of negative or unknown size")
    if len(key) > _MAX_KEY:
        raise PickleError(f"a storage whose name has {len(key)} characters")
    itemsize = 1 if storage_type.dtype is None else storage_type.dtype.itemsize
    return PtStorage(key, numel * itemsize, storage_type.dtype)


class _TorchMachine(Machine):
    functions: ClassVar[Mapping[tuple[str, str], Callable[..., Any]]] = _FUNCTIONS

    def find(self, module: str, name: str) -> object:
        return _find(module, name)

    def describe(self, value: object) -> str:
        return describe(value)

    def persistent(self, pid: object) -> object:
        return _storage(pid)


def load(data: bytes) -> Any:
    """The object that a pickle describes, with a :class:`PtTensor` for each tensor.

    Raises:
        PickleError: it is damaged, or would need anything executed.
    """
    try:
        return _TorchMachine(data).run()
    except (ValueError, TypeError, RecursionError, OverflowError) as exc:
        raise PickleError(f"it is damaged: {exc!s:.100}") from exc
