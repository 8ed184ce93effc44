"""Random sample graphs over random tensors, and what numpy says that they serve.

Owes nothing to the code under test: expressions are made from a tree of its own, files are written by the formats' own
libraries, and values are compared by their bits, so that a NaN or a bfloat16 is as good as any number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from tests.jasper.expected import draw
from tests.store.samples import WRITERS

DTYPES = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
FORMATS = ("npy", "safetensors", "pt", "hdf5", "gzip", "parts")
SIZES = (1, 2, 3, 5, 7)
SEED, EPOCH = 3, 4

Ragged = list[torch.Tensor]


@dataclass(frozen=True)
class Look:
    """``tensor[rows]`` or ``tensor[rows, column]``; rows are ``i``, ``row``, a field, or another look."""

    tensor: str
    rows: Look | str
    column: int | None = None

    def __str__(self) -> str:
        return f"{self.tensor}[{self.rows}{'' if self.column is None else f', {self.column}'}]"


@dataclass(frozen=True)
class Pick:
    """A choice: tensors, rows, probabilities."""

    tensors: tuple[str, ...]
    rows: Look | str
    probabilities: tuple[float, ...]


@dataclass
class Graph:
    """A dataset and what its samples read.

    Attributes:
        tensors: by name; a list of rows is a ragged tensor.
        fields: by name: a :class:`Look`, a :class:`Pick`, or the name of the pick whose variant is served.
        length: of the samples.
        split: name of the tensor that lists the split's rows, or ``None``.
    """

    tensors: dict[str, torch.Tensor | Ragged] = field(default_factory=dict)
    fields: dict[str, Look | Pick | str] = field(default_factory=dict)
    length: int = 0
    split: str | None = None

    def __repr__(self) -> str:
        known = {
            name: f"ragged {[len(row) for row in value]}"
            if isinstance(value, list)
            else f"{value.dtype} {list(value.shape)}"
            for name, value in self.tensors.items()
        }
        fields = {name: value if isinstance(value, Pick) else str(value) for name, value in self.fields.items()}
        return f"Graph({known}, {fields}, length={self.length}, split={self.split})"

    def write(self, directory: Path, format: str) -> Path:  # noqa: A002 - the word that users pass
        """Write the tensors by the format's own library."""
        directory.mkdir(parents=True)
        flat: dict[str, torch.Tensor] = {}
        for name, value in self.tensors.items():
            if isinstance(value, torch.Tensor):
                flat[name] = value
            elif format == "pt":
                torch.save([row.tolist() for row in value], directory / f"{name}.pt")
            else:
                lengths = torch.tensor([0, *map(len, value)])
                flat |= {f"{name}.values": torch.cat(value), f"{name}.offsets": lengths.cumsum(0)}
        WRITERS[format](directory, flat)
        return directory


# --- what numpy says ----------------------------------------------------------------------------------------------


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The values as integers of their width."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    found: np.ndarray = tensor.contiguous().view(width).numpy()
    return found


