"""A pickled list of lists of ints, read straight into values and lengths.

Python's own lists would take ten times the memory of the values, and the general machine of
:mod:`jasper_store.formats.pt_pickle` a microsecond per instruction. This reads the one form that picklers give
to lists of lists of ints; anything else makes it return ``None``, and the general machine takes over.
"""

from __future__ import annotations

from array import array

import torch

__all__ = ["parse"]

_MARK, _LIST, _APPEND, _APPENDS, _STOP = b"(]ae."
_BYTE, _SHORT, _WORD, _LONG = b"KMJ\x8a"
_PUT, _LONG_PUT, _MEMOIZE = b"qr\x94"


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
    while True:
        op = data[at]
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
