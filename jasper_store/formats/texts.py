"""Strings in files: skipped where tensors are wanted, read block by block by a conversion that keeps them.

Kept strings are two tensors: their UTF-8 bytes one after another, ``X.values`` (uint8), and where each begins,
``X.offsets`` (int64 [rows + 1]). That the values are uint8 is what marks a text: ragged tensors of numbers are int64 in
every format. So the mark survives each conversion, and needs no entry that a copied file could lose. Beside them lie
``X.hashes`` (uint64 [rows], ascending) and ``X.order`` (int64 [rows]): xxh3-64 of each string, and its row.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
import xxhash

from jasper_store.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from jasper_store.formats.base import Schema, Skipped, TensorSpec

    Block: TypeAlias = tuple[NDArray[np.uint8], NDArray[np.int64]]
    """UTF-8 bytes of some strings, one after another, and the bytes of each."""

__all__ = [
    "BLOCK_NBYTES",
    "PARTS",
    "SkippedMemo",
    "SupportsTexts",
    "Texts",
    "check_utf8",
    "encode",
    "encode_bytes",
    "encode_unicode",
    "hash_block",
    "in_memory",
    "is_text",
    "sort_hashes",
    "text_names",
    "text_parts",
]

BLOCK_NBYTES = 4 << 20
"""Bytes of a file's strings that are read at once."""

PARTS = ("values", "offsets", "hashes", "order")
"""The tensors of a text: ``X.values`` and so on."""

_MAX_CODEPOINT = 0x10FFFF
_REMEMBERED = 256


@dataclass(frozen=True, eq=False)
class Texts:
    """The strings of one column of a file, or of files that are numbered.

    Attributes:
        name: the name of the column.
        files: the file, or the files in the order of their rows.
        rows: how many strings there are.
        blocks: reads them in order, each time it is called; a block is valid until the next one.

    Iterating raises IntegrityError at a string that UTF-8 cannot hold, and CorruptFileError where the file is damaged.
    """

    name: str
    files: tuple[Path, ...]
    rows: int
    blocks: Callable[[], Iterator[Block]]


@runtime_checkable
class SupportsTexts(Protocol):
    """A format that can read strings which it skips as tensors."""

    def texts(self, path: Path, schema: Schema) -> list[Texts]:
        """The columns of strings in a file, of one dimension.

        Raises:
            CorruptFileError, DatasetNotFoundError: as ``locate``.
        """


def in_memory(path: Path, name: str, rows: list[str]) -> Texts:
    """A column whose strings came with the file's header; ``rows`` is emptied when they are first read."""
    blocks: list[Block] = []

    def read() -> Iterator[Block]:
        # Encoded when first read, since a text that UTF-8 cannot hold is an error of reading it.
        if not blocks:
            blocks.append(encode(name, rows))
            rows.clear()
        return iter(blocks)

    return Texts(name, (path,), len(rows), read)


def is_text(values: Any, offsets: Any) -> bool:
    """Whether two tensors, or their specs, are the values and offsets of a text; either may be ``None``."""
    return (
        values is not None
        and offsets is not None
        and (values.dtype, offsets.dtype) == (torch.uint8, torch.int64)
        and len(values.shape) == len(offsets.shape) == 1
        and offsets.shape[0] > 0
    )


def text_names(specs: Iterable[TensorSpec]) -> set[str]:
    """Base names of the texts among some tensors."""
    by_name = {spec.name: spec for spec in specs}
    bases = [name.removesuffix(".values") for name in by_name if name.endswith(".values")]
    return {base for base in bases if is_text(by_name[f"{base}.values"], by_name.get(f"{base}.offsets"))}


def text_parts(specs: Iterable[TensorSpec]) -> set[str]:
    """Names of all tensors that belong to a text, its hashes and their order included."""
    return {f"{base}.{part}" for base in text_names(specs) for part in PARTS}


# ---- strings to UTF-8


def encode(name: str, rows: Sequence[str], first: int = 0) -> Block:
    """UTF-8 of Python strings; ``first`` is the position of the first, for messages.

    Raises:
        IntegrityError: what is no string, or has half of a surrogate pair; names its position.
    """
    encoded: list[bytes] = []
    try:
        encoded.extend(row.encode() for row in rows)
    except (AttributeError, UnicodeEncodeError) as exc:
        row: object = rows[len(encoded)]
        found = f"a {type(row).__name__}" if not isinstance(row, str) else f"{row!r:.60}, which UTF-8 cannot hold"
        msg = f"{name!r}: expected strings, found {found} at position {first + len(encoded)}"
        raise IntegrityError(msg, tensor=name) from exc
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    return np.frombuffer(b"".join(encoded), np.uint8), lengths


