"""What is packed and where it lies, decided before anything is written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from jasper_store.files.fingerprint import FileFingerprint
from jasper_store.packing.columns import ORIGIN, Column, Names, columns_of, declaration_of, packed_fields
from jasper_store.packing.layout import IndexTensor, Layout, block_shape, lay_out
from jasper_store.packing.split_rows import SplitRows
from jasper_store.packing.writer import Blocks
from jasper_store.samples.declaration import CONFIG_KEY, Choice
from jasper_store.samples.packed import PACKED_KEY, Packed
from jasper_store.store.manifest import SourceFile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from jasper_store.samples.dataset import Dataset

__all__ = ["INDEX_STEP", "Index", "Options", "Work", "plan"]

INDEX_STEP: Final = 1 << 18
"""Rows of the tensors that are not in blocks, made and written at a time."""
_INT32_END: Final = 1 << 31


@dataclass(frozen=True)
class Index:
    """A tensor that is not in blocks, and how its values are made.

    Attributes:
        tensor: what it is.
        values: its values from a row up to another one.
    """

    tensor: IndexTensor
    values: Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class Work:
    """What is to be written.

    Attributes:
        splits: the samples of each split, in the order of their blocks.
        names: name of each split in the packed dataset to the tensor that lists its rows; none without splits.
        packed: what the configuration says.
        columns: the columns that are written.
        layout: where they lie.
        index: the tensors that are not in blocks.
        config: the whole configuration.
    """

    splits: list[Blocks]
    names: Mapping[str, str]
    packed: Packed
    columns: list[Column]
    layout: Layout
    index: list[Index]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Options:
    """What the caller asked for."""

    target: Path
    fields: Sequence[str] | None
    dtype: torch.dtype | None
    seed: int
    kind: str
    config: Mapping[str, Any]
    progress: Callable[[str, int, int], None] | None
    overwrite: bool


def plan(sources: Mapping[str, Dataset], options: Options) -> Work:
    """Decide what is written where; reads ragged lengths, and no other data."""
    first = next(iter(sources.values()))
    declaration, store = first.graph.declaration, first.store
    fields = packed_fields(declaration, options.fields)
    taken = [*fields, ORIGIN, *(f"{name}.{part}" for name in fields for part in ("values", "offsets"))]
    names = Names(taken)
    columns = columns_of(declaration, store, first.split, fields, options.dtype, names)
    listed = {}
    if first.split is not None:
        listed = {name: names.take(declaration.splits[name], f"{name}_rows") for name in sources}
    samples = sum(len(dataset) for dataset in sources.values())
    splits = {name: SplitRows(dataset, options.seed) for name, dataset in sources.items()}
    lengths = {
        column.field: np.concatenate([_lengths(each, column.field) for each in splits.values()])
        for column in columns
        if column.ragged
    }
    mean = {name: float(found.mean()) if len(found) else 0.0 for name, found in lengths.items()}
    sample_nbytes = sum(column.row_nbytes * mean.get(column.field, 1.0) for column in columns)
    shape = block_shape(samples, round(sample_nbytes))
    blocks = _blocks(splits, shape.block)
    counts = _counts(columns, blocks, shape.block, lengths)
    index, key = _index(splits, listed, columns, lengths, declaration.fields, names)
    layout = lay_out(columns, counts, [each.tensor for each in index])
    files = tuple(_source_files(sources, options.target))
    packed = Packed(
        *(options.kind, shape.block, shape.window, options.seed),
        None if options.dtype is None else str(options.dtype).removeprefix("torch."),
        ORIGIN,
        _relative(store.path, options.target),
        {name: dataset.fingerprint() for name, dataset in sources.items()},
        files,
        {column.name: column.of for column in columns},
    )
    made = declaration_of(declaration, fields, columns, listed, key, first.graph)
    config = {**options.config, CONFIG_KEY: made.to_config(), PACKED_KEY: packed.to_config()}
    return Work(blocks, listed, packed, columns, layout, index, config)


def _blocks(splits: Mapping[str, SplitRows], block: int) -> list[Blocks]:
    found, first = [], 0
    for each in splits.values():
        count = -(-each.samples // block)
        found.append(Blocks(each, first, count))
        first += count
    return found


def _counts(
    columns: Sequence[Column], splits: Sequence[Blocks], block: int, lengths: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Rows of each column in each block."""
    samples = np.concatenate(
        [
            np.full(each.n_blocks, block, np.int64)
            - _missing(each, block) * (np.arange(each.n_blocks) == each.n_blocks - 1)
            for each in splits
        ]
    )
    ends = np.concatenate([[0], samples.cumsum()])
    counts = np.tile(samples, (len(columns), 1))
    for number, column in enumerate(columns):
        if column.ragged:
            sums = np.concatenate([[0], lengths[column.field].cumsum()])
            counts[number] = np.diff(sums[ends])
    return counts


