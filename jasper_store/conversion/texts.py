"""Strings of a source as tensors to be written: bytes, offsets, and the sorted hashes that find a row by its string."""

from __future__ import annotations

import contextlib
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch

from jasper_store.errors import CorruptFileError, DatasetNotFoundError, IncompatibleOptionsError, IntegrityError
from jasper_store.formats.base import Encoded, TensorSpec
from jasper_store.formats.flat import stem_of
from jasper_store.formats.numbered import group
from jasper_store.formats.registry import files_of, format_for, readable, skipped_in
from jasper_store.formats.texts import SupportsTexts, Texts, hash_block, sort_hashes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from jasper_store.formats.base import FormatName, Schema, Skipped
    from jasper_store.formats.numbered import Numbered
    from jasper_store.formats.texts import Block

__all__ = ["kept_texts"]

_BLOCK_ROWS = 1 << 17


def kept_texts(
    skipped: Sequence[Skipped], source: FormatName, schema: Schema, src: Path, taken: Collection[str] = ()
) -> tuple[tuple[TensorSpec, ...], list[str]]:
    """What a conversion makes of what is no tensor. All strings are read once, to count their bytes.

    Args:
        skipped: what the source's files hold that is no tensor; of a directory, what several files hold may be there once.
        source: format of a file whose name does not say it.
        schema: names and HDF5 paths.
        src: the directory or the file that is converted.
        taken: names of tensors, which strings cannot have.

    Returns:
        The tensors of the strings that can be kept, and a sentence for each column that is, or is not.

    Raises:
        CorruptFileError: a file is damaged, lacks strings that the files numbered like it have, or has the same as another.
    """
    columns: dict[Path, dict[str, Texts]] = {}
    for path in _files(skipped, schema, src):
        fmt = format_for(path) or readable()[source]
        found = fmt.texts(path, schema) if isinstance(fmt, SupportsTexts) else []
        columns[path] = {texts.name: texts for texts in found}
    notes = [str(skip) for skip in skipped if skip.name not in columns.get(skip.path, {})]
    specs: list[TensorSpec] = []
    kept: dict[str, Texts] = {}
    for texts in _joined([texts for found in columns.values() for texts in found.values()]):
        first = texts.files[0]
        known = kept.setdefault(texts.name, texts)
        if known is not texts:
            if format_for(known.files[0]) is format_for(first):
                msg = f"{first}: holds the strings {texts.name!r:.100}, and so does {known.files[0]}; remove one"
                raise CorruptFileError(msg, path=first, tensor=texts.name)
            continue  # of two formats, the first that has a name is taken, as for tensors
        if texts.name in taken:
            notes.append(f"{first}: the strings {texts.name!r:.100} are skipped; a tensor has their name")
            continue
        files = f" of {len(texts.files)} numbered files" if len(texts.files) > 1 else ""
        try:
            specs += _specs(texts)
        except IntegrityError as exc:
            notes.append(f"{first}: {texts.name!r:.100} is skipped: {exc}")
        else:
            notes.append(f"{texts.name}: {texts.rows:,} strings{files}, kept as UTF-8 for store.ids()")
    return tuple(specs), notes


def _files(skipped: Sequence[Skipped], schema: Schema, src: Path) -> list[Path]:
    """The files that hold what was skipped, all of them, also where one was named for several."""
    if not src.is_dir():
        return list(dict.fromkeys(skip.path for skip in skipped))
    found: list[Path] = []
    for name in dict.fromkeys(fmt.name for skip in skipped if (fmt := format_for(skip.path)) is not None):
        for path in files_of(src, name):
            # One that cannot be read was refused, or named, where the tensors were located.
            with contextlib.suppress(CorruptFileError, DatasetNotFoundError, IncompatibleOptionsError):
                if skipped_in(readable()[name], path, schema):
                    found.append(path)
    return found