def encode_unicode(name: str, codes: NDArray[np.uint32], first: int) -> Block:
    """UTF-8 of numpy's fixed-width strings, without a Python object for each.

    Args:
        name: for messages.
        codes: code points [n, width], zeros behind each string's end.
        first: row of the first string.

    Raises:
        IntegrityError: a number that is no character; names its row.
    """
    inside = _inside(codes)
    if not codes.size or codes[inside].max(initial=0) < 0x80:
        return codes[inside].astype(np.uint8), inside.sum(axis=1, dtype=np.int64)
    bad = ((codes >= 0xD800) & (codes < 0xE000)) | (codes > _MAX_CODEPOINT)
    if bad.any():
        row = int(np.flatnonzero(bad.any(axis=1))[0])
        raise _no_text(name, first + row)
    widths = np.where(inside, 1 + (codes >= 0x80) + (codes >= 0x800).astype(np.int64) + (codes >= 0x10000), 0)
    chars, nbytes = codes[inside], widths[inside]
    ends = np.cumsum(nbytes)
    out = np.empty(int(ends[-1]), dtype=np.uint8)
    for width, lead in ((1, 0), (2, 0xC0), (3, 0xE0), (4, 0xF0)):
        chosen = nbytes == width
        at, some = ends[chosen] - width, chars[chosen]
        for i in range(width):
            bits = some >> np.uint32(6 * (width - 1 - i))
            out[at + i] = (bits | lead if i == 0 else (bits & 0x3F) | 0x80).astype(np.uint8)
    return out, widths.sum(axis=1, dtype=np.int64)


def encode_bytes(name: str, rows: NDArray[np.uint8], first: int) -> Block:
    """UTF-8 of fixed-width byte strings [n, width], zeros behind each one's end; ``name``, ``first`` as above.

    Raises:
        IntegrityError: bytes that are no UTF-8; names the row.
    """
    inside = _inside(rows)
    values, lengths = rows[inside], inside.sum(axis=1, dtype=np.int64)
    check_utf8(name, values, lengths, first)
    return values, lengths


def check_utf8(name: str, values: NDArray[np.uint8], lengths: NDArray[np.int64], first: int) -> None:
    """Raise IntegrityError, with its row, at a string whose bytes are no UTF-8."""
    raw, starts = values.tobytes(), np.cumsum(lengths) - lengths
    begins = values[starts[lengths > 0]]
    try:
        raw.decode()
        sound = not ((begins & 0xC0) == 0x80).any()  # a string that begins within a character of the one before it
    except UnicodeDecodeError:
        sound = False
    if sound:
        return
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        one = raw[start : start + length]
        if one.decode(errors="replace").encode() != one:
            raise _no_text(name, first + row)


def _inside(rows: NDArray[Any]) -> NDArray[np.bool_]:
    """Which characters [n, width] belong to strings: zeros may lie inside of one, those behind it do not count."""
    width = rows.shape[1]
    backwards = rows[:, ::-1] != 0
    lengths = np.where(backwards.any(axis=1), width - backwards.argmax(axis=1), 0) if width else np.zeros(len(rows))
    inside: NDArray[np.bool_] = np.arange(width) < lengths[:, None]
    return inside


def _no_text(name: str, row: int) -> IntegrityError:
    msg = f"{name!r}: row {row} is no text that UTF-8 can hold; save the strings as UTF-8"
    return IntegrityError(msg, tensor=name)


# ---- hashes


def hash_block(values: NDArray[np.uint8], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
    """xxh3-64 of each string [n], of their bytes one after another and the bytes of each."""
    raw, ends = np.ascontiguousarray(values).data, np.cumsum(lengths)
    edges = pairwise([0, *ends.tolist()])
    digest = xxhash.xxh3_64_intdigest
    return np.fromiter((digest(raw[start:stop]) for start, stop in edges), np.uint64, len(lengths))


def sort_hashes(blocks: Iterable[NDArray[np.uint64]]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of all rows in ascending order, and the row of each; of equal ones the lower row first."""
    hashes = np.concatenate([np.empty(0, np.uint64), *blocks])
    order = np.argsort(hashes, kind="stable")
    return hashes[order], order


# ---- what was skipped


class SkippedMemo:
    """What was skipped in files that were located lately, so that asking for it does not parse them again.

    Safe for concurrent use. A file is known by its path, inode, size and time of change.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, tuple[Skipped, ...]] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def key(path: Path, *more: Hashable) -> Hashable:
        """What identifies a file as it is now, with what else decides; to be taken before the file is parsed."""
        try:
            found = path.stat()
        except OSError:
            return None
        return str(path), found.st_ino, found.st_size, found.st_mtime_ns, more

    def put(self, key: Hashable, skipped: Iterable[Skipped]) -> list[Skipped]:
        """Remember what was skipped in a file, and return it."""
        listed = list(skipped)
        if key is not None:
            with self._lock:
                self._known[key] = tuple(listed)
                self._known.move_to_end(key)
                while len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
        return listed

    def get(self, key: Hashable) -> list[Skipped] | None:
        """What was skipped in a file, ``None`` where that is not known."""
        with self._lock:
            found = self._known.get(key)
        return None if found is None else list(found)