class Expected:
    """Batches of a graph, worked out sample by sample."""

    def __init__(self, graph: Graph, seed: int = SEED, epoch: int = EPOCH) -> None:
        self.graph, self.seed, self.epoch = graph, seed, epoch
        self._arrays: dict[str, Any] = {
            name: [bits(row) for row in value] if isinstance(value, list) else bits(value)
            for name, value in graph.tensors.items()
        }
        # As numbers, where they name rows.
        self._numbers: dict[str, Any] = {
            name: [row.long().numpy() for row in value] if isinstance(value, list) else value.long().numpy()
            for name, value in graph.tensors.items()
            if isinstance(value, list) or value.dtype in INDEX_DTYPES
        }

    def _rows(self, rows: Look | str, position: int) -> Any:
        if rows == "i":
            return position
        if rows == "row":
            return position if self.graph.split is None else int(self._numbers[self.graph.split][position])
        if isinstance(rows, str):
            found = self.graph.fields[rows]
            assert isinstance(found, Look)
            rows = found
        return self._read(self._numbers, rows, position)

    def _read(self, arrays: Mapping[str, Any], look: Look, position: int) -> Any:
        rows = self._rows(look.rows, position)
        array = arrays[look.tensor]
        if isinstance(array, list):
            return array[int(rows)]
        return array[rows] if look.column is None else array[:, look.column][rows]

    def variant(self, pick: Pick, position: int) -> int:
        return draw(int(self._rows(pick.rows, position)), self.seed, self.epoch, pick.probabilities)

    def sample(self, name: str, position: int) -> np.ndarray:
        """Bits of one field of one sample."""
        found = self.graph.fields[name]
        if isinstance(found, Look):
            return np.asarray(self._read(self._arrays, found, position))
        if isinstance(found, str):
            pick = self.graph.fields[found]
            assert isinstance(pick, Pick)
            return np.asarray(self.variant(pick, position))
        variant = self.variant(found, position)
        row = self._rows(found.rows, position)
        return np.asarray(
            self._arrays[found.tensors[variant - 1]][row]
            if variant
            else np.zeros_like(self._arrays[found.tensors[0]][row])
        )

    def dtype(self, name: str) -> torch.dtype:
        found = self.graph.fields[name]
        if isinstance(found, str):
            return torch.int64
        value = self.graph.tensors[found.tensor if isinstance(found, Look) else found.tensors[0]]
        return value.dtype if isinstance(value, torch.Tensor) else value[0].dtype

    def is_ragged(self, name: str) -> bool:
        found: Any = self.graph.fields[name]
        while isinstance(found, Look):
            if isinstance(self.graph.tensors[found.tensor], list):
                return True
            found = found.rows if isinstance(found.rows, Look) else self.graph.fields.get(found.rows)
        return False

    def row_shape(self, name: str) -> tuple[int, ...]:
        """Sizes of one sample, of one row where it is ragged; known without a sample."""
        found: Any = self.graph.fields[name]
        if isinstance(found, str):
            return ()
        if isinstance(found, Pick):
            return tuple(self._arrays[found.tensors[0]].shape[1:])
        shape: tuple[int, ...] = ()
        while isinstance(found, Look):
            array = self._arrays[found.tensor]
            if isinstance(array, list):
                return (*array[0].shape[1:], *shape)
            shape = (*(array.shape[1:] if found.column is None else array.shape[2:]), *shape)
            found = found.rows if isinstance(found.rows, Look) else self.graph.fields.get(found.rows)
        return shape

    def check(self, found: Mapping[str, torch.Tensor], positions: Sequence[int]) -> None:
        """Compare a batch: keys in order, dtypes, shapes, bits."""
        keys = []
        for name in self.graph.fields:
            if name.startswith("_"):
                continue
            samples = [self.sample(name, position) for position in positions]
            shape = self.row_shape(name)
            if self.is_ragged(name):
                keys += [f"{name}.values", f"{name}.offsets"]
                values, offsets = found[f"{name}.values"], found[f"{name}.offsets"]
                ends = np.cumsum([0, *map(len, samples)])
                assert offsets.dtype == torch.int64, name
                assert offsets.tolist() == ends.tolist(), name
                wanted = np.concatenate([*samples, np.empty((0, *shape), bits(values).dtype)])
                size = int(ends[-1])
            else:
                keys.append(name)
                values, size = found[name], len(positions)
                wanted = np.stack(samples) if samples else np.empty((0, *shape), bits(values).dtype)
            assert values.dtype == self.dtype(name), name
            assert tuple(values.shape) == (size, *shape), name
            assert np.array_equal(bits(values), wanted), name
        assert list(found) == keys


# --- random graphs --------------------------------------------------------------------------------------------------


