"""A declaration compiled against tensors: which rows of what a sample reads, as a graph of lookups.

Everything that the engine needs to know of a dataset follows from this graph, and is written nowhere else: keys, shapes
and dtypes of a batch; rows and bytes that a sample reads; which values are rows of what; what can be gathered in which
order, prefetched ahead, and read in runs. Building it reads no data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, TypeAlias

import torch
import xxhash

from jasper_store.errors import DeclarationError, UnknownNameError
from jasper_store.samples.declaration import Choice, Declaration, Field
from jasper_store.samples.expression import POSITION, ROW, Lookup, Rows, closest

__all__ = ["BY_POSITION", "Bound", "Node", "Output", "RowRef", "SampleGraph", "build_graph"]

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


class RowRef(NamedTuple):
    """What names the rows of a node.

    Attributes:
        node: number of the node whose values are the rows; -1 is the position of the sample.
        column: which of that node's values for each sample; ``None`` is all of them.
    """

    node: int
    column: int | None = None


BY_POSITION: Final = RowRef(-1)


@dataclass(frozen=True, slots=True)
class Node:
    """One lookup.

    Attributes:
        tensors: stored names; more than one only for a choice.
        rows: what names the rows.
        column: entry of the second dimension that is read; ``None`` is the whole row.
        lead: sizes of the rows that one sample names: () for one row, (k,) for k rows.
        row_shape: sizes of what is read of each row.
        dtype: as it is stored.
        n_rows: rows that the tensors have.
        depth: lookups that have to be done before it.
        ragged: whether the number of rows differs from sample to sample; then ``lead`` is ().
        span: it reads offsets of a ragged tensor, and stands for the rows of values between them.
        choice: each row comes from one of the tensors, or is zeros, by the variant that is drawn for it.
    """

    tensors: tuple[str, ...]
    rows: RowRef
    column: int | None
    lead: tuple[int, ...]
    row_shape: tuple[int, ...]
    dtype: torch.dtype
    n_rows: int
    depth: int
    ragged: bool = False
    span: bool = False
    choice: bool = False

    @property
    def tensor(self) -> str:
        """The stored name, where there is one tensor."""
        return self.tensors[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its values for one sample; of one row where it is ragged."""
        return (*self.lead, *self.row_shape)


@dataclass(frozen=True, slots=True)
class Output:
    """One field of a batch.

    Attributes:
        key: its name.
        node: number of the node that it is read by.
        dtype: what it is served as.
        variant: it serves the variant that the node has drawn, and not its values.
    """

    key: str
    node: int
    dtype: torch.dtype
    variant: bool = False


@dataclass(frozen=True, slots=True)
class Bound:
    """Values that are rows of another tensor.

    Attributes:
        tensor: stored name of the index tensor.
        column: which of its columns, or ``None`` for all.
        target: name of the tensor that they are rows of.
        n_rows: how many it has.
        offsets: the values are offsets of a ragged tensor: they ascend from 0 to ``n_rows``.
    """

    tensor: str
    column: int | None
    target: str
    n_rows: int
    offsets: bool = False

    def __str__(self) -> str:
        column = "" if self.column is None else f"[:, {self.column}]"
        return f"{self.tensor}{column} {'ascends to' if self.offsets else '<'} {self.n_rows}"


@dataclass(frozen=True, slots=True)
class SampleGraph:
    """The lookups of a sample, in an order in which each comes after those whose values it needs.

    Attributes:
        nodes: the lookups.
        outputs: the fields of a batch, in its order.
        length: samples in the split.
        row: what ``row`` means: the node of the split's index tensor, or the position.
        split: name of the split, or ``None``.
        choice: number of the node that is a choice, or ``None``.
        bounds: which values are rows of what.
        reads: rows that one sample reads of each stored tensor, on average.
        declaration: what it was compiled from.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[Output, ...]
    length: int
    row: RowRef
    split: str | None
    choice: int | None
    bounds: tuple[Bound, ...]
    reads: Mapping[str, float]
    declaration: Declaration

    @property
    def index_nodes(self) -> list[int]:
        """Numbers of the nodes whose values name rows, those first that need fewer lookups before them."""
        used = {node.rows.node for node in self.nodes} - {BY_POSITION.node}
        return sorted(used, key=lambda number: (self.nodes[number].depth, number))

    @property
    def ragged_keys(self) -> tuple[str, ...]:
        """Fields whose number of rows differs from sample to sample."""
        return tuple(out.key for out in self.outputs if self.nodes[out.node].ragged and not out.variant)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of a batch; a ragged field X is two, ``X.values`` and ``X.offsets``."""
        ragged = set(self.ragged_keys)
        return tuple(
            key
            for out in self.outputs
            for key in ([f"{out.key}.values", f"{out.key}.offsets"] if out.key in ragged else [out.key])
        )

    def shape_of(self, output: Output) -> tuple[int, ...]:
        """Sizes of a field for one sample; of one of its rows if it is ragged."""
        return () if output.variant else self.nodes[output.node].shape

    @property
    def sample_nbytes(self) -> int:
        """Bytes of one sample in a batch; of the average one where fields are ragged."""
        total = 0.0
        for out in self.outputs:
            count = self.reads[self.nodes[out.node].tensor] if self.nodes[out.node].ragged else 1
            total += count * math.prod(self.shape_of(out)) * out.dtype.itemsize
        return math.ceil(total)

    @property
    def in_row_order(self) -> frozenset[str]:
        """Stored tensors of which a sample reads the one row at its position or row: runs of samples read runs of them."""
        found = [node for node in self.nodes if node.rows in {self.row, BY_POSITION}]
        return frozenset(name for node in found for name in node.tensors)

    def fingerprint(self, sizes: Sequence[tuple[str, tuple[int, ...]]], sampled: bytes) -> str:
        """A short digest of what decides the samples and their order.

        Args:
            sizes: names and shapes of the tensors that samples read.
            sampled: values of the split's index tensor at some positions.
        """
        digest = xxhash.xxh3_64()
        fields = [(out.key, str(self.declaration.expanded(out.key))) for out in self.outputs]
        digest.update(repr((self.split, self.length, fields, sorted(sizes))).encode())
        digest.update(sampled)
        return digest.hexdigest()


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
    return _Builder(declaration, tensors, split).build()


