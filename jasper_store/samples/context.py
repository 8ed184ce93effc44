"""What a loader knows of a batch that it asks a dataset for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import torch

from jasper_store.store.resident import empty_rows

if TYPE_CHECKING:
    from jasper_store.samples.draw import VariantSampler

__all__ = ["DIRECT", "PREFETCHED", "GatherContext", "PrefetchedIndices", "StagedBatches"]


class StagedBatches(Protocol):
    """Rows that a loader has read ahead of its batches, as a dataset sees them."""

    def batch(self, positions: torch.Tensor, draw: VariantSampler | None) -> list[torch.Tensor] | None:
        """A whole batch in the order of the graph's keys; ``None`` if it has to be gathered step by step."""

    def rows(self, positions: torch.Tensor, draw: VariantSampler | None) -> Mapping[int, torch.Tensor]:
        """Rows [B, ...] of the nodes that are staged; none if not all of them are there, for this draw."""

    def close(self) -> None:
        """Release them."""


@dataclass(frozen=True, slots=True)
class GatherContext:
    """What a loader knows of a batch that it asks for. Travels with the positions.

    Attributes:
        prefetched: its rows were asked for ahead; without, the dataset asks for them itself.
        staged: rows that were read ahead.
        empty: makes the memory of results of a gather that is one call, on the host, of a shape, a dtype and its bytes.
    """

    prefetched: bool = False
    staged: StagedBatches | None = None
    empty: Callable[[tuple[int, ...], torch.dtype, int], torch.Tensor] = empty_rows


DIRECT: Final = GatherContext()
PREFETCHED: Final = GatherContext(prefetched=True)


class PrefetchedIndices(np.ndarray[Any, np.dtype[np.int64]]):
    """Positions of a batch whose rows were asked for ahead: how :data:`GatherContext.prefetched` reaches a worker."""
