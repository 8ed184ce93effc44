"""Reads the pickle inside a ``.pt`` file without the pickle module: nothing that the stream names is ever executed.

A pickle is a program for a small stack machine. This one knows the few instructions that ``torch.save`` needs
for tensors, numbers, texts, lists, tuples and dictionaries, and the few functions that rebuild a tensor, which
here return a :class:`PtTensor`, a plain record. Any other instruction or name ends it with
:class:`PickleError`.

A pickle can also build what is harmful by its shape alone. Three rules keep time and memory in proportion to its bytes:

- Values are nested at most ``_MAX_DEPTH`` deep, since C hashes, compares and frees nested values by recursion.
- A list or dictionary that was recalled from the memo is not filled any more. So no value contains itself, and the
  depth of a value never changes once another one holds it.
- A value that is shared is never walked through its holders: functions are compared by identity, keys are texts, and
  arguments and sizes are few. A tuple that holds the one below it twice has 2**depth leaves.

Source: https://docs.python.org/3/library/pickletools.html for the instructions,
https://pytorch.org/docs/stable/notes/serialization.html for what torch writes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from jasper_store.formats.files import MAX_DIMENSIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["PickleError", "PtStorage", "PtTensor", "describe", "load"]

# A dictionary of lists of rows of tensors, with their arguments, is six deep.
_MAX_DEPTH = 32
_MAX_ARGUMENTS = 8
_MAX_KEY = 255


class PickleError(Exception):
    """The stream is damaged, or holds something other than tensors, numbers, texts, lists and dictionaries."""


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


_MARK = object()


class _Machine:
    """One run over one stream. Every instruction consumes at least one byte, so time and memory are bounded by it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        # Of values that hold lists, tuples or dictionaries: how deep they are, and the values themselves, so that no
        # other value gets the same id.
        self.depths: dict[int, int] = {}
        self.deep: list[Any] = []
        self.recalled: dict[int, Any] = {}

    def read(self, n: int) -> bytes:
        start, self.at = self.at, self.at + n
        if n < 0 or self.at > len(self.data):
            raise PickleError("it ends in the middle of an instruction")
        return self.data[start : self.at]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at)
        return self.read(end + 1 - self.at)[:-1].decode("utf-8")

    def unsigned(self, width: int) -> int:
        return int.from_bytes(self.read(width), "little")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("it takes from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise PickleError("it closes a list that was never begun")

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise PickleError(f"it fills something that is not a {kind.__name__}")
        if id(self.stack[-1]) in self.recalled:
            raise PickleError(f"it fills a {kind.__name__} that it has used already")
        return self.stack[-1]

    def hold(self, holder: Any, items: Iterable[Any]) -> None:
        """Note how deep a list, tuple or dictionary is that holds these items from now on."""
        depth = 0
        for item in items:
            if type(item) in _CONTAINERS:
                depth = max(depth, self.depths.get(id(item), 1))
        if not depth:
            return
        if depth >= _MAX_DEPTH:
            raise PickleError(f"its values are nested over {_MAX_DEPTH} deep")
        if id(holder) not in self.depths:
            self.deep.append(holder)
        self.depths[id(holder)] = max(self.depths.get(id(holder), 0), depth + 1)

    def make_tuple(self, items: Iterable[Any]) -> tuple[Any, ...]:
        made = tuple(items)
        self.hold(made, made)
        return made

    def put(self, key: int) -> None:
        if not self.stack:
            raise PickleError("it remembers something that does not exist")
        self.memo[key] = self.stack[-1]

    def get(self, key: int) -> Any:
        if key not in self.memo:
            raise PickleError("it recalls something that it never remembered")
        value = self.memo[key]
        if type(value) in _FILLED:
            self.recalled[id(value)] = value
        return value

    def reduce(self) -> Any:
        args, function = self.pop(), self.pop()
        # By identity: a set would hash what the stream put there.
        if not any(function is known for known in _FUNCTIONS.values()) or not isinstance(args, tuple):
            raise PickleError("it calls something that is not known to be safe")
        if len(args) > _MAX_ARGUMENTS:
            raise PickleError(f"it calls a function with {len(args)} arguments")
        return function(*args)

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise PickleError("a dictionary with a key that has no value")
        self.hold(target, items[1::2])
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The hashes of texts cannot be foreseen, those of numbers can, and many keys of one hash take for ever.
            if type(key) is not str:
                raise PickleError(f"a dictionary of tensors needs texts as keys, found {describe(key)}")
            target[key] = value

    def global_(self) -> object:
        module = self.line()
        return _find(module, self.line())

    def stack_global(self) -> object:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("it asks for something without a name")
        return _find(module, name)

    def run(self) -> Any:
        while True:
            op = self.read(1)
            if op == b".":
                return self.pop()
            instruction = _INSTRUCTIONS.get(op)
            if instruction is None:
                raise PickleError(f"it uses the instruction {op!r}, which tensors never need")
            instruction(self)


_FILLED = frozenset({list, dict})
_CONTAINERS = _FILLED | {tuple}


def _push(make: Callable[[_Machine], object]) -> Callable[[_Machine], None]:
    def instruction(machine: _Machine) -> None:
        machine.stack.append(make(machine))

    return instruction


def _tuple(n: int) -> Callable[[_Machine], None]:
    def instruction(machine: _Machine) -> None:
        items = [machine.pop() for _ in range(n)]
        machine.stack.append(machine.make_tuple(reversed(items)))

    return instruction


def _skip(n: int) -> Callable[[_Machine], None]:
    def instruction(machine: _Machine) -> None:
        machine.read(n)

    return instruction


def _pop(machine: _Machine) -> None:
    if not machine.stack:
        raise PickleError("it takes from an empty stack")
    machine.stack.pop()


def _build(machine: _Machine) -> None:
    # torch gives every state_dict's OrderedDict a `_metadata` attribute this way; nothing here needs it.
    machine.pop()
    machine.top(dict)


_INSTRUCTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _skip(1),  # PROTO
    b"\x95": _skip(8),  # FRAME
    b"(": _push(lambda _: _MARK),
    b"0": _pop,  # POP
    b"N": _push(lambda _: None),
    b"\x88": _push(lambda _: True),
    b"\x89": _push(lambda _: False),
    b"K": _push(lambda m: m.unsigned(1)),
    b"M": _push(lambda m: m.unsigned(2)),
    b"J": _push(lambda m: int.from_bytes(m.read(4), "little", signed=True)),
    b"\x8a": _push(lambda m: int.from_bytes(m.read(m.unsigned(1)), "little", signed=True)),  # LONG1
    b"G": _push(lambda m: struct.unpack(">d", m.read(8))[0]),
    b"X": _push(lambda m: m.read(m.unsigned(4)).decode("utf-8", "surrogatepass")),
    b"\x8c": _push(lambda m: m.read(m.unsigned(1)).decode("utf-8", "surrogatepass")),  # SHORT_BINUNICODE
    b"]": _push(lambda _: []),
    b"}": _push(lambda _: {}),
    b")": _push(lambda _: ()),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"t": _push(lambda m: m.make_tuple(m.pop_to_mark())),
    b"a": lambda m: _append(m, [m.pop()]),
    b"e": lambda m: _append(m, m.pop_to_mark()),
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.set_items(m.pop_to_mark()),
    b"q": lambda m: m.put(m.unsigned(1)),
    b"r": lambda m: m.put(m.unsigned(4)),
    b"\x94": lambda m: m.put(len(m.memo)),  # MEMOIZE
    b"h": _push(lambda m: m.get(m.unsigned(1))),
    b"j": _push(lambda m: m.get(m.unsigned(4))),
    b"c": _push(lambda m: m.global_()),
    b"\x93": _push(lambda m: m.stack_global()),
    b"R": _push(lambda m: m.reduce()),
    b"Q": _push(lambda m: _storage(m.pop())),
    b"b": _build,
}


def _append(machine: _Machine, items: list[Any]) -> None:
    target = machine.top(list)
    machine.hold(target, items)
    target.extend(items)


def load(data: bytes) -> Any:
    """The object that a pickle describes, with a :class:`PtTensor` for each tensor.

    Raises:
        PickleError: it is damaged, or would need anything executed.
    """
    try:
        return _Machine(data).run()
    except (ValueError, TypeError, RecursionError, OverflowError) as exc:
        raise PickleError(f"it is damaged: {exc!s:.100}") from exc
