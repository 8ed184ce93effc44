"""Checks of HDF5's older indices, version 1 B-trees, before the library walks them.

The library (2.0 and before) goes down such a tree by recursion and believes the nodes: one that is its own child ends
the process. It also walks a group's list of free places for ever where that leads back to itself, and takes memory at
each step. These structures carry no checksum. Newer files have others, which do.

Source: HDF5 File Format Specification, sections III.A.1 "Version 1 B-trees", III.B "Symbol Table Nodes" and III.D "Local
Heaps".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jasper_store.formats.hdf5.raw import RawFile

__all__ = ["check_chunk_tree", "check_group_tree"]

_NO_FREE_PLACE = 1
_SOFT_LINK = 2  # kind of a group's entry whose value is a text in the heap


def check_chunk_tree(raw: RawFile, address: int | None, dimensions: int, key: str) -> None:
    """Check the index of a dataset's chunks.

    Args:
        raw: the file.
        address: of its root, ``None`` if no chunk was written.
        dimensions: of the dataset, and one more for the bytes of an element.
        key: the dataset's name in messages.

    Raises:
        CorruptFileError: a node leaves the file, is of another level than its parent says, or comes twice.
    """
    if address is not None:
        _leaves(raw, address, 1, 8 + 8 * dimensions, f"the index of {key!r:.100}")


def check_group_tree(raw: RawFile, address: int | None, heap: int | None, key: str) -> None:
    """Check the index of a group's links and the heap that their names lie in; otherwise as :func:`check_chunk_tree`."""
    what = f"the index of the group {key!r:.100}"
    if address is None or heap is None:
        raw.corrupt(f"{what} has no address")
    texts = _heap(raw, heap, what)
    for leaf in _leaves(raw, address, 0, raw.length_nbytes, what):
        head = raw.read(leaf, 8, what)
        if head[:5] != b"SNOD\x01":
            raw.corrupt(f"{what} leads to {head[:5]!r} where links should be")
        entry = 2 * raw.offset_nbytes + 24
        count = int.from_bytes(head[6:8], "little")
        entries = raw.read(leaf + 8, count * entry, what)
        for at in range(0, len(entries), entry):
            names = [int.from_bytes(entries[at : at + raw.offset_nbytes], "little")]
            kind = at + 2 * raw.offset_nbytes
            if entries[kind] == _SOFT_LINK:
                names.append(int.from_bytes(entries[kind + 8 : kind + 12], "little"))
            if any(texts.find(b"\0", name) < 0 for name in names):
                raw.corrupt(f"{what} has a name that does not end within its heap")


def _leaves(raw: RawFile, root: int, kind: int, key_nbytes: int, what: str) -> list[int]:
    """Addresses that the lowest nodes of a tree lead to; of chunks, which are checked elsewhere, none are needed."""
    found: list[int] = []
    seen: set[int] = set()
    step = key_nbytes + raw.offset_nbytes
    todo: list[tuple[int, int | None]] = [(root, None)]
    while todo:
        address, expected = todo.pop()
        node = raw.read(address, 8, what)
        level, count = node[5], int.from_bytes(node[6:8], "little")
        if node[:5] != b"TREE" + bytes([kind]) or expected not in {None, level} or address in seen:
            raw.corrupt(
                f"{what} leads to {node[:6]!r} at byte {address}, where a node of level {expected} should be new"
            )
        seen.add(address)
        if not level and kind:
            continue
        # Behind the addresses of the nodes beside it come keys and children in turn.
        begin = address + 8 + 2 * raw.offset_nbytes
        body = raw.read(begin, count * step, what)
        for at in range(key_nbytes, len(body), step):
            child = int.from_bytes(body[at : at + raw.offset_nbytes], "little")
            if level:
                todo.append((child, level - 1))
            else:
                found.append(child)
    return found


def _heap(raw: RawFile, address: int, what: str) -> bytes:
    """The texts of a local heap, after its list of free places was followed to its end."""
    head = raw.read(address, 8 + 2 * raw.length_nbytes + raw.offset_nbytes, what)
    data = raw.offset(head, 8 + 2 * raw.length_nbytes, what)
    if head[:5] != b"HEAP\0" or data is None:
        raw.corrupt(f"{what} has {head[:5]!r} where a heap should be")
    texts = raw.read(data, raw.length(head, 8, what), what)
    free = raw.length(head, 8 + raw.length_nbytes, what)
    most = len(texts) // (2 * raw.length_nbytes)
    while free != _NO_FREE_PLACE:
        most -= 1
        if most < 0:
            raw.corrupt(f"{what} has a heap whose free places lead back to themselves")
        free = raw.length(texts, free, what)
    return texts
