"""What the harness asks of a reader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = ["Reader"]


class Reader(ABC):
    """A reader of rows. Made in the child process that is measured; its library is imported by ``prepare``.

    Attributes:
        key: the name on the command line and in the JSON.
        label: the name in the tables.
        how: its settings in words.
        module: what it imports; if that is missing it is reported as not installed.
        dist: the distribution whose version is reported.
        asset: the file it reads, a name of ``row_files.WRITERS``.
        ours: whether it is this library.
    """

    key: ClassVar[str]
    label: ClassVar[str]
    how: ClassVar[str]
    module: ClassVar[str]
    dist: ClassVar[str]
    asset: ClassVar[str]
    ours: ClassVar[bool] = False

    def __init__(self, rows: int, dim: int, lookahead: int) -> None:
        self.rows, self.dim, self.lookahead = rows, dim, lookahead
        self.lib: Any = None

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot run here, or None; imports nothing."""
        return None if find_spec(cls.module) else "not installed"

    @classmethod
    def version(cls) -> str | None:
        """Of its distribution."""
        try:
            return metadata.version(cls.dist)
        except metadata.PackageNotFoundError:
            return None

    def prepare(self) -> None:
        """Import the library: before the memory limit and before the clock."""
        self.lib = import_module(self.module)

    @abstractmethod
    def open(self, path: Path) -> None:
        """Open the file. Opening is timed apart."""

    @abstractmethod
    def take(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """Those rows in that order, float32 [len(rows), dim], in memory of their own."""

    def batches(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[torch.Tensor]:
        """One batch after the other; a reader that can look ahead does so here."""
        for rows in batches:
            yield self.take(rows)
