"""What is left of a list of operations when the power fails in the middle.

Certain is only what was synced: the bytes and the size of a file by a sync of that file, a name by a sync of the directory that it is
in, a move between two directories by a sync of both. A move is one step. Of everything else, any part may have reached the
disk: each page of a file as any of its versions, or as zeros under a size that is there already.
"""

from __future__ import annotations

import os
import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tests.power.recorder import ROOT

__all__ = ["Disk", "Loss", "sync_points"]

Operation: TypeAlias = "tuple[Any, ...]"
Loss: TypeAlias = Literal["everything", "nothing", "data", "some"]
"""Which of the operations that were not synced are lost; "data": the names and sizes are there, over zeros."""

_PAGE = 4096
_CONTENT = {"write", "size"}
_NAMES = {"make", "link", "unlink", "rename", "exchange"}


def sync_points(operations: Sequence[Operation], start: int) -> list[int]:
    """Positions of the syncs from ``start`` on."""
    return [i for i in range(start, len(operations)) if operations[i][0] == "sync"]


@dataclass
class _Inode:
    kind: str
    target: bytes = b""
    data: bytearray = field(default_factory=bytearray)
    time: int = 0
    names: dict[bytes, int] = field(default_factory=dict)


def _places(operation: Operation) -> list[tuple[int, bytes]]:
    """Names that an operation changes, each with its directory."""
    kind, *rest = operation
    if kind in {"rename", "exchange"}:
        return [(rest[0], rest[1]), (rest[2], rest[3])]
    return [(rest[0], rest[1])]


class Disk:
    """All operations on a file system, and what a disk holds of them after a power failure."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = operations
        self._syncs: dict[int, list[int]] = defaultdict(list)
        for i in sync_points(operations, 0):
            self._syncs[operations[i][1]].append(i)

    def position(self, name: str) -> int:
        """Where the directory of this name was made, which a test does to mark a moment."""
        return next(i for i, op in enumerate(self.operations) if op[0] == "make" and op[2] == name.encode())

    def write(self, target: Path, end: int, loss: Loss, rng: random.Random, *, synced_before: int = 0) -> None:
        """Write what the disk holds if the power fails after ``end`` operations.

        Args:
            target: an empty directory.
            end: how many operations were done.
            loss: which of those that were not synced are lost.
            rng: makes the choices of "some".
            synced_before: everything before this position counts as synced.
        """
        forced: set[int] = set()
        while (nodes := self._names(end, loss, rng, synced_before, forced)) is None:
            pass
        for number, node in nodes.items():
            if node.kind == "file":
                self._fill(node, number, end, loss, rng, synced_before)
        _write(target, nodes, ROOT)

    def _synced(self, number: int, position: int, end: int) -> bool:
        """Whether a file or directory was synced after one position and before another."""
        found = self._syncs[number]
        at = bisect_left(found, position)
        return at < len(found) and found[at] < end

    def _names(
        self, end: int, loss: Loss, rng: random.Random, synced_before: int, forced: set[int]
    ) -> dict[int, _Inode] | None:
        """All inodes with the names that are there; ``None`` where an operation that is certain needs one that was left out.

        That one is then added to ``forced``: a directory that was synced after a file had come to it from another directory
        holds that file, or the names that it got since would be nowhere.
        """
        nodes = {ROOT: _Inode("directory")}
        left_out: dict[tuple[int, bytes], int] = {}
        for i, operation in enumerate(self.operations[:end]):
            if operation[0] not in _NAMES:
                continue
            places = _places(operation)
            certain = i < synced_before or i in forced or all(self._synced(where, i, end) for where, _ in places)
            wanted = certain or (loss in {"nothing", "data"} or (loss == "some" and rng.random() < 0.5))
            if operation[0] == "make":
                nodes.setdefault(operation[3], _Inode(operation[4], operation[5]))
            if wanted and _applied(nodes, operation, certain=certain):
                continue
            if certain:
                missing = [left_out[place] for place in places if place in left_out]
                assert missing, f"operation {i} cannot be done: {operation[:5]}"
                forced.update(missing)
                return None
            left_out.update(dict.fromkeys(places, i))
        return nodes

    def _fill(self, node: _Inode, number: int, end: int, loss: Loss, rng: random.Random, synced_before: int) -> None:
        """The bytes and the time of a file."""
        syncs = self._syncs[number]
        at = bisect_left(syncs, end)
        durable = max(syncs[at - 1] if at else 0, synced_before)
        later = []
        for i, operation in enumerate(self.operations[:end]):
            if operation[0] == "time" and operation[1] == number and (i < durable or loss != "everything"):
                node.time = operation[2]
            if operation[0] not in _CONTENT or operation[1] != number:
                continue
            if i < durable or loss == "nothing":
                _change(node.data, operation)
            else:
                later.append(operation)
        if later and loss != "everything":
            _change_some(node.data, later, loss, rng)


def _applied(nodes: dict[int, _Inode], operation: Operation, *, certain: bool) -> bool:
    """Do an operation on names; False where what it needs is not there.

    A directory goes only when it is empty; if that it went is certain, so is that what was in it had gone.
    """
    kind, where, name, *rest = operation
    names = nodes[where].names
    if kind in {"make", "link"}:
        if name in names:
            return False
        names[name] = rest[0]
    elif kind == "unlink":
        if name not in names or (nodes[names[name]].names and not certain):
            return False
        del names[name]
    else:
        other, new = rest
        target = nodes[other].names
        if name not in names or (kind == "exchange" and new not in target):
            return False
        if kind == "exchange":
            names[name], target[new] = target[new], names[name]
        elif new in target and nodes[target[new]].names and not certain:
            return False
        else:
            target[new] = names.pop(name)
    return True


def _change(data: bytearray, operation: Operation) -> None:
    kind, _, place, *rest = operation
    size = place if kind == "size" else max(len(data), place + len(rest[0]))
    if size < len(data):
        del data[size:]
    data.extend(bytes(size - len(data)))
    if kind == "write":
        data[place : place + len(rest[0])] = rest[0]


def _change_some(data: bytearray, later: Sequence[Operation], loss: Loss, rng: random.Random) -> None:
    """Versions of each page up to the last, and one of the sizes; of lost data, zeros under the last size."""
    versions = [bytes(data)]
    newest = bytearray(data)
    for operation in later:
        _change(newest, operation)
        if loss == "some":
            versions.append(bytes(newest))
    size = len(newest) if loss == "data" else len(rng.choice(versions))
    data.extend(bytes(max(size - len(data), 0)))
    del data[size:]
    if loss == "some":
        for start in range(0, size, _PAGE):
            page = rng.choice(versions)[start : start + _PAGE]
            length = min(_PAGE, size - start)
            data[start : start + length] = page[:length].ljust(length, b"\0")


def _write(target: Path, nodes: dict[int, _Inode], number: int) -> None:
    for name, child in nodes[number].names.items():
        path, node = target / os.fsdecode(name), nodes[child]
        if node.kind == "directory":
            path.mkdir()
            _write(path, nodes, child)
        elif node.kind == "link":
            path.symlink_to(os.fsdecode(node.target))
        else:
            path.write_bytes(node.data)
            os.utime(path, ns=(node.time, node.time))
