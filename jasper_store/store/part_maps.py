"""Maps of the files that the parts of a tensor lie in, made when a part is first read.

A process may have 65,530 maps by default, and a tensor may lie in 100,000 files. When too many are made, all are released
together; a reader that still uses some keeps these alive.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from jasper_store.errors import CorruptFileError
from jasper_store.native.parts import UNMAPPED, PartTable, PlacedParts
from jasper_store.paging import madvise
from jasper_store.paging.loose_map import LooseMap

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jasper_store.paging.madvise import Access

__all__ = ["MAX_MAPS", "PartMaps"]

MAX_MAPS: Final = 16_384
"""Files of one tensor that are mapped at once, a quarter of what Linux allows a process."""
_CHECK_EVERY: Final = 4


class _State:
    """The maps in use now. Only ever added to; replaced as a whole when it has become too large."""

    def __init__(self, table: PartTable) -> None:
        self.placed = PlacedParts(table, np.full(table.n_parts, UNMAPPED, np.int64))
        self.complete = False
        self.maps: dict[int, LooseMap] = {}
        self.all: list[LooseMap] = []  # a file that two threads map at the same time is here twice
        self.placed.keep = self.all  # its addresses are valid as long as the maps are


class PartMaps:
    """The files in which the parts of a tensor lie, mapped as they are needed.

    Safe for use by several threads, and without a lock, which a fork could leave held.

    Args:
        name: of the tensor, for errors.
        files: the files.
        file_of: number of its file, of each part, int64 [parts].
        offsets: byte offset of its first row, of each part, int64 [parts].
        starts: first row of each part, and the number of rows, int64 [parts + 1].
        row_nbytes: bytes of a row.

    Attributes:
        table: which rows are in which part.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        file_of: np.ndarray,
        offsets: np.ndarray,
        starts: np.ndarray,
        row_nbytes: int,
        *,
        max_maps: int = MAX_MAPS,
    ) -> None:
        self._name, self._files, self._file_of, self._offsets = name, files, file_of, offsets
        self._row_nbytes, self._max_maps = row_nbytes, max_maps
        self.table = PartTable(starts, row_nbytes)
        # Parts by file, so that mapping a file finds its parts at once.
        self._by_file = np.argsort(file_of, kind="stable")
        self._file_starts = np.searchsorted(file_of[self._by_file], np.arange(len(self._files) + 1))
        ends = offsets + np.diff(starts) * row_nbytes
        self._ends = np.maximum.reduceat(ends[self._by_file], self._file_starts[:-1])
        self._state = _State(self.table)
        self._access: Access = "normal"
        self._calls = 0

    def placed(self) -> PlacedParts | None:
        """Where all parts are, if all are mapped; it keeps the maps as long as it is held."""
        state = self._state
        return state.placed if state.complete else None

    def locate(self, rows: torch.Tensor) -> tuple[torch.Tensor, int, object]:
        """Address of each row, int64 [n].

        Args:
            rows: int64 [n] in host memory, of any stride.

        Returns:
            The addresses; the position of the first row that is out of range, or -1; and what keeps the addresses
            valid as long as it lives.

        Raises:
            CorruptFileError: a file is shorter than it was.
            DatasetNotFoundError, InsufficientMemoryError, IncompatibleOptionsError: a file cannot be mapped.
        """
        state = self._state
        addresses = torch.empty(rows.shape[0], dtype=torch.int64, device="cpu")
        found = state.placed.locate(rows, addresses)
        if found != -2:
            return addresses, found, state
        # The table is complete after this even if another thread releases maps meanwhile: `state` is ours.
        missing = rows[addresses == UNMAPPED].numpy()
        held = [state]
        for part in np.unique(self._file_of[self.table.parts_of(missing)]).tolist():
            state = self._with_map(part, state)
            if held[-1] is not state:
                held.append(state)
        if len(held) == 1:
            return addresses, state.placed.locate(rows, addresses), held
        # Maps were released in the middle: of each row the last address that was found.
        for each in held:
            again = torch.empty_like(addresses)
            each.placed.locate(rows, again)
            addresses = torch.where(again == UNMAPPED, addresses, again)
        return addresses, -1, held

    def mapped(self, part: int) -> tuple[LooseMap, int]:
        """The map of a part's file, which keeps the address valid, and the byte offset of the part in it."""
        number = int(self._file_of[part])
        state = self._state
        return state.maps.get(number) or self._with_map(number, state).maps[number], int(self._offsets[part])

    def path_at(self, address: int) -> Path:
        """The file that is mapped at an address; the first file where none is any more."""
        for fmap in list(self._state.all):
            if fmap.address <= address < fmap.address + fmap.nbytes:
                return fmap.path
        return self._files[0]

    def advise(self, access: Access) -> None:
        """Tell the kernel how all files will be accessed, those included that are mapped later."""
        self._access = access
        for fmap in list(self._state.all):
            madvise.advise(fmap.address, fmap.nbytes, access)

    def check_next(self) -> None:
        """Look whether the next one of the mapped files is as long as it was: at each fourth call, which takes 2 us.

        Raises:
            CorruptFileError: it was truncated.
        """
        self._calls += 1
        maps = self._state.all
        if self._calls % _CHECK_EVERY or not maps:
            return
        fmap = maps[self._calls // _CHECK_EVERY % len(maps)]
        try:
            facts = os.stat(fmap.name)  # noqa: PTH116 - at each gather: a path's own stat takes twice the time
        except OSError:
            return  # the name is gone; the mapped file is not
        if facts.st_ino == fmap.inode and facts.st_size < fmap.nbytes:
            self._refuse(fmap.path, fmap.nbytes, facts.st_size)

    def close(self) -> None:
        """Release all maps; readers that still use them keep them alive."""
        self._state = _State(self.table)

    def _with_map(self, number: int, state: _State) -> _State:
        """Map a file; the state that has it: the same, or a new one if this one was full."""
        if number in state.maps:
            return state
        fmap = LooseMap(self._files[number])
        if fmap.nbytes < self._ends[number]:
            self._refuse(fmap.path, int(self._ends[number]), fmap.nbytes)
        if self._access != "normal":
            madvise.advise(fmap.address, fmap.nbytes, self._access)
        if len(state.all) >= self._max_maps:
            state = self._state = _State(self.table)
        parts = self._by_file[self._file_starts[number] : self._file_starts[number + 1]]
        state.all.append(fmap)
        state.maps[number] = fmap
        state.placed.bases[parts] = fmap.address + self._offsets[parts] - self.table.starts[parts] * self._row_nbytes
        state.complete = len(state.maps) == len(self._files)
        return state

    def _refuse(self, path: Path, expected: int, found: int) -> None:
        msg = (
            f"{path}: a part of {self._name} needs {expected:,} bytes, found {found:,}: the file was truncated or is "
            "being rewritten in place; write a new file and rename it over the old one, then open the dataset again"
        )
        raise CorruptFileError(msg, path=path, tensor=self._name)
