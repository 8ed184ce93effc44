"""Columns of blocks, brought from the source and written: an external join in memory of a given size.

Columns are written one after the other, each in as few passes over its source as memory allows. A pass takes the rows
that some blocks need: see :mod:`jasper_store.packing.source_rows`. A source of which many rows are wanted is read once and
held, if two thirds of the memory hold it. While a pass is written the next one is read, where both fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from jasper_store.conversion.narrow import Narrowing
from jasper_store.packing.source_rows import RowsInMemory, is_resident, pays_whole, read_rows, read_whole

if TYPE_CHECKING:
    from jasper_store.packing.block_file import BlockFiles
    from jasper_store.packing.columns import Column
    from jasper_store.packing.layout import Layout
    from jasper_store.packing.progress import Progress
    from jasper_store.packing.split_rows import FieldRows, SplitRows
    from jasper_store.store.tensors import StoredTensor

__all__ = ["Blocks", "ColumnWriter"]

_INDEX_NBYTES: Final = 32
"""Bytes of a row's number in its list, sorted, and as what is sorted."""
_HELD: Final = 2 / 3
"""Share of the memory that a source may take that is read whole; what is left is for two passes, written and read."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of one split's samples.

    Attributes:
        split: the split's samples.
        first: number of its first block.
        n_blocks: how many it has.
    """

    split: SplitRows
    first: int
    n_blocks: int


@dataclass(frozen=True)
class _Pass:
    """Some blocks of a group of columns.

    Attributes:
        group: number of the group.
        blocks: of one split.
        start: its first block, counted from the split's first.
        stop: the block after its last.
    """

    group: int
    blocks: Blocks
    start: int
    stop: int

    def key(self, layout: Layout) -> str:
        names = ",".join(layout.columns[number].name for number in layout.groups[self.group])
        return f"{names} {self.blocks.first + self.start} {self.blocks.first + self.stop}"