def _joined(columns: list[Texts]) -> list[Texts]:
    """Columns that numbered files hold alike, as one, in the order of the files; the others as they are."""
    paths = {texts.files[0] for texts in columns}
    # Of one file that was named, the others are not asked for.
    numbered = _numbered(paths) if len(paths) > 1 else {}
    same: dict[tuple[Path, str], list[Texts]] = {}
    for texts in columns:
        path = texts.files[0]
        one = numbered.get(path)
        name = one.whole_name(_stem(path), texts.name) if one is not None else texts.name
        same.setdefault((one.files[0] if one is not None else path, name), []).append(texts)
    found = []
    for (first, name), parts in same.items():
        order = numbered[first].files if first in numbered else (first,)
        parts.sort(key=lambda texts: order.index(texts.files[0]))
        files = tuple(texts.files[0] for texts in parts)
        if files != order:
            lacking = next(path for path in order if path not in files)
            msg = f"{lacking}: expected strings {name!r:.100}, as in {files[0].name}, found none; write the file again"
            raise CorruptFileError(msg, path=lacking, tensor=name)
        blocks = partial(_chained, parts) if len(parts) > 1 else parts[0].blocks
        found.append(Texts(name, files, sum(texts.rows for texts in parts), blocks))
    return found


def _numbered(paths: Iterable[Path]) -> dict[Path, Numbered]:
    """The files that are numbered like each of these, of all that are in its directory."""
    kinds = {(path.parent, fmt.name) for path in paths if (fmt := format_for(path)) is not None}
    groups = [one for directory, name in kinds for one in group(files_of(directory, name))[0]]
    return {path: one for one in groups for path in one.files}


def _stem(path: Path) -> str:
    fmt = format_for(path)
    return stem_of(path, fmt.suffixes) if fmt is not None else path.name


def _chained(parts: list[Texts]) -> Iterator[Block]:
    return chain.from_iterable(texts.blocks() for texts in parts)


def _specs(texts: Texts) -> list[TensorSpec]:
    """The four tensors of a column of strings.

    Raises:
        IntegrityError: a string that UTF-8 cannot hold.
    """
    nbytes = sum(len(values) for values, _ in texts.blocks())
    sorted_hashes = _SortedHashes(texts)
    parts: list[tuple[str, torch.dtype, int, Callable[[], Iterator[torch.Tensor]]]] = [
        ("values", torch.uint8, nbytes, partial(_values, texts)),
        ("offsets", torch.int64, texts.rows + 1, partial(_offsets, texts)),
        ("hashes", torch.uint64, texts.rows, partial(sorted_hashes.blocks, 0)),
        ("order", torch.int64, texts.rows, partial(sorted_hashes.blocks, 1)),
    ]
    return [
        TensorSpec(f"{texts.name}.{part}", dtype, (size,), Encoded(texts.files, blocks))
        for part, dtype, size, blocks in parts
    ]


def _values(texts: Texts) -> Iterator[torch.Tensor]:
    for values, _ in texts.blocks():
        if len(values):
            yield torch.from_numpy(values if values.flags.writeable else values.copy())


def _offsets(texts: Texts) -> Iterator[torch.Tensor]:
    yield torch.zeros(1, dtype=torch.int64)
    end = 0
    for _, lengths in texts.blocks():
        if len(lengths):
            ends = end + np.cumsum(lengths)
            end = int(ends[-1])
            yield torch.from_numpy(ends)


class _SortedHashes:
    """Hashes of a column and their rows; sorted when the first of both is asked for, forgotten after the second."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self._made: tuple[NDArray[np.uint64], NDArray[np.int64]] | None = None

    def blocks(self, which: int) -> Iterator[torch.Tensor]:
        if self._made is None:
            self._made = sort_hashes([hash_block(values, lengths) for values, lengths in self._texts.blocks()])
        whole = torch.from_numpy(self._made[which])
        if which:
            self._made = None
        for start in range(0, len(whole), _BLOCK_ROWS):
            yield whole[start : start + _BLOCK_ROWS]