class _Maker:
    def __init__(self, pick: st.DrawFn, *, ragged: bool, choice: bool) -> None:
        self.draw, self.ragged, self.choice = pick, ragged, choice
        self.graph = Graph()
        self.random = torch.Generator().manual_seed(pick(st.integers(0, 2**20)))
        self.base = pick(st.integers(1, 24))  # samples without a split
        self.roots: dict[str, int] = {"i": self.base, "row": self.base}
        self.indices: list[tuple[str, int]] = []  # fields that may name rows, and of how many
        self.index_of: dict[str, int] = {}

    def flip(self) -> bool:
        return self.draw(st.booleans())

    def of(self, values: Sequence[Any]) -> Any:
        return values[self.draw(st.integers(0, len(values) - 1))]

    def add(self, values: torch.Tensor | Ragged) -> str:
        name = f"t{len(self.graph.tensors)}"
        self.graph.tensors[name] = values
        return name

    def numbers(self, shape: tuple[int, ...], below: int) -> torch.Tensor:
        dtypes = [dtype for dtype in INDEX_DTYPES if torch.iinfo(dtype).max >= below - 1]
        return torch.randint(below, shape, generator=self.random).to(self.of(dtypes))

    def values(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if dtype == torch.bool:
            return torch.randint(2, shape, generator=self.random).bool()
        raw = torch.randint(256, (*shape[:-1], shape[-1] * dtype.itemsize), generator=self.random)
        return raw.to(torch.uint8).view(dtype)

    def shape(self, most: int) -> tuple[int, ...]:
        return tuple(self.of(SIZES) for _ in range(self.draw(st.integers(0, most))))

    def row_lengths(self, rows: int, below: int) -> Ragged:
        lengths = torch.randint(4, (rows,), generator=self.random).tolist()
        return [torch.randint(below, (length,), generator=self.random) for length in lengths]

    def make(self, n_fields: int) -> Graph:
        if self.flip():
            length = self.draw(st.integers(1, 24))
            self.graph.split = self.add(self.numbers((length,), self.base))
            self.roots["i"] = length
        self.graph.length = self.roots["i"]
        for number in range(n_fields):
            self.field(number)
        if self.choice:
            self.pick()
        if not any(not name.startswith("_") for name in self.graph.fields):
            self.leaf("plain", "i", self.roots["i"])
        if not self.rooted():
            self.leaf("rooted", "i", self.roots["i"])
        return self.graph

    def rooted(self) -> bool:
        """Whether the length is known: without a split, by any served field; with one, always."""
        return self.graph.split is not None or any(not name.startswith("_") for name in self.graph.fields)

    def rows(self, depth: int, *, single: bool) -> tuple[Look | str, int, bool]:
        """An expression of rows, of how many they are rows, and whether they are ragged."""
        known = [(name, below) for name, below in self.indices if not (single and self.many(name))]
        if depth == 0 or (known and self.flip()):
            names = [*self.roots, *(name for name, _ in known)]
            name = self.of(names)
            ragged = name not in self.roots and Expected(self.graph).is_ragged(name)
            return name, {**self.roots, **dict(known)}[name], ragged
        inner, count, ragged = self.rows(depth - 1, single=single)
        below = self.draw(st.integers(1, 30))
        kind = self.of(["flat", "column", "rows", "deep", "ragged"])
        if kind == "ragged" and self.ragged and not single and not self.wide(inner) and not ragged:
            return Look(self.add(self.row_lengths(count, below)), inner), below, True
        if kind == "column":
            width = self.of(SIZES)
            return Look(self.add(self.numbers((count, width), below)), inner, self.column(width)), below, ragged
        if kind == "rows" and not single and not ragged:
            return Look(self.add(self.numbers((count, self.of(SIZES)), below)), inner), below, False
        if kind == "deep" and not single and not ragged:
            width, more = self.of(SIZES), self.of(SIZES)
            return Look(self.add(self.numbers((count, width, more), below)), inner, self.column(width)), below, False
        return Look(self.add(self.numbers((count,), below)), inner), below, ragged

    def column(self, width: int) -> int:
        return self.draw(st.integers(-width, width - 1))

    def wide(self, rows: Look | str) -> bool:
        """Whether an expression names several rows of each sample."""
        if isinstance(rows, str):
            return rows not in self.roots and self.many(rows)
        graph = Graph(self.graph.tensors, {**self.graph.fields, "_": rows}, split=self.graph.split)
        return bool(Expected(graph).row_shape("_"))

    def many(self, name: str) -> bool:
        expected = Expected(self.graph)
        return bool(expected.row_shape(name)) or expected.is_ragged(name)

    def field(self, number: int) -> None:
        hidden = "_" if self.draw(st.integers(0, 3)) == 0 else ""
        rows, count, ragged = self.rows(self.draw(st.integers(0, 3)), single=False)
        if hidden or self.draw(st.integers(0, 2)) == 0:  # an index, served or not
            name, below = f"{hidden}index{number}", self.draw(st.integers(1, 30))
            if self.ragged and not ragged and not self.wide(rows) and self.flip():
                self.graph.fields[name] = Look(self.add(self.row_lengths(count, below)), rows)
            else:
                self.graph.fields[name] = Look(self.add(self.numbers((count,), below)), rows)
            self.indices.append((name, below))
        else:
            self.leaf(f"field{number}", rows, count)

    def leaf(self, name: str, rows: Look | str, count: int) -> None:
        shape = self.shape(3)
        column = self.column(shape[0]) if shape and self.flip() else None
        tensor = self.add(self.values((count, *shape), self.of(DTYPES)))
        self.graph.fields[name] = Look(tensor, rows, column)

    def pick(self) -> None:
        rows, count, _ = self.rows(self.draw(st.integers(0, 2)), single=True)
        shape, dtype = self.shape(2), self.of(DTYPES)
        tensors = tuple(self.add(self.values((count, *shape), dtype)) for _ in range(self.draw(st.integers(1, 3))))
        shares = [self.draw(st.integers(0, 4)) for _ in range(len(tensors) + 1)]
        shares[-1] += not sum(shares)
        name = self.of(["choice", "_choice"])
        self.graph.fields[name] = Pick(tensors, rows, tuple(share / sum(shares) for share in shares))
        if name.startswith("_") or self.flip():
            self.graph.fields["variant"] = name


@st.composite
def graphs(draw: st.DrawFn, *, ragged: bool | None = None, choice: bool | None = None) -> Graph:
    """A random graph of some fields."""
    maker = _Maker(
        draw,
        ragged=draw(st.booleans()) if ragged is None else ragged,
        choice=draw(st.booleans()) if choice is None else choice,
    )
    return maker.make(draw(st.integers(1, 5)))
