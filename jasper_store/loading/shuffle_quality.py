"""How well an order mixes, in figures: what a block order gives away for reading runs of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jasper_store.errors import IncompatibleOptionsError

if TYPE_CHECKING:
    from jasper_store.loading.order import Order

__all__ = ["ShuffleQuality", "shuffle_quality"]


@dataclass(frozen=True)
class ShuffleQuality:
    """How well an order mixes, against a full shuffle of the same length. All are shares, free of units.

    Attributes:
        displacement: mean of |position in the file - position in the epoch| over n; a full shuffle has 1/3.
        displacement_gap: largest difference between the distribution of that distance and a full shuffle's
            (Kolmogorov-Smirnov); 0 is the same, 1 the farthest.
        neighbours: mean distance in the epoch of two rows that are neighbours in the file, over n; a full
            shuffle has 1/3. This is what a block order gives away.
    """

    displacement: float
    displacement_gap: float
    neighbours: float

    def __str__(self) -> str:
        return (
            f"displacement {self.displacement:.3f} n (full shuffle 0.333 n, largest gap {self.displacement_gap:.3f}), "
            f"file neighbours {self.neighbours:.4f} n apart (full shuffle 0.333 n)"
        )


def shuffle_quality(permutation: Order) -> ShuffleQuality:
    """Measure an order by computing all of it: about 50 bytes of memory per sample.

    Raises:
        IncompatibleOptionsError: the order has fewer than two positions, so there is nothing to compare.
    """
    n = permutation.n
    if n < 2:
        msg = f"shuffle_quality() needs an order of at least 2 samples, got {n}"
        raise IncompatibleOptionsError(msg)
    index = permutation[:].numpy()
    place = np.empty_like(index)
    place[index] = np.arange(n)
    distance = np.sort(np.abs(index - np.arange(n)) / n)
    expected = distance * (2 - distance)
    observed = np.arange(1, n + 1) / n
    return ShuffleQuality(
        displacement=float(distance.mean()),
        displacement_gap=float(np.abs(observed - expected).max()),
        neighbours=float(np.abs(np.diff(place)).mean() / n),
    )
