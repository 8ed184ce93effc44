"""Generated data: made when a case needs it, kept between runs, never more than the disk budget at once."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tools.bench import spawn
from tools.bench.generic_data import PREFIX, GenericShape
from tools.bench.jasper_data import Shape
from tools.bench.row_files import WRITERS

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tools.bench.settings import Settings

__all__ = ["Assets", "ReopenSpec"]

VERSION = 1
MARK = ".made.json"


@dataclass(frozen=True)
class ReopenSpec:
    """How an asset is made: a function for a child process, its arguments, and the bytes it will take."""

    function: str
    arguments: dict[str, Any]
    nbytes: int

    @property
    def mark(self) -> dict[str, Any]:
        """What must agree for an asset on disk to be used again."""
        return {"version": VERSION, "function": self.function, "arguments": self.arguments}


class Assets:
    """The data directory. An asset counts as there only once its mark is: a cut run leaves nothing that is trusted."""

    def __init__(self, settings: Settings) -> None:
        self.root = settings.data_dir
        self.budget = settings.disk_budget
        self.settings = settings
        self.root.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where an asset lies, or will."""
        return self.root / name

    def recipe(self, name: str) -> ReopenSpec:
        """Of a row file (``rows.npy``), or of a dataset (``jasper-shared.safetensors``, ``generic-labels.npy``)."""
        s = self.settings
        if name in WRITERS:
            arguments = {"layout": name, "rows": s.rows, "dim": s.dim, "seed": s.seed}
            # tensors on their way to .pt lie there twice for a moment
            return ReopenSpec("tools.bench.row_files:write", arguments, s.rows_nbytes * (2 if name == "rows.pt" else 1))
        base, _, layout = name.partition(".")
        if base.startswith(PREFIX):
            shape = GenericShape.of(base.removeprefix(PREFIX), s)
            return ReopenSpec("tools.bench.generic_data:write", {"layout": layout, **vars(shape)}, shape.nbytes)
        return self.dataset(layout, Shape.named(base, s.pairs, s.dim, s.n_neg, s.seed))

    @staticmethod
    def dataset(layout: str, shape: Shape, *, sparse: bool = False) -> ReopenSpec:
        """Of a dataset of any shape."""
        arguments = {"layout": layout, "sparse": sparse, **vars(shape)}
        nbytes = shape.pairs * 8 if sparse else shape.nbytes
        return ReopenSpec("tools.bench.jasper_data:write", arguments, nbytes)

    def ensure(self, name: str, keep: Iterable[str] = (), recipe: ReopenSpec | None = None) -> Path:
        """Make the asset unless it is there; others go to make room, except those to ``keep``."""
        recipe = recipe or self.recipe(name)
        path, mark = self.path(name), self.path(name + MARK)
        if path.exists() and mark.exists() and json.loads(mark.read_text(encoding="utf-8")) == recipe.mark:
            mark.touch()
            return path
        self.remove(name)
        self._make_room(recipe.nbytes, {name, *keep})
        spawn.call(recipe.function, 1800.0, path=str(path), **recipe.arguments)
        mark.write_text(json.dumps(recipe.mark), encoding="utf-8")
        return path

    def size(self) -> int:
        """Bytes on disk of everything here (holes do not count)."""
        return sum(item.stat().st_blocks * 512 for item in self.root.rglob("*") if item.is_file())

    def remove(self, name: str) -> None:
        """Remove an asset, whole or half made."""
        path = self.path(name)
        self.path(name + MARK).unlink(missing_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _make_room(self, needed: int, keep: set[str]) -> None:
        marks = sorted(self.root.glob(f"*{MARK}"), key=lambda mark: mark.stat().st_mtime)
        for mark in marks:
            if self.size() + needed <= self.budget:
                return
            name = mark.name.removesuffix(MARK)
            if name not in keep:
                self.remove(name)
        if self.size() + needed > self.budget:
            raise RuntimeError(
                f"{needed / 1e9:.1f} GB are needed beside {self.size() / 1e9:.1f} GB that must stay, and the disk "
                f"budget is {self.budget / 1e9:.1f} GB; give a larger --disk-budget or fewer --rows"
            )

    def clean(self) -> int:
        """Remove everything; returns the bytes freed."""
        freed = self.size()
        shutil.rmtree(self.root)
        return freed
