"""Checks of a declared dataset's values: indices of rows that do not exist, and values that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from jasper_store.conversion.verify import Finding
from jasper_store.errors import IntegrityError, JasperStoreError
from jasper_store.samples.compiler import build_graph
from jasper_store.samples.graph import Bound
from jasper_store.samples.integrity import Nouns, check_bound, distinct_bounds

if TYPE_CHECKING:
    from jasper_store.samples.declaration import Declaration
    from jasper_store.store.store import TensorStore
    from jasper_store.store.tensors import StoredTensor

__all__ = ["FiniteVisitor", "Tally", "bound_findings", "declared_findings"]


@dataclass(slots=True)
class Tally:
    """How often something was seen, and where first."""

    count: int = 0
    first: int = -1

    def add(self, start: int, rows: torch.Tensor) -> None:
        """Count the true elements of ``rows`` [n]."""
        seen = int(rows.sum())
        if seen and self.first < 0:
            self.first = start + int(rows.nonzero()[0])
        self.count += seen


@dataclass(slots=True)
class FiniteVisitor:
    """NaN and Inf in a floating tensor, row by row."""

    tensor: str
    not_finite: Tally = field(default_factory=Tally)

    def visit(self, start: int, rows: torch.Tensor) -> None:
        """Check a block of rows [n, ...]; another dtype is ignored."""
        if rows.ndim and rows.is_floating_point():
            self.not_finite.add(start, ~torch.isfinite(rows.reshape(len(rows), -1)).all(dim=1))

    def findings(self) -> list[Finding]:
        """An error for rows that are not finite."""
        if not self.not_finite.count:
            return []
        text = (
            f"{self.not_finite.count} rows hold NaN or Inf, the first is row {self.not_finite.first}; write them again"
        )
        return [Finding("error", self.tensor, "finite", text, self.not_finite.first)]


def declared_findings(store: TensorStore, declaration: Declaration) -> Iterator[Finding]:
    """Whether the declaration fits the tensors, and every value that names a row names one that exists."""
    bounds: list[Bound] = []
    try:
        for split in declaration.parts:
            bounds += build_graph(declaration, store, split).bounds
    except JasperStoreError as exc:
        yield Finding("error", exc.tensor or "dataset", "structure", str(exc), None)
    yield from bound_findings(store, bounds)


def bound_findings(store: TensorStore, bounds: Iterable[Bound], nouns: Nouns | None = None) -> Iterator[Finding]:
    """An error for each index tensor that names a row that does not exist."""
    for bound in distinct_bounds(bounds).values():
        problem = _problem(store[bound.tensor], bound, nouns)
        if problem is not None:
            yield Finding("error", problem.tensor or bound.tensor, "index bounds", str(problem), None)


def _problem(tensor: StoredTensor, bound: Bound, nouns: Nouns | None) -> IntegrityError | None:
    try:
        check_bound(tensor, bound, nouns)
    except IntegrityError as exc:
        return exc
    return None