class ColumnWriter:
    """Writes the columns of a layout.

    Args:
        layout: where they lie.
        splits: their samples, in the order of the blocks.
        block: samples per block.
        files: the files.
        room: bytes of memory for rows.
        advance: called with the name of a column and the bytes of it that were written.

    Attributes:
        checksums: xxh3-128 of each column's values in each block, by the column's name.
        max_error: of columns that are narrowed, by name.
        nbytes_read: bytes of rows that were read.
    """

    def __init__(
        self,
        layout: Layout,
        splits: Sequence[Blocks],
        block: int,
        files: BlockFiles,
        room: int,
        advance: Callable[[str, int], None],
    ) -> None:
        self._layout, self._splits, self._block, self._files, self._advance = layout, splits, block, files, advance
        self._room = room
        self._kept: tuple[StoredTensor, torch.Tensor] | None = None
        self._narrowing = {
            column.name: Narrowing(column.name, column.dtype)
            for column in layout.columns
            if column.dtype != column.stored
        }
        self.checksums: dict[str, list[str]] = {column.name: [""] * layout.n_blocks for column in layout.columns}
        self.max_error: dict[str, float] = {}
        self.nbytes_read = 0
        self._counted: set[str] = set()

    def run(self, progress: Progress) -> None:
        """Write what is not written yet.

        Raises:
            IntegrityError: a value that the narrower dtype makes infinite.
            OSError: the disk could not take the data.
        """
        left = []
        for each in self._passes():
            known = progress.steps.get(each.key(self._layout))
            if known is None:
                left.append(each)
            else:
                self._take_over(each, known)
        with ThreadPoolExecutor(1, "jasper-pack-read") as reader:
            ahead: Future[list[RowsInMemory]] | None = None
            for each, following in itertools.zip_longest(left, left[1:]):
                rows = (ahead or reader.submit(self._read, each)).result()
                beside = following is not None and self._fit_together(each, following)
                ahead = reader.submit(self._read, following) if beside else None
                self._write(each, rows)
                del rows
                progress.done(each.key(self._layout), self._finish(each))

    # --- passes -----------------------------------------------------------------------------------------------

    def _passes(self) -> Iterator[_Pass]:
        """All passes: groups that read the same tensor follow each other. Does not depend on what is written already."""
        sources = [self._layout.columns[group[0]].source for group in self._layout.groups]
        for group in sorted(range(len(sources)), key=lambda number: (sources.index(sources[number]), number)):
            for blocks in self._splits:
                costs = self._costs(group, blocks)
                room = max(self._room - self._held_nbytes(group, blocks), 0) // 2
                start = 0
                while start < blocks.n_blocks:
                    reach = costs[start:].cumsum()
                    stop = start + max(1, int(np.searchsorted(reach, room, side="right")))
                    yield _Pass(group, blocks, start, stop)
                    start = stop

    def _is_held(self, number: int, blocks: Blocks) -> bool:
        """Whether the source of a column is in memory whole while the column's group is written."""
        tensor = self._tensor(blocks, self._layout.columns[number])
        (group,) = (at for at, columns in enumerate(self._layout.groups) if number in columns)
        room = int(self._room * _HELD) // len(self._sources(group))
        return is_resident(tensor) or pays_whole(tensor, int(self._wanted(number, blocks).sum()), room)

    def _held_nbytes(self, group: int, blocks: Blocks) -> int:
        """Memory that sources take that are read whole for a group of columns."""
        columns = self._layout.columns
        held = {
            columns[number].source: number for number in self._layout.groups[group] if self._is_held(number, blocks)
        }
        tensors = (self._tensor(blocks, columns[number]) for number in held.values())
        return sum(tensor.nbytes for tensor in tensors if not is_resident(tensor))

    def _fit_together(self, each: _Pass, following: _Pass) -> bool:
        """Whether one pass can be read while another is written."""
        taken = [
            int(self._costs(one.group, one.blocks)[one.start : one.stop].sum())
            + self._held_nbytes(one.group, one.blocks)
            for one in (each, following)
        ]
        first, second = (self._sources(one.group) for one in (each, following))
        # Of several sources only the last is kept.
        shared = self._held_nbytes(each.group, each.blocks) if first == second and len(first) == 1 else 0
        return sum(taken) - shared <= self._room

    def _sources(self, group: int) -> set[str]:
        return {self._layout.columns[number].source for number in self._layout.groups[group]}

    def _costs(self, group: int, blocks: Blocks) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Memory that the rows of each block take, int64 [blocks]."""
        found = np.zeros(blocks.n_blocks, np.int64)
        for number in self._layout.groups[group]:
            tensor = self._tensor(blocks, self._layout.columns[number])
            row_nbytes = 0 if self._is_held(number, blocks) else tensor.row_nbytes
            found += self._wanted(number, blocks) * (_INDEX_NBYTES + row_nbytes)
        return found

    def _wanted(self, number: int, blocks: Blocks) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Rows of the source that each block needs for a column."""
        counts = self._layout.counts[number, blocks.first : blocks.first + blocks.n_blocks]
        return counts * self._layout.columns[number].lead

    @staticmethod
    def _tensor(blocks: Blocks, column: Column) -> StoredTensor:
        return blocks.split.dataset.store[column.source]

    # --- reading ----------------------------------------------------------------------------------------------

    def _samples(self, each: _Pass) -> tuple[int, int]:
        return each.start * self._block, min(each.stop * self._block, each.blocks.split.samples)

    def _read(self, each: _Pass) -> list[RowsInMemory]:
        """The rows that a pass needs, of each of its columns."""
        if self._kept is not None and self._kept[0].name not in self._sources(each.group):
            self._kept = None
        rows: dict[str, FieldRows] = {}
        found = []
        for number in self._layout.groups[each.group]:
            column = self._layout.columns[number]
            if column.field not in rows:
                rows[column.field] = each.blocks.split.field(column.field, *self._samples(each))
            found.append(self._rows(each.blocks, number, rows[column.field].rows))
        return found

    def _rows(self, blocks: Blocks, number: int, index: torch.Tensor) -> RowsInMemory:
        column = self._layout.columns[number]
        tensor = self._tensor(blocks, column)
        if is_resident(tensor):
            # It was read when the source was opened.
            self.nbytes_read += 0 if tensor.name in self._counted else tensor.nbytes
            self._counted.add(tensor.name)
            return read_whole(tensor, index)
        if self._kept is not None and self._kept[0] is tensor:
            return read_whole(tensor, index, self._kept[1])
        if self._is_held(number, blocks):
            self._kept = None
            self.nbytes_read += tensor.nbytes
            found = read_whole(tensor, index)
            self._kept = (tensor, found.memory)
            return found
        found = read_rows(tensor, index)
        self.nbytes_read += found.memory.nbytes
        return found

    # --- writing ----------------------------------------------------------------------------------------------

    def _write(self, each: _Pass, rows: Sequence[RowsInMemory]) -> None:
        layout, group = self._layout, self._layout.groups[each.group]
        done = dict.fromkeys(group, 0)
        for block in range(each.blocks.first + each.start, each.blocks.first + each.stop):
            begin, nbytes = int(layout.begins[each.group, block]), int(layout.nbytes[each.group, block])
            memory, target = self._files.buffer(nbytes)
            pieces, end = [], 0
            for number, found in zip(group, rows, strict=True):
                count = int(layout.counts[number, block])
                first = int(layout.offsets[number, block]) - begin
                if end < first:
                    target[end:first].zero_()
                end = first + count * layout.columns[number].row_nbytes
                self._fill(each, number, found, done[number], count, target[first:end])
                done[number] += count
                pieces.append((first, end))
            if end < len(target):
                target[end:].zero_()
            del target
            self._files.write(block, int(layout.file_of[block]), begin, memory, nbytes, pieces)
            for number, (first, end) in zip(group, pieces, strict=True):
                self._advance(layout.columns[number].name, end - first)

    def _fill(
        self, each: _Pass, number: int, found: RowsInMemory, start: int, count: int, target: torch.Tensor
    ) -> None:
        """The values of some samples of a column, as bytes."""
        column = self._layout.columns[number]
        if not count or not column.row_nbytes:
            return
        entry = each.blocks.split.column(column.field)
        first, last = start * column.lead, (start + count) * column.lead
        if entry is None and column.dtype == column.stored:
            found.gather(first, last, target.view(last - first, -1))
            return
        tensor = self._tensor(each.blocks, column)
        raw = torch.empty((last - first, found.memory.shape[1]), dtype=torch.uint8)
        found.gather(first, last, raw)
        values = raw.view(-1).view(tensor.dtype).view(last - first, *tensor.row_shape)
        if entry is not None:
            values = values[:, entry]
        if column.dtype != column.stored:
            values = self._narrowing[column.name].cast(values, start)
        # Of one value torch calls any stride contiguous, so it is copied and not viewed.
        target.view(column.dtype).view(values.shape).copy_(values)

    def _finish(self, each: _Pass) -> dict[str, Any]:
        """Wait until a pass is on the disk; what has to be known of it."""
        group = self._layout.groups[each.group]
        for block, hashes in self._files.flush():
            for number, found in zip(group, hashes, strict=True):
                self.checksums[self._layout.columns[number].name][block] = found  # type: ignore[call-overload]
        names = [self._layout.columns[number].name for number in group]
        first, last = each.blocks.first + each.start, each.blocks.first + each.stop
        self.max_error |= {name: self._narrowing[name].max_error for name in names if name in self._narrowing}
        return {
            "checksums": {name: self.checksums[name][first:last] for name in names},
            "max_error": {name: self.max_error[name] for name in names if name in self.max_error},
        }

    def _take_over(self, each: _Pass, known: Mapping[str, Any]) -> None:
        """Results of a pass of an earlier run."""
        first, last = each.blocks.first + each.start, each.blocks.first + each.stop
        for name, found in known["checksums"].items():
            self.checksums[name][first:last] = found
        for name, error in known["max_error"].items():
            narrowing = self._narrowing[name]
            narrowing.max_error = self.max_error[name] = max(narrowing.max_error, error)
        for number in self._layout.groups[each.group]:
            column = self._layout.columns[number]
            rows = int(self._layout.counts[number, first:last].sum())
            self._advance(column.name, rows * column.row_nbytes)
