"""A declaration compiled against tensors to a :class:`~jasper_store.samples.graph.SampleGraph`. Reads no data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple, Protocol

import torch

from jasper_store.errors import DeclarationError, UnknownNameError
from jasper_store.samples.declaration import Choice, Declaration, Field
from jasper_store.samples.expression import POSITION, ROW, Lookup, Rows, closest
from jasper_store.samples.graph import BY_POSITION, Bound, Node, Output, RowRef, SampleGraph

__all__ = ["build_graph"]

_INTEGERS: Final = frozenset(
    {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64}
)
_LINE: Final = 64
"""An index tensor's row is gathered whole, for all of its columns at once, if it fits a cache line of this many bytes."""
_RARELY: Final = 0.01
"""Reads per sample of a variant that is not drawn in the epoch that is planned for; another epoch may draw it."""


class _Described(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


def build_graph(declaration: Declaration, tensors: Mapping[str, _Described], split: str | None = None) -> SampleGraph:
    """Compile a declaration.

    Args:
        declaration: what samples read.
        tensors: shape and dtype of each stored tensor: specs, or an open store.
        split: a name of ``declaration.splits``, or ``None`` for all rows.

    Raises:
        UnknownNameError: a split or a tensor that does not exist.
        DeclarationError: indices that are no integers, a column that is not there, lengths that differ, ragged rows
            where they have no meaning.
    """
    if split is not None and split not in declaration.splits:
        known = closest(split, declaration.splits) if declaration.splits else "the dataset declares no splits"
        raise UnknownNameError(f"unknown split {split!r}; {known}")
    _require_tensors(declaration, tensors, split)
    return _Builder(declaration, tensors, split).build()


def _require_tensors(declaration: Declaration, tensors: Mapping[str, _Described], split: str | None) -> None:
    """Refuse a declaration that names tensors that do not exist; the message names all of them, and their fields."""
    users: dict[str, list[str]] = {}
    for name in declaration.served:
        for tensor in declaration.tensors_of(name):
            users.setdefault(tensor, []).append(f"field {name!r}")
    if split is not None:
        users.setdefault(declaration.splits[split], []).append(f"split {split!r}")
    missing = {name: by for name, by in users.items() if not {name, f"{name}.values"} & tensors.keys()}
    if not missing:
        return
    several = len(missing) > 1
    said = ", ".join(f"{name!r} ({', '.join(dict.fromkeys(by))})" for name, by in missing.items())
    near = (
        closest(next(iter(missing)), tensors) if not several else f"there are {', '.join(map(repr, [*tensors][:12]))}"
    )
    raise UnknownNameError(f"no tensor{'s' if several else ''} {said}; {near}", tensor=next(iter(missing)))


class _Named(NamedTuple):
    """What names rows.

    Attributes:
        rows: the reference.
        lead: sizes of the rows that one sample names.
        ragged: whether their number differs from sample to sample.
        depth: lookups that have to be done before the rows are known.
    """

    rows: RowRef
    lead: tuple[int, ...]
    ragged: bool
    depth: int


class _Builder:
    def __init__(self, declaration: Declaration, tensors: Mapping[str, _Described], split: str | None) -> None:
        self._declaration, self._tensors, self._split = declaration, tensors, split
        self._nodes: list[Node] = []
        self._known: dict[Node, int] = {}
        self._bounds: dict[Bound, None] = {}
        self._lengths: dict[str, int] = {}
        self._row = BY_POSITION
        self._field = ""

    def build(self) -> SampleGraph:
        declaration = self._declaration
        if self._split is not None:
            self._field = f"split {self._split}"
            number = self._lookup(Lookup(declaration.splits[self._split], POSITION))
            node = self._nodes[number]
            if node.dtype not in _INTEGERS or node.shape or node.ragged:
                shown = f"{_word(node.dtype)} [{', '.join(map(str, (node.n_rows, *node.shape)))}]"
                raise self._error(f"{node.tensor} should list rows, integers [samples], found {shown}")
            self._row = RowRef(number)
        outputs = [self._output(name) for name in declaration.served]
        return SampleGraph(
            nodes=tuple(self._nodes),
            outputs=tuple(outputs),
            length=self._length(),
            row=self._row,
            split=self._split,
            choice=next((number for number, node in enumerate(self._nodes) if node.choice), None),
            bounds=tuple(self._bounds),
            reads=self._reads(),
            declaration=declaration,
        )

    def _output(self, name: str) -> Output:
        value = self._declaration.fields[name]
        self._field = f"field {name!r}"
        if isinstance(value, Field):
            number = self._lookup(value.lookup)
            return Output(name, number, self._dtype(number, value))
        if isinstance(value, Choice):
            number = self._choice(name, value)
            return Output(name, number, self._nodes[number].dtype)
        chosen = self._declaration.fields[value.of]
        assert isinstance(chosen, Choice)
        return Output(name, self._choice(value.of, chosen), torch.int64, variant=True)

    # --- lookups ----------------------------------------------------------------------------------------------

    def _lookup(self, lookup: Lookup) -> int:
        """The node of a lookup."""
        return self._lookup_at(lookup, self._rows(lookup.rows))

    def _lookup_at(self, lookup: Lookup, found: _Named) -> int:
        """The node of a lookup whose rows were found."""
        rows, lead, ragged, depth = found
        spec = self._tensors.get(lookup.tensor)
        if spec is None and f"{lookup.tensor}.values" in self._tensors:
            return self._ragged(lookup, rows, lead, ragged=ragged, depth=depth)
        assert spec is not None
        if not spec.shape:
            raise self._error(f"{lookup.tensor} is a scalar and has no rows")
        column = self._column(lookup, spec.shape)
        row_shape = tuple(spec.shape[1:]) if column is None else tuple(spec.shape[2:])
        return self._add(
            Node((lookup.tensor,), rows, column, lead, row_shape, spec.dtype, spec.shape[0], depth, ragged),
            lookup.tensor,
        )

    def _ragged(self, lookup: Lookup, rows: RowRef, lead: tuple[int, ...], *, ragged: bool, depth: int) -> int:
        """Nodes of a ragged tensor: its offsets say which of its values a row has."""
        name, values = lookup.tensor, self._tensors[f"{lookup.tensor}.values"]
        offsets = self._tensors.get(f"{name}.offsets")
        if offsets is None:
            raise self._error(f"{name} is ragged, and {name}.offsets is missing")
        if lookup.column is not None:
            raise self._error(f"{name} is ragged: its rows have no columns")
        if ragged or lead:
            raise self._error(f"{name} is ragged: expected one row of it for each sample, found several")
        if offsets.dtype not in _INTEGERS or len(offsets.shape) != 1 or offsets.shape[0] < 1:
            raise self._error(
                f"{name}.offsets should be integers [rows + 1], found {offsets.dtype} {list(offsets.shape)}"
            )
        count = offsets.shape[0] - 1
        span = self._add(
            Node((f"{name}.offsets",), rows, None, (), (), offsets.dtype, count, depth, ragged=True, span=True), name
        )
        self._bounds[Bound(f"{name}.offsets", None, f"{name}.values", values.shape[0], offsets=True)] = None
        shape, dtype = tuple(values.shape[1:]), values.dtype
        node = Node((f"{name}.values",), RowRef(span), None, (), shape, dtype, values.shape[0], depth + 1, ragged=True)
        return self._number(node)

    def _choice(self, name: str, choice: Choice) -> int:
        rows, lead, ragged, depth = self._rows(self._declaration.rows_of(name))
        if lead or ragged:
            raise self._error("a choice takes one row for each sample, found several")
        found = {tensor: self._tensors.get(tensor) for tensor in choice.tensors}
        ragged_ones = [tensor for tensor, spec in found.items() if spec is None]
        if ragged_ones:
            raise self._error(f"a choice takes rows of one size, and {ragged_ones[0]} is ragged")
        kinds = {(tuple(spec.shape), spec.dtype) for spec in found.values() if spec is not None}
        if len(kinds) != 1:
            shown = ", ".join(f"{tensor} {spec.dtype} {list(spec.shape)}" for tensor, spec in found.items() if spec)
            raise self._error(f"the tensors of a choice should have one shape and dtype, found {shown}")
        ((shape, dtype),) = kinds
        if not shape:
            raise self._error(f"{choice.tensors[0]} is a scalar and has no rows")
        if choice.key is not None:
            self._check_key(choice.key, shape[0])
        node = Node(choice.tensors, rows, None, (), shape[1:], dtype, shape[0], depth, choice=True)
        return self._add(node, choice.tensors[0])

    def _check_key(self, name: str, n_rows: int) -> None:
        """The numbers that rows are drawn by: one integer for each row of the choice's tensors."""
        spec = self._tensors.get(name)
        if spec is None or spec.dtype not in _INTEGERS or tuple(spec.shape) != (n_rows,):
            shown = "a ragged tensor" if spec is None else f"{_word(spec.dtype)} {list(spec.shape)}"
            raise self._error(f"{name} should hold one integer for each of {n_rows} rows to draw by, found {shown}")

    def _rows(self, rows: Rows) -> _Named:
        """What names rows."""
        if isinstance(rows, str):
            if rows == POSITION:
                return _Named(BY_POSITION, (), ragged=False, depth=0)
            if rows == ROW:
                return _Named(self._row, (), ragged=False, depth=0 if self._row == BY_POSITION else 1)
            rows = self._declaration.rows_of(rows)
            assert isinstance(rows, Lookup)
        column: int | None = None
        spec = self._tensors.get(rows.tensor)
        narrow = spec is not None and len(spec.shape) == 2 and spec.shape[1] * spec.dtype.itemsize <= _LINE
        inner = self._rows(rows.rows)
        if rows.column is not None and spec is not None and narrow and inner.lead == () and not inner.ragged:
            column = self._column(rows, spec.shape)
            rows = Lookup(rows.tensor, rows.rows)
        number = self._lookup_at(rows, inner)
        node = self._nodes[number]
        if node.dtype not in _INTEGERS:
            raise self._error(f"{node.tensor} holds {_word(node.dtype)} values, and rows are named by integers")
        lead = () if column is not None or node.ragged else node.shape
        if node.ragged and node.row_shape:
            raise self._error(
                f"{node.tensor} holds rows of shape {list(node.row_shape)}, and a ragged row is named by one number"
            )
        return _Named(RowRef(number, column), lead, node.ragged, node.depth + 1)

    # --- parts ------------------------------------------------------------------------------------------------

    def _add(self, node: Node, target: str) -> int:
        """The number of a node, and what its rows are bounded by."""
        source = node.rows.node
        if source == BY_POSITION.node:
            self._lengths[target] = node.n_rows
        else:
            index = self._nodes[source]
            column = node.rows.column if node.rows.column is not None else index.column
            self._bounds[Bound(index.tensor, column, target, node.n_rows)] = None
        return self._number(node)

    def _number(self, node: Node) -> int:
        if node not in self._known:
            self._known[node] = len(self._nodes)
            self._nodes.append(node)
        return self._known[node]

    def _column(self, lookup: Lookup, shape: tuple[int, ...]) -> int | None:
        if lookup.column is None:
            return None
        count = shape[1] if len(shape) > 1 else 0
        if not -count <= lookup.column < count:
            has = f"it has columns 0 to {count - 1}" if count else f"its shape is {list(shape)}"
            raise self._error(f"{lookup.tensor} has no column {lookup.column}: {has}")
        return lookup.column % count

    def _dtype(self, number: int, value: Field) -> torch.dtype:
        stored = self._nodes[number].dtype
        if (
            value.dtype is not None
            and stored != value.dtype
            and (value.dtype != torch.int64 or stored not in _INTEGERS)
        ):
            raise self._error(f"{_word(stored)} cannot be served as {_word(value.dtype)}")
        return value.dtype or stored

    def _length(self) -> int:
        if not self._lengths:
            raise DeclarationError("no field is looked up by i, so the number of samples is not known")
        if len(set(self._lengths.values())) > 1:
            shown = ", ".join(f"{name} has {count}" for name, count in self._lengths.items())
            hint = "" if self._split is None else "; i is a position in the split, row is the row of the tensors"
            raise DeclarationError(f"tensors looked up by i should have one number of rows: {shown}{hint}")
        return next(iter(self._lengths.values()))

    def _reads(self) -> dict[str, float]:
        """Rows that a sample reads of each stored tensor; 0 of those that no field names."""
        reads = dict.fromkeys(self._tensors, 0.0)
        lists = self._declaration.splits.values()
        reads |= {name: 1.0 for name in lists if name in reads}  # by a sample of that split
        lengths: dict[int, float] = {}  # of ragged rows, on average
        for number, node in enumerate(self._nodes):
            if node.choice:
                reads |= {name: max(share, _RARELY) for name, share in self._shares(node.tensors)}
                reads |= {name: reads[name] + 1.0 for name in self._keys(node.tensors)}
                continue
            count = float(math.prod(node.lead))
            if node.span:
                values = self._tensors[f"{node.tensor.removesuffix('.offsets')}.values"]
                lengths[number] = values.shape[0] / max(node.n_rows, 1)
            elif node.ragged:
                lengths[number] = count = lengths[node.rows.node]
            if node.tensor not in lists:
                reads[node.tensor] += count
        return reads

    def _shares(self, tensors: tuple[str, ...]) -> Iterator[tuple[str, float]]:
        for value in self._declaration.fields.values():
            if isinstance(value, Choice) and value.tensors == tensors:
                yield from zip(tensors, value.planned[1:], strict=True)

    def _keys(self, tensors: tuple[str, ...]) -> Iterator[str]:
        for value in self._declaration.fields.values():
            if isinstance(value, Choice) and value.tensors == tensors and value.key is not None:
                yield value.key

    # --- errors -----------------------------------------------------------------------------------------------

    def _error(self, what: str) -> DeclarationError:
        return DeclarationError(f"{self._field}: {what}")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
