"""The files of a tensor that lies in ten thousand of them: as texts, of which each becomes a path when it is asked for.

Making a ``Path`` takes 2 us and several objects, which the garbage collector then walks through again and again: making and
hashing ten thousand took most of the time of an opening.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["FileList", "texts_of"]


class FileList(Sequence[Path]):
    """Paths of files, in order. Immutable; equal to any sequence of the same paths.

    Attributes:
        texts: the paths, each as ``str`` writes it.
    """

    __slots__ = ("texts",)

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts: tuple[str, ...] = tuple(texts)

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, at: int) -> Path: ...
    @overload
    def __getitem__(self, at: slice) -> FileList: ...
    def __getitem__(self, at: int | slice) -> Path | FileList:
        return FileList(self.texts[at]) if isinstance(at, slice) else Path(self.texts[at])

    def __iter__(self) -> Iterator[Path]:
        return map(Path, self.texts)

    def __contains__(self, path: object) -> bool:
        return isinstance(path, Path) and str(path) in self.texts

    def __eq__(self, other: object) -> bool:
        if isinstance(other, FileList):
            return self.texts == other.texts
        return self.texts == texts_of(other) if isinstance(other, (tuple, list)) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.texts)

    def __repr__(self) -> str:
        return f"FileList({list(self.texts)!r})"


def texts_of(paths: Sequence[Path]) -> tuple[str, ...]:
    """Each of some paths as a text."""
    return paths.texts if isinstance(paths, FileList) else tuple(map(str, paths))
