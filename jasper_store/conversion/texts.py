"""Strings of a source as tensors to be written: bytes, offsets, and the sorted hashes that find a row by its string."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from jasper_store.errors import IntegrityError
from jasper_store.formats.base import Encoded, TensorSpec
from jasper_store.formats.registry import FORMATS, format_for
from jasper_store.formats.texts import SupportsTexts, hash_block, sort_hashes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from jasper_store.formats.base import FormatName, Schema, Skipped
    from jasper_store.formats.texts import Texts

__all__ = ["kept_texts"]

_BLOCK_ROWS = 1 << 17


def kept_texts(
    skipped: Iterable[Skipped], source: FormatName, schema: Schema
) -> tuple[tuple[TensorSpec, ...], list[str]]:
    """What a conversion makes of what is no tensor. All strings are read once, to count their bytes.

    Args:
        skipped: what the source's files hold that is no tensor.
        source: format of a file whose name does not say it.
        schema: names and HDF5 paths.

    Returns:
        The tensors of the strings that can be kept, and a sentence for each column that is, or is not.

    Raises:
        CorruptFileError: a file is damaged.
    """
    specs: list[TensorSpec] = []
    notes: list[str] = []
    columns: dict[object, dict[str, Texts]] = {}
    for skip in skipped:
        if skip.path not in columns:
            fmt = format_for(skip.path) or FORMATS[source]
            found = fmt.texts(skip.path, schema) if isinstance(fmt, SupportsTexts) else []
            columns[skip.path] = {texts.name: texts for texts in found}
        texts = columns[skip.path].get(skip.name)
        try:
            specs += [] if texts is None else _specs(texts)
        except IntegrityError as exc:
            notes.append(f"{skip}; {exc}")
        else:
            kept = "" if texts is None else f"{skip.name}: {texts.rows:,} strings, kept as UTF-8 for store.ids()"
            notes.append(kept or str(skip))
    return tuple(specs), notes


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
        TensorSpec(f"{texts.name}.{part}", dtype, (size,), Encoded(texts.path, blocks))
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
