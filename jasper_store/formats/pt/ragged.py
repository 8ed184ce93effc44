"""A pickled list of lists of ints, read straight into values and lengths.

Python's own lists would take ten times the memory of the values, and the general machine of
:mod:`jasper_store.formats.pt.unpickle` a microsecond per instruction. This reads the one form that picklers give
to lists of lists of ints; anything else makes it return ``None``, and the general machine takes over.

Instructions have no length of their own in front, so where one begins is known only once the one before it is read:
a microsecond of Python for each. But protocol 2, which ``torch.save`` writes, numbers the lists, one after the other,
in four bytes each. So where the rows begin can be guessed, all of them are then read side by side with numpy, and
each guess is proved by the row before it: that one ends just there. 200,000 rows of two ints take 31 ms instead of 270.
"""

from __future__ import annotations

from array import array
from typing import Any, Final

import numpy as np
import torch

__all__ = ["parse"]

_MARK, _LIST, _APPEND, _APPENDS, _STOP = b"(]ae."
_BYTE, _SHORT, _WORD, _LONG = b"KMJ\x8a"
_PUT, _LONG_PUT, _MEMOIZE = b"qr\x94"

_NUMBERED: Final = bytes((_LIST, _LONG_PUT))
_ROW_HEAD: Final = 6
"""Bytes of a list's instruction and of its number's."""
_WINDOW: Final = 512 << 10
"""Bytes that are read side by side: numpy's temporaries take some ten times as much."""
_STEP_COST: Final = 256
"""Values that could be read one by one in the time of numpy's calls for one step of all rows."""
_MIN_STEPS: Final = 64
_PADDING: Final = 8
"""Zeros behind a window, so that the longest instruction can be looked at from its last byte."""

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_Ints = np.ndarray[Any, np.dtype[np.int64]]
_WIDTHS: Final = np.zeros(256, dtype=np.int64)
_WIDTHS[[_BYTE, _SHORT, _WORD]] = 2, 3, 5


def parse(data: bytes) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Values and offsets (int64) of a pickled list of lists of ints, or ``None`` if it is anything else."""
    if data[:1] != b"\x80" or data[2:3] != b"]":
        return None
    try:
        found = _scan(data)
    except (IndexError, OverflowError):
        return None
    if found is None:
        return None
    values, lengths = (
        torch.frombuffer(a, dtype=torch.int64) if a else torch.empty(0, dtype=torch.int64) for a in found
    )
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return values, offsets


def _put(data: bytes, at: int) -> int:
    """Where the next instruction begins, after the pickler's note to remember a list (never recalled here)."""
    op = data[at]
    if op == _PUT:
        return at + 2
    if op == _LONG_PUT:
        return at + 5
    return at + 1 if op == _MEMOIZE else at


def _scan(data: bytes) -> tuple[array[int], array[int]] | None:
    values: array[int] = array("q")
    lengths: array[int] = array("q")
    at = _put(data, 3)
    marked = False
    waiting = 0  # rows that were made, and not yet appended to the outer list
    next_try = 0  # where rows are read side by side again
    skipped = _WINDOW
    while True:
        op = data[at]
        if marked and at >= next_try and data[at : at + 2] == _NUMBERED:
            start = at
            at, *found = _side_by_side(data, at)
            for numbers, more in zip((values, lengths), found, strict=True):
                numbers.frombytes(more.tobytes())
            # A look costs the whole window. One that found little is not followed by another before the window's end,
            # and one in a file where many found little only after twice as much.
            if at - start < min(_WINDOW, len(data) - start) // 8:
                next_try = start + skipped
                skipped *= 2
        if op == _LIST:
            before = len(values)
            at = _row(data, _put(data, at + 1), values)
            if at < 0:
                return None
            lengths.append(len(values) - before)
            waiting += 1
        elif op == _MARK and not marked and not waiting:
            marked = True
            at += 1
        elif (op == _APPENDS and marked) or (op == _APPEND and not marked and waiting == 1):
            marked, waiting = False, 0
            at += 1
        elif op == _STOP and not marked and not waiting and at == len(data) - 1:
            return values, lengths
        else:
            return None


def _row(data: bytes, at: int, values: array[int]) -> int:
    """Read one row's ints, and return where the next instruction begins; -1 if it holds anything else."""
    append = values.append
    marked = False
    waiting = 0
    while True:
        op = data[at]
        if op == _BYTE:
            append(data[at + 1])
            at += 2
        elif op == _SHORT:
            append(data[at + 1] | data[at + 2] << 8)
            at += 3
        elif op == _WORD:
            append(int.from_bytes(data[at + 1 : at + 5], "little", signed=True))
            at += 5
        elif op == _LONG:
            n = data[at + 1]
            append(int.from_bytes(data[at + 2 : at + 2 + n], "little", signed=True))
            at += 2 + n
        elif op == _MARK and not marked and not waiting:
            marked = True
            at += 1
            continue
        elif (op == _APPENDS and marked) or (op == _APPEND and not marked and waiting == 1):
            marked, waiting = False, 0
            at += 1
            continue
        else:
            return at if not marked and not waiting else -1
        waiting += 1


