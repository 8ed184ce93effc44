"""What a build may hold in memory: the numbers of pairs and rows, and blocks of embeddings beside them."""

from __future__ import annotations

from dataclasses import dataclass

from jasper_store.building.clusters import sample_rows
from jasper_store.building.gathered import Inputs
from jasper_store.building.settings import BuildSettings
from jasper_store.errors import InsufficientMemoryError
from jasper_store.memory import budget
from jasper_store.memory.sizes import format_bytes

__all__ = ["Memory"]

_BLOCK_ROWS = 4096
_FEWEST_ROWS = 16
_TEMPORARIES = 80  # bytes of intermediate results for each number of a block: float64, a few at a time
_OF_PAIR, _OF_NEGATIVE, _OF_ROW = 64, 32, 32
"""Bytes for each pair (rows, cluster, group, split, and the sorting of them), negative (row, tier, cosine), and question
or source (hash, cluster, and the sorting of them)."""


@dataclass(frozen=True)
class Memory:
    """How a build divides its budget.

    Attributes:
        free: bytes for blocks, once what is held throughout is subtracted.
        block_rows: rows of embeddings at a time.
        kept_nbytes: bytes that finished stages keep on the disk.
    """

    free: int
    block_rows: int
    kept_nbytes: int

    @classmethod
    def measure(cls, inputs: Inputs, settings: BuildSettings, clusters: int, memory_limit: int | str | None) -> Memory:
        """Divide the budget that there is now.

        Raises:
            IncompatibleOptionsError: ``memory_limit`` is not a size.
            InsufficientMemoryError: it does not hold what is held throughout; with the numbers.
        """
        found = budget.measure(memory_limit)
        pairs, rows = len(inputs.pairs), len(inputs.questions) + len(inputs.sources)
        numbers = pairs * (_OF_PAIR + _OF_NEGATIVE * settings.n_neg) + rows * _OF_ROW
        centroids = clusters * inputs.dim * 12
        sampled = 0
        if not isinstance(inputs.clusters, tuple):
            sampled = sample_rows(len(inputs.sources), clusters, inputs.dim) * inputs.dim * 8
        each = _TEMPORARIES * inputs.dim + 16 * clusters
        needed = numbers + centroids + max(sampled, _FEWEST_ROWS * each)
        if needed > found.nbytes:
            msg = (
                f"building needs {format_bytes(needed)} of memory: {format_bytes(numbers)} for the numbers of {pairs:,} pairs and "
                f"{rows:,} rows, the rest for {clusters:,} clusters, and the budget is {format_bytes(found.nbytes)} "
                f"({found.winner.name}); raise memory_limit=, or pass fewer clusters="
            )
            raise InsufficientMemoryError(msg, needed=needed, available=found.nbytes)
        free = found.nbytes - numbers - centroids
        block_rows = min(max(free // 2 // each, _FEWEST_ROWS), _BLOCK_ROWS)
        kept = rows * 8 + pairs * (8 + 24 * settings.n_neg) * 2 + centroids
        return cls(free, block_rows, kept)
