"""Ids given as strings: the row of each, and where they are read from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from jasper_store.errors import CorruptFileError, IntegrityError, UnknownNameError
from jasper_store.formats.base import Schema
from jasper_store.formats.registry import format_for
from jasper_store.formats.texts import SupportsTexts, Texts

__all__ = ["ListedIds", "read_strings"]

_SHOWN = 5


class ListedIds:
    """Strings whose positions are the rows that they name.

    Raises:
        IntegrityError: an id that is there twice; names it and its rows.
    """

    def __init__(self, role: str, ids: Sequence[str]) -> None:
        self.name = role
        self._rows: dict[str, int] = {}
        for row, text in enumerate(ids):
            before = self._rows.setdefault(text, row)
            if before != row:
                raise IntegrityError(
                    f"{role}: expected each id once, found {text!r:.60} in rows {before} and {row}; remove or rename one",
                    tensor=role,
                )

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, ids: Sequence[str]) -> torch.Tensor:
        """The row of each id, int64 [len(ids)].

        Raises:
            UnknownNameError: ids that are not there; names the first of them.
        """
        unknown = [(place, text) for place, text in enumerate(ids) if text not in self._rows]
        if unknown:
            shown = ", ".join(f"{text!r:.60} (pair {place})" for place, text in unknown[:_SHOWN])
            more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
            raise UnknownNameError(
                f"pairs: expected ids that {self.name}= has, found {shown}{more}; correct them, or leave these pairs out",
                tensor=self.name,
            )
        return torch.tensor([self._rows[text] for text in ids], dtype=torch.int64)


def read_strings(role: str, path: Path) -> list[str] | None:
    """The strings of a file: of ``.txt`` one on each line, else its column; ``None`` where it holds no column of strings.

    Raises:
        CorruptFileError: a text file that is no UTF-8.
        IntegrityError: strings that are no UTF-8.
    """
    if path.suffix == ".txt":
        try:
            return path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as exc:
            raise CorruptFileError(f"{role}: {path} is no UTF-8 ({exc}); save it as UTF-8", path=path) from exc
    fmt: object = format_for(path)
    columns: list[Texts] = fmt.texts(path, Schema()) if isinstance(fmt, SupportsTexts) else []
    if len(columns) != 1:
        return None
    found: list[str] = []
    for values, lengths in columns[0].blocks():
        raw, start = values.tobytes(), 0
        for length in lengths.tolist():
            found.append(raw[start : start + length].decode())
            start += length
    return found