def _side_by_side(data: bytes, at: int) -> tuple[int, _Ints, _Ints]:
    """Read numbered rows, all at once, inside an outer list's mark.

    Args:
        data: the pickle.
        at: where a row begins that is numbered.

    Returns:
        Where the first row begins that was not read, and the values and the lengths of the rows before it.
    """
    size = min(_WINDOW, len(data) - at)
    window: _Bytes = np.zeros(size + _PADDING, dtype=np.uint8)
    window[:size] = np.frombuffer(data, dtype=np.uint8, count=size, offset=at)
    starts = _numbered(window)
    count = len(starts) - 1
    rows, values, ends = _read_rows(window, starts[:-1])
    # Between two rows lies nothing, or the end of a thousand that are appended together and the mark of the next.
    gaps = starts[1:] - ends
    joined = (gaps == 0) | ((gaps == 2) & (window[ends] == _APPENDS) & (window[ends + 1] == _MARK))
    proved = count if joined.all() else int(joined.argmin())
    kept = rows < proved
    lengths = np.bincount(rows[kept], minlength=proved)[:proved].astype(np.int64)
    return at + int(starts[proved]), values[kept], lengths


def _numbered(window: _Bytes) -> _Ints:
    """Where rows seem to begin: the first one, and those whose numbers count on from it, as far as they do."""
    found = np.flatnonzero((window[:-_ROW_HEAD] == _LIST) & (window[1 : 1 - _ROW_HEAD] == _LONG_PUT))
    numbers = _little_endian(window, found + 2, 4)
    places = numbers - numbers[0]
    known = (places >= 0) & (places < len(found))
    starts = np.zeros(len(found), dtype=np.int64)
    starts[places[known][::-1]] = found[known][::-1]  # of several with one number, the first
    rising = np.diff(starts) >= _ROW_HEAD
    return starts[: len(starts) if rising.all() else int(rising.argmin()) + 1]


def _read_rows(window: _Bytes, starts: _Ints) -> tuple[_Ints, _Ints, _Ints]:
    """Row number of each value, the values, in order, and where each row ends; whether it ends well is not known."""
    at = starts + _ROW_HEAD
    marked = window[at] == _MARK
    at += marked
    reading = np.arange(len(starts))
    rows, values = [], []
    # Rows of a sound pickle do not overlap, so together they have fewer values than the window has bytes. And a step
    # costs as much as many values: a few long rows are read faster one by one.
    budget, steps = len(window), max(_MIN_STEPS, len(window) // _STEP_COST)
    while len(reading) and budget > 0 and steps > 0:
        budget, steps = budget - len(reading), steps - 1
        ops = window[at[reading]]
        widths = _WIDTHS[ops]
        reading, widths, ops = reading[widths > 0], widths[widths > 0], ops[widths > 0]
        places = at[reading] + 1
        numbers = np.empty(len(reading), dtype=np.int64)
        for op, width in ((_BYTE, 1), (_SHORT, 2), (_WORD, 4)):
            chosen = ops == op
            numbers[chosen] = _little_endian(window, places[chosen], width)
        rows.append(reading)
        values.append(numbers)
        at[reading] += widths
        # One that has no mark is appended by itself, and is the only one.
        reading = reading[marked[reading] & (at[reading] < len(window) - _PADDING)]
    nothing = np.empty(0, dtype=np.int64)
    unread = np.zeros(len(starts), dtype=bool)
    unread[reading] = True
    each = np.concatenate([nothing, *rows])
    counts = np.bincount(each, minlength=len(starts))
    ended = np.where(marked, window[at] == _APPENDS, (counts == 0) | (window[at] == _APPEND))
    at = np.where(ended & ~unread, at + (marked | (counts > 0)), 0)
    order = np.argsort(each, kind="stable")
    return each[order], np.concatenate([nothing, *values])[order], at


def _little_endian(window: _Bytes, places: _Ints, width: int) -> _Ints:
    """Numbers of 1, 2 or 4 bytes; those of 4 are signed, as the pickler's are."""
    numbers = np.zeros(len(places), dtype=np.int64)
    for byte in range(width):
        numbers |= window[places + byte].astype(np.int64) << (8 * byte)
    return numbers.astype(np.int32).astype(np.int64) if width == 4 else numbers