_Named: TypeAlias = "tuple[RowRef, tuple[int, ...], bool, int]"


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
            listed = self._nodes[number]
            if listed.dtype not in _INTEGERS or listed.row_shape or listed.ragged:
                raise self._error(
                    f"{listed.tensor} should list rows as integers [samples], found"
                    f" {_word(listed.dtype)} {'rows of different lengths' if listed.ragged else [listed.n_rows, *listed.row_shape]}"
                )
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

    def _lookup(self, lookup: Lookup, inner: _Named | None = None) -> int:
        """The node of a lookup; ``inner`` is what names its rows, where that is known."""
        rows, lead, ragged, depth = self._rows(lookup.rows) if inner is None else inner
        spec = self._tensors.get(lookup.tensor)
        if spec is None and f"{lookup.tensor}.values" in self._tensors:
            return self._ragged(lookup, rows, lead, ragged=ragged, depth=depth)
        if spec is None:
            raise self._unknown(lookup.tensor)
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
            raise self._unknown(f"{name}.offsets")
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
        kinds = set()
        for tensor, spec in found.items():
            if spec is None:
                raise self._unknown(tensor)
            kinds.add((tuple(spec.shape), spec.dtype))
        if len(kinds) != 1:
            shown = ", ".join(f"{tensor} {spec.dtype} {list(spec.shape)}" for tensor, spec in found.items() if spec)
            raise self._error(f"the tensors of a choice should have one shape and dtype, found {shown}")
        ((shape, dtype),) = kinds
        if not shape:
            raise self._error(f"{choice.tensors[0]} is a scalar and has no rows")
        node = Node(choice.tensors, rows, None, (), shape[1:], dtype, shape[0], depth, choice=True)
        return self._add(node, choice.tensors[0])

    def _rows(self, rows: Rows) -> _Named:
        """What names rows: the reference, the sizes for one sample, whether they are ragged, the depth of who uses it."""
        if isinstance(rows, str):
            if rows == POSITION:
                return BY_POSITION, (), False, 0
            if rows == ROW:
                return self._row, (), False, 0 if self._row == BY_POSITION else 1
            rows = self._declaration.rows_of(rows)
            assert isinstance(rows, Lookup)
        column: int | None = None
        inner: _Named | None = None
        spec = self._tensors.get(rows.tensor)
        narrow = spec is not None and len(spec.shape) == 2 and spec.shape[1] * spec.dtype.itemsize <= _LINE
        if rows.column is not None and spec is not None and narrow:
            inner = self._rows(rows.rows)
            if inner[1] == () and not inner[2]:
                column = self._column(rows, spec.shape)
                rows = Lookup(rows.tensor, rows.rows)
        # Compiled once: twice at each level would be a time that doubles with each.
        number = self._lookup(rows, inner)
        node = self._nodes[number]
        if node.dtype not in _INTEGERS:
            raise self._error(f"{node.tensor} holds {_word(node.dtype)} values, and rows are named by integers")
        lead = () if column is not None or node.ragged else node.shape
        if node.ragged and node.row_shape:
            raise self._error(
                f"{node.tensor} holds rows of shape {list(node.row_shape)}, and a ragged row is named by one number"
            )
        return RowRef(number, column), lead, node.ragged, node.depth + 1

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
            raise DeclarationError(f"tensors looked up by i should have one number of rows: {shown}")
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

    # --- errors -----------------------------------------------------------------------------------------------

    def _unknown(self, name: str) -> UnknownNameError:
        return UnknownNameError(f"{self._field} names no tensor: there is no {name!r}; {closest(name, self._tensors)}")

    def _error(self, what: str) -> DeclarationError:
        return DeclarationError(f"{self._field}: {what}")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
