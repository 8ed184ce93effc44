"""What is materialised of a sample: its columns, derived from what the samples of a dataset read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch

from jasper_store.conversion.narrow import narrowed
from jasper_store.errors import IncompatibleOptionsError, UnknownNameError
from jasper_store.samples.compiler import build_graph
from jasper_store.samples.declaration import Choice, Declaration, Field, Unwritten, Variant
from jasper_store.samples.expression import ROW, Lookup, closest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jasper_store.samples.graph import SampleGraph

__all__ = ["ORIGIN", "Column", "Names", "alone", "columns_of", "declaration_of", "packed_fields"]

ORIGIN: Final = "packed_row"
"""Name of the tensor that holds the row of each sample in the dataset that it was packed from."""


@dataclass(frozen=True)
class Column:
    """One stored tensor of a packed dataset.

    Attributes:
        name: its name; of a ragged field ``X.values``.
        field: the field whose values it holds.
        variant: of a choice, which of its tensors, from 1; else 0.
        source: name of the tensor that its values come from.
        stored: their dtype there.
        dtype: what they are written as.
        row_shape: sizes of a sample's values; of one row where they are ragged.
        lead: rows of the source that make a sample's values; 1 where they are ragged.
        ragged: whether their number differs from sample to sample.
    """

    name: str
    field: str
    variant: int
    source: str
    stored: torch.dtype
    dtype: torch.dtype
    row_shape: tuple[int, ...]
    lead: int
    ragged: bool

    @property
    def row_nbytes(self) -> int:
        """Bytes of a sample's values as they are written; of one row where they are ragged."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def of(self) -> str:
        """Field and variant, as one text."""
        return f"{self.field}:{self.variant}" if self.variant else self.field


class Names:
    """Names of the tensors of a packed dataset, each once.

    Args:
        taken: names that are taken.
    """

    def __init__(self, taken: Sequence[str]) -> None:
        self._taken = set(taken)

    def take(self, wanted: str, instead: str) -> str:
        """The wanted name if it is plain and free, else another one, with a number where that is taken as well."""
        name, number = wanted if wanted.isidentifier() else instead, 2
        while name in self._taken:
            name, number = f"{instead}_{number}", number + 1
        self._taken.add(name)
        return name


def packed_fields(declaration: Declaration, asked: Sequence[str] | None) -> list[str]:
    """Names of the fields that are packed, in the order of the declaration: those asked for that are served.

    A choice that is not served and whose variant is, is among them.

    Raises:
        UnknownNameError: a field that is not served.
        IncompatibleOptionsError: none is asked for, or a variant without its choice.
    """
    served = declaration.served
    wanted = set(served if asked is None else asked)
    for name in wanted:
        if name not in served:
            raise UnknownNameError(f"fields: no field {name!r} is served; {closest(name, served)}")
    if not wanted:
        raise IncompatibleOptionsError("fields: expected at least one field to pack, found none")
    for name in [*wanted]:
        value = declaration.fields[name]
        if isinstance(value, Variant) and value.of not in wanted:
            if value.of in served:
                raise IncompatibleOptionsError(
                    f"fields: {name} is the variant that is drawn for {value.of}; pack both, or neither"
                )
            wanted.add(value.of)
    if all(isinstance(declaration.fields[name], Variant) for name in wanted):
        raise IncompatibleOptionsError("fields: expected a field with values, found none")
    return [name for name in declaration.fields if name in wanted]


def alone(declaration: Declaration, name: str) -> Declaration:
    """A declaration of one field alone, with the fields that it names substituted."""
    value, expanded = declaration.fields[name], declaration.expanded(name)
    if isinstance(value, Choice):
        only: Field | Choice = replace(value, rows=str(expanded))
        return Declaration({"field": only}, declaration.splits)
    assert isinstance(value, Field)
    assert isinstance(expanded, Lookup)
    return Declaration({"field": replace(value, lookup=expanded)}, declaration.splits)


def columns_of(
    declaration: Declaration,
    tensors: Mapping[str, object],
    split: str | None,
    fields: Sequence[str],
    dtype: torch.dtype | None,
    names: Names,
) -> list[Column]:
    """The columns of a split's samples.

    Args:
        declaration: what the samples read.
        tensors: the stored tensors.
        split: the split.
        fields: what is packed, see :func:`packed_fields`.
        dtype: what floating values of more than one number a sample are narrowed to.
        names: of the packed dataset; the fields' are taken.
    """
    found: list[Column] = []
    for name in fields:
        value = declaration.fields[name]
        if isinstance(value, Variant):
            continue
        graph = build_graph(alone(declaration, name), tensors, split)  # type: ignore[arg-type]
        node = graph.nodes[graph.outputs[0].node]
        for variant, source in enumerate(node.tensors, start=1 if node.choice else 0):
            stored = f"{name}.values" if node.ragged else name
            if node.choice:
                stored = names.take(source, f"{name}_{variant}")
            wanted = narrowed(node.dtype, dtype if node.shape else None)
            lead = math.prod(node.lead)
            found.append(Column(stored, name, variant, source, node.dtype, wanted, node.shape, lead, node.ragged))
    return found


def declaration_of(
    declaration: Declaration,
    fields: Sequence[str],
    columns: Sequence[Column],
    splits: Mapping[str, str],
    key: str,
    graph: SampleGraph,
) -> Declaration:
    """What a packed sample reads.

    Args:
        declaration: what it was packed from.
        fields: what is packed.
        columns: the columns.
        splits: name of each split to the tensor that lists its rows.
        key: name of the tensor that holds the number that each row's variant is drawn by.
        graph: of the source, for the dtypes that fields are served in.
    """
    made: dict[str, Field | Choice | Variant] = {}
    served = {out.key: out.dtype for out in graph.outputs}
    for name in fields:
        value = declaration.fields[name]
        if isinstance(value, Variant):
            made[name] = value
        elif isinstance(value, Choice):
            tensors = tuple(column.name for column in columns if column.field == name)
            unwritten = callable(value.probabilities)
            probabilities = Unwritten() if unwritten else value.probabilities
            made[name] = Choice(tensors, probabilities, ROW, value.planned if unwritten else None, key)
        else:
            column = next(column for column in columns if column.field == name)
            widened = served[name] if served[name] != column.stored else None
            made[name] = Field(Lookup(name, ROW), widened)
    return Declaration(made, dict(splits))
