"""A stack machine that follows a pickle, and never executes anything that it names.

A pickle is a program for a small stack machine. This one knows the few instructions that are needed for numbers, texts,
lists, tuples and dictionaries. A subclass says which names and functions there are, and what stands for their results. Any
other instruction or name ends it with :class:`PickleError`.

A pickle can also build what is harmful by its shape alone. Three rules keep time and memory in proportion to its bytes:

- Values are nested at most ``_MAX_DEPTH`` deep, since C hashes, compares and frees nested values by recursion.
- A list or dictionary that was recalled from the memo is not filled any more. So no value contains itself, and the
  depth of a value never changes once another one holds it.
- A value that is shared is never walked through its holders: functions are compared by identity, keys are texts, and
  arguments and sizes are few. A tuple that holds the one below it twice has 2**depth leaves.

Source: https://docs.python.org/3/library/pickletools.html for the instructions.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["Machine", "PickleBytes", "PickleError"]

# A dictionary of lists of rows of tensors, with their arguments, is six deep.
_MAX_DEPTH = 32
_MAX_ARGUMENTS = 8


class PickleError(Exception):
    """The stream is damaged, or holds something other than tensors, numbers, texts, lists and dictionaries."""


_MARK = object()


class PickleBytes(Protocol):
    """What is needed of the bytes of a pickle."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, where: slice, /) -> bytes:
        """Some of them."""

    def find(self, sub: bytes, start: int, /) -> int:
        """Where ``sub`` comes first, from ``start`` on; -1 if nowhere."""


class Machine:
    """One run over one stream. Every instruction consumes at least one byte, so time and memory are bounded by it.

    A subclass may know more: functions, names and instructions.

    Attributes:
        functions: what may be called, by module and name.
    """

    functions: ClassVar[Mapping[tuple[str, str], Callable[..., Any]]] = {}

    def __init__(self, data: PickleBytes) -> None:
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
        """The next bytes."""
        start, self.at = self.at, self.at + n
        if n < 0 or self.at > len(self.data):
            raise PickleError("it ends in the middle of an instruction")
        return self.data[start : self.at]

    def line(self) -> str:
        """The next bytes up to the end of the line, as text."""
        end = self.data.find(b"\n", self.at)
        return self.read(end + 1 - self.at)[:-1].decode("utf-8")

    def unsigned(self, width: int) -> int:
        """The next bytes as a number."""
        return int.from_bytes(self.read(width), "little")

    def pop(self) -> Any:
        """Take a value from the stack."""
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("it takes from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """Take the values since the last mark, and the mark."""
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise PickleError("it closes a list that was never begun")

    def top(self, kind: type) -> Any:
        """The list or dictionary that is to be filled."""
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
        """A tuple, its depth noted."""
        made = tuple(items)
        self.hold(made, made)
        return made

    def put(self, key: int) -> None:
        """Remember the value on the stack."""
        if not self.stack:
            raise PickleError("it remembers something that does not exist")
        self.memo[key] = self.stack[-1]

    def get(self, key: int) -> Any:
        """Recall a value."""
        if key not in self.memo:
            raise PickleError("it recalls something that it never remembered")
        value = self.memo[key]
        if type(value) in _FILLED:
            self.recalled[id(value)] = value
        return value

    def reduce(self) -> Any:
        """Call a function, one of those that are known."""
        args, function = self.pop(), self.pop()
        # By identity: a set would hash what the stream put there.
        if not any(function is known for known in self.functions.values()) or not isinstance(args, tuple):
            raise PickleError("it calls something that is not known to be safe")
        if len(args) > _MAX_ARGUMENTS:
            raise PickleError(f"it calls a function with {len(args)} arguments")
        return function(*args)

    def set_items(self, items: list[Any]) -> None:
        """Fill a dictionary with keys and values in turn."""
        target = self.top(dict)
        if len(items) % 2:
            raise PickleError("a dictionary with a key that has no value")
        self.hold(target, items[1::2])
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The hashes of texts cannot be foreseen, those of numbers can, and many keys of one hash take for ever.
            if type(key) is not str:
                raise PickleError(f"a dictionary of tensors needs texts as keys, found {self.describe(key)}")
            target[key] = value

    def global_(self) -> object:
        """What a name stands for that is written here."""
        module = self.line()
        return self.find(module, self.line())

    def stack_global(self) -> object:
        """What a name stands for that is on the stack."""
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("it asks for something without a name")
        return self.find(module, name)

    def find(self, module: str, name: str) -> object:
        """What a name of the stream stands for.

        Raises:
            PickleError: nothing that is known.
        """
        raise PickleError(f"it asks for {module:.80}.{name:.80}, which is not known")

    def describe(self, value: object) -> str:
        """A few words on a value for a message."""
        return f"a {type(value).__name__}"

    def persistent(self, pid: object) -> object:
        """What a reference to something outside of the stream stands for.

        Raises:
            PickleError: nothing that is known.
        """
        raise PickleError(f"it refers to {self.describe(pid)} outside of it")

    def build(self) -> None:
        """Give an object its state."""
        # torch gives every state_dict's OrderedDict a `_metadata` attribute this way; no subclass needs it.
        self.pop()
        self.top(dict)

    def instruction(self, op: bytes) -> Callable[[Any], None] | None:
        """What an instruction does; ``None`` for one that is not known."""
        return _INSTRUCTIONS.get(op)

    def run(self) -> Any:
        """The value that the stream makes."""
        while True:
            op = self.read(1)
            if op == b".":
                return self.pop()
            instruction = self.instruction(op)
            if instruction is None:
                raise PickleError(f"it uses the instruction {op!r}, which tensors never need")
            instruction(self)


_FILLED = frozenset({list, dict})
_CONTAINERS = _FILLED | {tuple}


def _push(make: Callable[[Machine], object]) -> Callable[[Machine], None]:
    def instruction(machine: Machine) -> None:
        machine.stack.append(make(machine))

    return instruction


def _tuple(n: int) -> Callable[[Machine], None]:
    def instruction(machine: Machine) -> None:
        items = [machine.pop() for _ in range(n)]
        machine.stack.append(machine.make_tuple(reversed(items)))

    return instruction


def _skip(n: int) -> Callable[[Machine], None]:
    def instruction(machine: Machine) -> None:
        machine.read(n)

    return instruction


def _pop(machine: Machine) -> None:
    if not machine.stack:
        raise PickleError("it takes from an empty stack")
    machine.stack.pop()


_INSTRUCTIONS: dict[bytes, Callable[[Machine], None]] = {
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
    b"Q": _push(lambda m: m.persistent(m.pop())),
    b"b": lambda m: m.build(),
}


def _append(machine: Machine, items: list[Any]) -> None:
    target = machine.top(list)
    machine.hold(target, items)
    target.extend(items)
