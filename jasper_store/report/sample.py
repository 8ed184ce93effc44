"""What a sample of a dataset reads, as plain values: fields, lookups, rows and bytes. Headers are read and no data.

All of it is derived from the sample graph; a dataset that says nothing of its samples has those that ``Dataset`` would
serve without a declaration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from jasper_store.errors import DeclarationError, UnknownNameError
from jasper_store.formats.base import TensorSpec
from jasper_store.jasper.config import read_config
from jasper_store.jasper.integrity import require_structure
from jasper_store.jasper.recognise import is_jasper, known_at
from jasper_store.samples.compiler import build_graph
from jasper_store.samples.declaration import CONFIG_KEY, Declaration, everything
from jasper_store.samples.graph import Node, SampleGraph
from jasper_store.samples.opened import CONFIG_NAME, declaration_at

__all__ = ["FieldRow", "LookupRow", "ReadRow", "SampleView", "look_at_samples"]


@dataclass(frozen=True, slots=True)
class FieldRow:
    """One field of a batch.

    Attributes:
        name: its key.
        dtype: what it is served as, without ``torch.``.
        shape: sizes for one sample; the first is ``None`` where it differs from sample to sample.
        expression: what it is read by, as it was declared.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    expression: str

    @property
    def shape_text(self) -> str:
        """The shape as people read it."""
        return f"[{', '.join('...' if size is None else str(size) for size in self.shape)}]"

    @property
    def described(self) -> str:
        """Dtype and shape, the latter where it is not that of one number."""
        return f"{self.dtype} {self.shape_text}" if self.shape else self.dtype


@dataclass(frozen=True, slots=True)
class LookupRow:
    """One lookup: a node of the sample graph.

    Attributes:
        tensors: what is looked up in; more than one only for a choice.
        parent: number of the lookup whose values name the rows; -1 where the position of the sample does.
        by_column: which column of the parent names them; ``None`` is all of them.
        column: which column is read; ``None`` is the whole row.
        rows: rows that one sample names; ``None`` where it differs.
        dtype: as it is stored, without ``torch.``.
        row_shape: sizes of what is read of a row.
        fields: names of the fields that are read by it.
    """

    tensors: tuple[str, ...]
    parent: int
    by_column: int | None
    column: int | None
    rows: int | None
    dtype: str
    row_shape: tuple[int, ...]
    fields: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReadRow:
    """What a sample reads of one tensor, on average."""

    tensor: str
    rows: float
    nbytes: float


@dataclass(frozen=True, slots=True)
class SampleView:
    """What a sample reads.

    Attributes:
        declared: whether the dataset says so itself, or every tensor is a field.
        split: the split that this was looked at in; ``None`` is all rows.
        splits: samples of each split.
        length: samples in the split.
        nbytes: of one sample in a batch.
        fields: of a batch, in its order.
        lookups: each after those whose values it needs.
        reads: of the tensors that a sample reads.
    """

    declared: bool
    split: str | None
    splits: Mapping[str, int]
    length: int
    nbytes: int
    fields: tuple[FieldRow, ...]
    lookups: tuple[LookupRow, ...]
    reads: tuple[ReadRow, ...]

    @property
    def rows_read(self) -> float:
        """Rows that a sample reads, of all tensors."""
        return sum(row.rows for row in self.reads)

    @property
    def nbytes_read(self) -> float:
        """Bytes that a sample reads, of all tensors."""
        return sum(row.nbytes for row in self.reads)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "rows_read": self.rows_read, "nbytes_read": self.nbytes_read}


def look_at_samples(path: Path, specs: Iterable[TensorSpec]) -> SampleView:
    """What a sample of a dataset reads.

    Args:
        path: the directory, or the file.
        specs: the tensors that are there.

    Raises:
        UnknownNameError: the declaration names tensors that are not there; the message names all of them.
        DeclarationError: it cannot be understood, or does not fit the tensors; nothing is declared, and the tensors
            have no common number of rows.
        DatasetNotFoundError, IntegrityError: a JASPER dataset lacks tensors, or their shapes are wrong.
    """
    tensors = {spec.name: spec for spec in specs}
    if is_jasper(path):
        known, there = _jasper(path, tensors)
        return _view(build_graph(known, tensors, there[0]), tensors, there, declared=True)
    declaration = declaration_at(path)
    if declaration is None:
        return _view(build_graph(everything(list(tensors.values())), tensors), tensors, [], declared=False)
    config = (path if path.is_dir() else path.parent) / CONFIG_NAME
    try:
        graphs = [build_graph(declaration, tensors, split) for split in declaration.parts]
    except DeclarationError as exc:
        raise DeclarationError(f'{config}, "{CONFIG_KEY}": {exc}', path=config) from exc
    except UnknownNameError as exc:
        raise UnknownNameError(f'{config}, "{CONFIG_KEY}": {exc}', path=config) from exc
    return _view(graphs[0], tensors, declaration.splits, declared=True)


def _jasper(path: Path, tensors: Mapping[str, TensorSpec]) -> tuple[Declaration, list[str]]:
    """What samples of a JASPER dataset read, and the splits that are there."""
    declaration = known_at(path).declaration
    assert declaration is not None
    there = require_structure(tensors, read_config(path), path)
    return declaration, [*there]


def _view(
    graph: SampleGraph, tensors: Mapping[str, TensorSpec], splits: Iterable[str], *, declared: bool
) -> SampleView:
    declaration = graph.declaration
    fields = tuple(
        FieldRow(out.key, _word(out.dtype), _shape(graph, out.node, graph.shape_of(out)), declaration.text_of(out.key))
        for out in graph.outputs
    )
    reads = tuple(
        ReadRow(name, rows, rows * tensors[name].nbytes / max(tensors[name].n_rows, 1))
        for name, rows in graph.reads.items()
        if rows and _is_read(graph, name)
    )
    return SampleView(
        declared=declared,
        split=graph.split,
        splits={split: tensors[declaration.splits[split]].n_rows for split in splits},
        length=graph.length,
        nbytes=graph.sample_nbytes,
        fields=fields,
        lookups=tuple(_lookup(graph, number, node) for number, node in enumerate(graph.nodes)),
        reads=reads,
    )


def _is_read(graph: SampleGraph, name: str) -> bool:
    return any(name in node.tensors for node in graph.nodes)


def _shape(graph: SampleGraph, number: int, sizes: tuple[int, ...]) -> tuple[int | None, ...]:
    return (None, *sizes) if graph.nodes[number].ragged else sizes


def _lookup(graph: SampleGraph, number: int, node: Node) -> LookupRow:
    rows = 1
    for size in node.lead:
        rows *= size
    return LookupRow(
        tensors=node.tensors,
        parent=node.rows.node,
        by_column=node.rows.column,
        column=node.column,
        rows=None if node.ragged and not node.span else rows,
        dtype=_word(node.dtype),
        row_shape=node.row_shape,
        fields=tuple(out.key for out in graph.outputs if out.node == number),
    )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