def _missing(each: Blocks, block: int) -> int:
    return each.n_blocks * block - each.split.samples


def _lengths(split: SplitRows, field: str) -> np.ndarray:
    """Rows of each packed sample of a ragged field, int64 [samples]."""
    found = [np.zeros(0, np.int64)]
    for start in range(0, split.samples, INDEX_STEP):
        offsets = split.field(field, start, min(start + INDEX_STEP, split.samples)).offsets
        assert offsets is not None
        found.append(offsets.diff().numpy())
    return np.concatenate(found)


def _index(
    splits: Mapping[str, SplitRows],
    listed: Mapping[str, str],
    columns: Sequence[Column],
    lengths: Mapping[str, np.ndarray],
    fields: Mapping[str, Any],
    names: Names,
) -> tuple[list[Index], str]:
    """The tensors that are not in blocks; and the name of the one that variants are drawn by."""
    total = sum(each.samples for each in splits.values())
    number = torch.int32 if total < _INT32_END else torch.int64
    found, first = [], 0
    for name, each in splits.items():
        if name in listed:
            tensor = IndexTensor(listed[name], number, each.samples)
            found.append(Index(tensor, partial(_arange, first)))
        first += each.samples
    origins = IndexTensor(ORIGIN, torch.int64, total)
    found.append(Index(origins, lambda start, stop: _across(splits, SplitRows.origins, start, stop)))
    key = ORIGIN
    choice = next((name for name in dict.fromkeys(c.field for c in columns) if isinstance(fields[name], Choice)), None)
    if choice is not None and not (fields[choice].rows == "row" and fields[choice].key is None):
        key = names.take(f"{choice}_key", f"{choice}_key")

        def numbers(split: SplitRows, start: int, stop: int) -> torch.Tensor:
            return split.numbers(choice, start, stop)

        drawn = IndexTensor(key, torch.int64, total)
        found.append(Index(drawn, lambda start, stop: _across(splits, numbers, start, stop)))
    for name, counts in lengths.items():
        ends = torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int64))
        tensor = IndexTensor(f"{name}.offsets", torch.int64, len(ends))
        found.append(Index(tensor, partial(_part_of, ends)))
    return found, key


def _arange(first: int, start: int, stop: int) -> torch.Tensor:
    return torch.arange(first + start, first + stop)


def _part_of(values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return values[start:stop]


def _across(
    splits: Mapping[str, SplitRows], make: Callable[[SplitRows, int, int], torch.Tensor], start: int, stop: int
) -> torch.Tensor:
    """Values of packed samples ``start`` to ``stop``, counted over all splits."""
    found, first = [torch.empty(0, dtype=torch.int64)], 0
    for each in splits.values():
        low, high = max(start - first, 0), min(stop - first, each.samples)
        if low < high:
            found.append(make(each, low, high))
        first += each.samples
    return torch.cat(found)


def _source_files(sources: Mapping[str, Dataset], target: Path) -> list[SourceFile]:
    """The files that samples are read from, as they are now."""
    paths: dict[Path, None] = {}
    for dataset in sources.values():
        for node in dataset.graph.nodes:
            for name in node.tensors:
                paths |= dict.fromkeys(dataset.store[name].spec.paths)
    return [SourceFile(_relative(path, target), FileFingerprint.of(path)) for path in paths]


def _relative(path: Path, target: Path) -> str:
    """A path as seen from the packed dataset's directory."""
    try:
        return Path(os.path.relpath(os.path.realpath(path), os.path.realpath(target))).as_posix()
    except ValueError:  # another drive
        return Path(os.path.realpath(path)).as_posix()
