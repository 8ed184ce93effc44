"""Random graphs over random tensors, and what numpy makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from jasper_store.samples.draw import draw_variants

DTYPES = ("uint8", "int8", "int16", "int32", "int64", "bool", "float16", "bfloat16", "float32", "float64")
INDEX_DTYPES = ("uint8", "int8", "int16", "int32", "int64")


@dataclass
class Case:
    """Tensors, the declaration of a sample, and the same as functions of rows.

    Attributes:
        tensors: by stored name; a ragged one is a list of arrays.
        fields: expressions by field.
        oracle: function of (positions, rows) by field; of a ragged field a list of arrays.
        splits: as declared.
        length: samples.
    """

    tensors: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    oracle: dict[str, Any] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    length: int = 0


def values(random: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random values of a dtype, every bit pattern that is a number of it."""
    if dtype == "bool":
        return torch.from_numpy(random.integers(0, 2, shape).astype(bool))
    made = torch.from_numpy(random.normal(0, 40, shape)) if shape else torch.tensor(3.0)
    return made.to(getattr(torch, dtype))


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array with equal bits; numpy has no bfloat16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class Maker:
    """Draws a case. ``rng`` decides everything, so a case is its seed."""

    def __init__(self, seed: int, *, ragged: bool, choice: bool, split: bool) -> None:
        self.random = np.random.default_rng(seed)
        self.case = Case()
        self.count = 0
        n = int(self.random.integers(1, 60))
        self.rows = n
        if split:
            self.case.length = int(self.random.integers(1, 40))
            self.case.splits = {"train": "listed"}
            self.case.tensors["listed"] = torch.from_numpy(self.random.integers(0, n, self.case.length))
            self.root = "row"
        else:
            self.case.length = n
            self.root = str(self.random.choice(["i", "row"]))
        for number in range(int(self.random.integers(1, 5))):
            self.plain(f"f{number}")
        if ragged:
            self.ragged()
        if choice:
            self.choice()

    def name(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def tensor(self, rows: int, *, columns: bool = False) -> str:
        """A tensor to serve."""
        name, dims = self.name(), int(self.random.integers(0, 3))
        shape = [rows, *(int(self.random.integers(1, 6)) for _ in range(max(dims, columns)))]
        self.case.tensors[name] = values(self.random, str(self.random.choice(DTYPES)), tuple(shape))
        return name

    def index(self, rows: int, bound: int, shape: tuple[int, ...]) -> str:
        name, dtype = self.name(), str(self.random.choice(INDEX_DTYPES if bound < 100 else INDEX_DTYPES[2:]))
        found = self.random.integers(0, bound, (rows, *shape))
        self.case.tensors[name] = torch.from_numpy(found.astype(dtype))
        return name

    def path(self, depth: int) -> tuple[str, Any, int]:
        """Rows: an expression, a function of root rows, and the rows of what it indexes."""
        if depth == 0:
            return self.root, lambda root: root, self.rows
        inner, follow, rows = self.path(depth - 1)
        bound = int(self.random.integers(1, 50))
        kind = int(self.random.integers(0, 4))
        if kind == 0:
            name = self.index(rows, bound, ())
            table = self.case.tensors[name].numpy().astype(np.int64)
            return f"{name}[{inner}]", lambda root: table[follow(root)], bound
        width = int(self.random.integers(1, 4)) if kind < 3 else int(self.random.integers(9, 20))
        name = self.index(rows, bound, (width,))
        table = self.case.tensors[name].numpy().astype(np.int64)
        if kind == 1:
            return f"{name}[{inner}]", lambda root: table[follow(root)], bound
        column = int(self.random.integers(-width, width))
        return f"{name}[{inner}, {column}]", lambda root: table[follow(root)][..., column], bound

    def plain(self, key: str) -> None:
        expression, follow, rows = self.path(int(self.random.integers(0, 4)))
        with_column = bool(self.random.integers(0, 3) == 0)
        name = self.tensor(rows, columns=with_column)
        table = self.case.tensors[name]
        if self.random.integers(0, 3) == 0 and expression != self.root:
            self.case.fields[f"_{key}"] = expression
            expression = f"_{key}"
        array = numpy_of(table)
        if with_column:
            column = int(self.random.integers(-table.shape[1], table.shape[1]))
            self.case.fields[key] = f"{name}[{expression}, {column}]"
            self.case.oracle[key] = lambda _, root: array[:, column][follow(root)]
        else:
            self.case.fields[key] = f"{name}[{expression}]"
            self.case.oracle[key] = lambda _, root: array[follow(root)]

    def ragged(self) -> None:
        bound = int(self.random.integers(1, 50))
        lists = [self.random.integers(0, bound, int(self.random.integers(0, 5))) for _ in range(self.rows)]
        self.case.tensors["bag"] = lists
        target = self.tensor(bound)
        array = numpy_of(self.case.tensors[target])
        self.case.fields |= {"bag_rows": f"bag[{self.root}]", "bag_values": f"{target}[bag[{self.root}]]"}
        self.case.oracle["bag_rows"] = lambda _, root: [lists[row] for row in root]
        self.case.oracle["bag_values"] = lambda _, root: [array[lists[row]] for row in root]

    def choice(self) -> None:
        from jasper_store.samples.declaration import Choice, Variant

        first = self.tensor(self.rows)
        second = self.name()
        self.case.tensors[second] = values(
            self.random,
            str(self.case.tensors[first].dtype).removeprefix("torch."),
            tuple(self.case.tensors[first].shape),
        )
        probabilities = (0.3, 0.3, 0.4)
        self.case.fields |= {"chosen": Choice((first, second), probabilities, self.root), "which": Variant("chosen")}
        tables = [numpy_of(self.case.tensors[name]) for name in (first, second)]

        def which(root: np.ndarray) -> np.ndarray:
            return draw_variants(torch.from_numpy(root), 42, 0, probabilities).numpy()

        def chosen(_: Any, root: np.ndarray) -> np.ndarray:
            out = np.zeros((len(root), *tables[0].shape[1:]), tables[0].dtype)
            for position, (row, variant) in enumerate(zip(root, which(root), strict=True)):
                if variant:
                    out[position] = tables[variant - 1][row]
            return out

        self.case.oracle |= {"chosen": chosen, "which": lambda _, root: which(root)}


def expected(case: Case, positions: np.ndarray) -> dict[str, np.ndarray]:
    """The batch at positions, as numpy makes it; ragged fields as values and offsets."""
    root = case.tensors["listed"].numpy()[positions] if case.splits else positions
    found: dict[str, np.ndarray] = {}
    for key, look_up in case.oracle.items():
        got = look_up(positions, root)
        if isinstance(got, list):
            found[f"{key}.offsets"] = np.concatenate([[0], np.cumsum([len(row) for row in got], dtype=np.int64)])
            found[f"{key}.values"] = np.concatenate(got) if got else np.zeros(0)
        else:
            found[key] = got
    return found
