"""Rows by their string id, and ids by their row, for tens of millions of ids without a Python object for each.

Ids are a text (:mod:`jasper_store.formats.texts`): UTF-8 bytes, where each begins, and the ascending hashes with their
rows. A lookup searches the hashes of a batch at once, and compares the strings of what it finds, so that two ids of one
hash are told apart. All four tensors may be mapped. Where the hashes are missing, or are those of other strings,
they are computed once, in 16 bytes of memory for each id.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jasper_store.errors import IncompatibleOptionsError, InsufficientMemoryError, IntegrityError, UnknownNameError
from jasper_store.formats.texts import encode, hash_block, sort_hashes
from jasper_store.memory.budget import format_bytes, measure
from jasper_store.store.rows import as_rows, require_in_range

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from jasper_store.store.rows import Rows
    from jasper_store.store.tensors import StoredTensor

    _Ints = NDArray[np.int64]
    _Bytes = NDArray[np.uint8]

__all__ = ["Ids"]

_IDS_AT_ONCE = 1 << 14
_BYTES_AT_ONCE = 8 << 20
_PAIRS_AT_ONCE = 1 << 20  # of an id that is looked for and a row whose id has its hash
_LONGEST = 1 << 30  # bytes of one id; what claims to be longer is damaged, and would take as much memory
_SORTING_NBYTES = 32  # for each id: its hash and row, before and after sorting
_SAMPLED = 64  # hashes that are compared with the strings before all are trusted
_SHOWN = 5


class Ids:
    """The string ids of a dataset's rows. Safe for concurrent use; pickles through its store.

    Attributes:
        name: base name of the tensors that hold them.
    """

    def __init__(
        self,
        name: str,
        values: StoredTensor,
        offsets: StoredTensor,
        hashes: StoredTensor | None = None,
        order: StoredTensor | None = None,
    ) -> None:
        """Ids of a text; without ``hashes`` and ``order`` they are computed by the first lookup.

        Raises:
            IntegrityError: the offsets do not end where the values do.
        """
        self.name = name
        self._values = values
        self._offsets = offsets
        self._stored = None if hashes is None or order is None else (hashes, order)
        self._index: tuple[NDArray[np.uint64], _Ints] | None = None
        end = int(offsets[-1])
        if end != values.n_rows:
            raise self._damaged(f"the last id ends at byte {end} of {values.n_rows}")

    def __len__(self) -> int:
        return self._offsets.n_rows - 1

    def __repr__(self) -> str:
        return f"Ids({self.name!r}, {len(self):,} ids)"

    def __reduce__(self) -> tuple[Any, ...]:
        return Ids, (self.name, self._values, self._offsets, *(self._stored or ()))

    def rows(self, ids: Sequence[str]) -> torch.Tensor:
        """The row of each id.

        Args:
            ids: strings, in any order, repeats allowed; a list, a tuple, an array.

        Returns:
            int64 [len(ids)], in host memory, owned.

        Raises:
            UnknownNameError: ids that are not there; names the first of them.
            IntegrityError: an id that several rows have, with these rows; what is no string; or damaged files.
            IncompatibleOptionsError: one string, where several are expected.
            InsufficientMemoryError: the hashes have to be computed, and there is no memory for them.
            ClosedError: the store was closed.
        """
        if isinstance(ids, str):
            msg = f"{self.name}: expected a list of ids, found one text, {ids!r:.60}; pass it in a list"
            raise IncompatibleOptionsError(msg, tensor=self.name)
        found = np.empty(len(ids), dtype=np.int64)
        for start in range(0, len(ids), _IDS_AT_ONCE):
            block = list(ids[start : start + _IDS_AT_ONCE])
            found[start : start + len(block)] = self._look_up(block, start)
        if (found < 0).any():
            raise self._unknown(ids, np.flatnonzero(found < 0))
        return torch.from_numpy(found)

    def of(self, rows: Rows) -> list[str]:
        """The id of each row.

        Args:
            rows: 1-D int64 tensor, or what ``take`` accepts besides; repeats allowed, none negative.

        Raises:
            IndexError: a row that does not exist; names its position.
            IntegrityError: the files are damaged.
            ClosedError: the store was closed.
        """
        wanted = as_rows(rows, self.name).cpu()
        require_in_range(wanted, len(self), self.name)
        found: list[str] = []
        every = wanted.numpy()
        for start in range(0, len(every), _IDS_AT_ONCE):
            block = every[start : start + _IDS_AT_ONCE]
            for some, values, ends in self._read(block, *self._bounds(block)):
                raw, begin = values.tobytes(), 0
                for row, end in zip(some.tolist(), ends.tolist(), strict=True):
                    found.append(self._decode(raw[begin:end], row))
                    begin = end
        return found

    # ---- strings

    def _decode(self, raw: bytes, row: int) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as exc:
            raise self._damaged(f"row {row} is no UTF-8") from exc

    def _bounds(self, rows: _Ints) -> tuple[_Ints, _Ints]:
        """First byte of the ids of rows, and their lengths."""
        starts = _host(self._offsets.take(torch.from_numpy(rows)))
        lengths = _host(self._offsets.take(torch.from_numpy(rows + 1))) - starts
        bad = (starts < 0) | (lengths < 0) | (starts + lengths > self._values.n_rows)
        bad |= lengths > _LONGEST
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise self._damaged(f"row {int(rows[at])} is said to be {int(lengths[at])} bytes from {int(starts[at])}")
        return starts, lengths

    def _read(self, rows: _Ints, starts: _Ints, lengths: _Ints) -> Iterator[tuple[_Ints, _Bytes, _Ints]]:
        """Some of the rows, their bytes one after another, and where each ends in these; some megabytes at a time."""
        ends = np.cumsum(lengths)
        first, before = 0, 0
        while first < len(rows):
            last = max(int(np.searchsorted(ends, before + _BYTES_AT_ONCE, side="right")), first + 1)
            relative = ends[first:last] - before
            total = int(relative[-1])
            begins = starts[first:last] - (relative - lengths[first:last])
            if (begins == begins[0]).all():  # one run of bytes, as one row always is
                values = self._values[int(begins[0]) : int(begins[0]) + total]
            else:
                values = self._values.take(torch.from_numpy(np.repeat(begins, lengths[first:last]) + np.arange(total)))
            yield rows[first:last], _host(values), relative
            first, before = last, int(ends[last - 1])

    # ---- lookups

    def _look_up(self, ids: list[str], position: int) -> _Ints:
        """Row of each id, -1 for one that is not there."""
        values, lengths = encode(self.name, ids, position)
        hashes, order = self._sorted()
        wanted = hash_block(values, lengths)
        left = np.searchsorted(hashes, wanted, side="left")
        counts = np.searchsorted(hashes, wanted, side="right") - left
        found = np.full(len(ids), -1, dtype=np.int64)
        ends = np.cumsum(lengths)
        pairs = np.cumsum(counts)
        for begin in range(0, int(pairs[-1]), _PAIRS_AT_ONCE):
            # Pairs are numbered id by id; these are the numbers of some, and the id that each is of.
            number = np.arange(begin, min(begin + _PAIRS_AT_ONCE, int(pairs[-1])))
            which = np.searchsorted(pairs, number, side="right")
            at = left[which] + number - (pairs[which] - counts[which])
            rows = order[at].astype(np.int64)
            equal = self._equal(rows, values, ends[which] - lengths[which], lengths[which])
            which, rows = which[equal], rows[equal]
            again = np.flatnonzero((found[which] >= 0) | (np.diff(which, prepend=-1) == 0))
            if len(again):
                raise self._repeated(ids[which[again[0]]], int(which[again[0]]), found, which, rows)
            found[which] = rows
        return found

    def _equal(self, rows: _Ints, values: _Bytes, starts: _Ints, lengths: _Ints) -> NDArray[np.bool_]:
        """Whether the id of each row is the string of ``lengths`` bytes at ``starts`` in ``values``."""
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise self._damaged(f"its hashes name a row outside of [0, {len(self)})")
        begins, found = self._bounds(rows)
        equal: NDArray[np.bool_] = found == lengths
        chosen, done = np.flatnonzero(equal), 0
        for some, stored, ends in self._read(rows[chosen], begins[chosen], lengths[chosen]):
            here = chosen[done : done + len(some)]
            sizes = lengths[here]
            places = np.repeat(starts[here] - (ends - sizes), sizes) + np.arange(int(ends[-1]))
            differs = np.add.reduceat(np.append(values[places] != stored, False).astype(np.int64), ends - sizes)
            equal[here] = (differs == 0) | (sizes == 0)
            done += len(some)
        return equal

    def _sorted(self) -> tuple[NDArray[np.uint64], _Ints]:
        """Ascending hashes and their rows: the stored ones, if they are those of these strings."""
        if self._index is None:
            self._index = self._trusted() or self._computed()
        return self._index

    def _trusted(self) -> tuple[NDArray[np.uint64], _Ints] | None:
        if self._stored is None or any(tensor.shape != (len(self),) for tensor in self._stored):
            return None
        if (self._stored[0].dtype, self._stored[1].dtype) != (torch.uint64, torch.int64):
            return None
        hashes, order = (_host(tensor.tensor()) for tensor in self._stored)
        if (hashes[1:] < hashes[:-1]).any():
            # Of appended parts, each ascending. Sorting such runs takes less time than hashing, and as much memory.
            self._require_memory()
            ascending = np.argsort(hashes, kind="stable")
            hashes, order = hashes[ascending], order[ascending]
        sample = np.linspace(0, max(len(self) - 1, 0), min(_SAMPLED, len(self)), dtype=np.int64)
        rows = order[sample]
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            return None
        starts, lengths = self._bounds(rows)
        for _, values, ends in self._read(rows, starts, lengths):
            found = hash_block(values, np.diff(ends, prepend=0))
            if not np.array_equal(found, hashes[sample[: len(found)]]):
                return None
            sample = sample[len(found) :]
        return hashes, order

    def _require_memory(self) -> None:
        needed = _SORTING_NBYTES * len(self)
        if needed > (available := measure().nbytes):
            msg = (
                f"{self.name}: the hashes of {len(self):,} ids are not there in one order, and sorting them takes "
                f"{format_bytes(needed)} of {format_bytes(available)}; convert the dataset where there is more memory"
            )
            raise InsufficientMemoryError(
                msg, path=self._values.path, tensor=self.name, needed=needed, available=available
            )

    def _computed(self) -> tuple[NDArray[np.uint64], _Ints]:
        self._require_memory()
        blocks = []
        for start in range(0, len(self), _IDS_AT_ONCE):
            rows = np.arange(start, min(start + _IDS_AT_ONCE, len(self)))
            starts, lengths = self._bounds(rows)
            blocks += [
                hash_block(values, np.diff(ends, prepend=0)) for _, values, ends in self._read(rows, starts, lengths)
            ]
        return sort_hashes(blocks)

    # ---- what is wrong

    def _unknown(self, ids: Sequence[str], missing: _Ints) -> UnknownNameError:
        shown = ", ".join(f"{str(ids[i])!r:.60}" for i in missing[:_SHOWN].tolist())
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        msg = (
            f"{self.name}: expected ids that are among its {len(self):,}, found {shown}{more}, the first at position "
            f"{int(missing[0])} of {len(ids)}; leave them out, or write them to the dataset"
        )
        return UnknownNameError(msg, path=self._values.path, tensor=self.name)

    def _repeated(self, text: str, which: int, found: _Ints, places: _Ints, rows: _Ints) -> IntegrityError:
        known = [int(found[which])] if found[which] >= 0 else []
        shared = [*known, *rows[places == which][: _SHOWN + 1].tolist()]
        shown = ", ".join(map(str, shared[:_SHOWN])) + (", ..." if len(shared) > _SHOWN else "")
        msg = (
            f"{self.name}: expected one row with the id {text!r:.60}, found several: {shown}; write the dataset with each "
            "id once, or look up rows by number"
        )
        return IntegrityError(msg, path=self._values.path, tensor=self.name)

    def _damaged(self, what: str) -> IntegrityError:
        msg = f"{self.name}: expected UTF-8 strings and where each begins, found that {what}; convert the dataset again"
        return IntegrityError(msg, path=self._values.path, tensor=self.name)


def _host(tensor: torch.Tensor) -> Any:
    """A tensor, wherever it is, as an array in host memory."""
    return tensor.cpu().numpy()
