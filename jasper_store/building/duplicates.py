"""Sources that are the same to the last byte: rows grouped by the hash of their bytes."""

from __future__ import annotations

import numpy as np

__all__ = ["Groups", "group_rows"]


class Groups:
    """Which rows have the same bytes.

    Attributes:
        of_row: number of each row's group, int64 [rows].
        starts: where each group begins in :attr:`members`, int64 [groups + 1].
        members: positions of the rows, group by group, ascending in each.
    """

    def __init__(self, of_row: np.ndarray, position: np.ndarray) -> None:
        """Groups by row, and the position of each row in the order that sources are read in."""
        self.of_row = of_row
        count = int(of_row.max()) + 1 if len(of_row) else 0
        order = np.lexsort((position, of_row))
        self.members = position[order]
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(of_row, minlength=count))]).astype(np.int64)

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each group [groups]."""
        return np.diff(self.starts)

    def expanded(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Members of several groups: for each its place in ``groups``, and its position."""
        sizes = self.sizes[groups]
        which = np.repeat(np.arange(len(groups)), sizes)
        first = np.cumsum(sizes) - sizes
        within = np.arange(len(which)) - first[which]
        return which, self.members[self.starts[groups][which] + within]


def group_rows(hashes: np.ndarray) -> np.ndarray:
    """Number of the group of each row, int64 [n], from hashes uint64 [n, 2].

    128 bits of xxh3 stand for the bytes here as they do in the manifest.
    """
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    new = np.ones(len(hashes), np.int64)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    found = np.empty(len(hashes), np.int64)
    found[order] = np.cumsum(new) - 1
    return found
