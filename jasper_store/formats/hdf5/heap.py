"""A check of HDF5's global heaps, before the library is asked to read anything of variable length from them.

The heaps hold variable-length rows and texts. Unlike most metadata they carry no checksum, and the library
(2.0 and before) walks for ever over a heap in which a damaged size makes the next object begin where this one does.

Source: HDF5 File Format Specification, section III.E, "Disk Format: Level 1E - Global Heap".
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from jasper_store.errors import CorruptFileError
from jasper_store.formats.files import open_for_reading

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["check_heaps"]

# Signature, version 1 and three reserved zeros: not to be met by chance in tensor data.
_SIGNATURE = b"GCOL\x01\x00\x00\x00"
_HEADER = 16
_OBJECT_HEADER = 16


def check_heaps(path: Path) -> None:
    """Walk every global heap of a file as the library would.

    Raises:
        CorruptFileError: a heap or an object in it does not end where the next one can begin.
    """
    with open_for_reading(path) as (file, size):
        if not size:
            return
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
            at = data.find(_SIGNATURE)
            while at >= 0:
                if not _is_sound(data, at, size):
                    raise CorruptFileError(
                        f"{path}: the heap of variable-length values at byte {at} is damaged. Write the file again.",
                        path=path,
                    )
                at = data.find(_SIGNATURE, at + 1)


def _is_sound(data: mmap.mmap, start: int, size: int) -> bool:
    if start + _HEADER > size:
        return False
    end = start + int.from_bytes(data[start + 8 : start + 16], "little")
    if end > size or end - start < _HEADER:
        return False
    at = start + _HEADER
    # A rest too small for an object's header is unused.
    while at + _OBJECT_HEADER <= end:
        index = int.from_bytes(data[at : at + 2], "little")
        nbytes = int.from_bytes(data[at + 8 : at + 16], "little")
        # Index 0 is the free space, whose size counts its header.
        step = nbytes if index == 0 else _OBJECT_HEADER + -(-nbytes // 8) * 8
        if step < _OBJECT_HEADER or at + step > end:
            return False
        at += step
    return True
