"""One pass over an input: whether its values can be used, a hash of its content, and a hash of each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from jasper_store.building.rows import Matrix
from jasper_store.errors import IntegrityError
from jasper_store.formats.files import dtype_name
from jasper_store.formats.texts import hash_block
from jasper_store.samples.audit import Tally

__all__ = ["Scan", "digest_of", "scan_embeddings"]

_BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class Scan:
    """What was found.

    Attributes:
        digest: xxh3-128 of dtype, shape and values, in hex.
        row_hashes: xxh3-64 of the bytes of each row, uint64 [n]; equal rows have equal hashes.
    """

    digest: str
    row_hashes: NDArray[np.uint64]

    @property
    def duplicates(self) -> int:
        """Rows that an earlier row equals."""
        return len(self.row_hashes) - len(np.unique(self.row_hashes))


def scan_embeddings(matrix: Matrix, block_rows: int, progress: Callable[[int], None]) -> Scan:
    """Read embeddings [n, D] once; see :class:`Scan`.

    Args:
        matrix: floating embeddings.
        block_rows: rows read at a time.
        progress: called with the number of rows after each block.

    Raises:
        IntegrityError: rows that hold NaN or Inf, or are all zero; tells how many and the first.
    """
    hasher = _hasher(matrix)
    hashes = np.empty(len(matrix), np.uint64)
    not_finite, zero, start = Tally(), Tally(), 0
    for block in matrix.blocks(block_rows):
        wide = block.float() if block.dtype.itemsize < 4 else block  # half precision has no norm on every CPU
        largest = torch.linalg.vector_norm(wide, ord=float("inf"), dim=1)
        not_finite.add(start, ~torch.isfinite(largest))
        zero.add(start, largest == 0)
        raw = _bytes(block)
        hasher.update(raw.data)
        lengths = np.full(len(block), raw.size // max(len(block), 1), np.int64)
        hashes[start : start + len(block)] = hash_block(raw, lengths)
        start += len(block)
        progress(len(block))
    for tally, what, why in (
        (not_finite, "rows with finite values", "hold NaN or Inf"),
        (zero, "rows that have a direction, since cosines are computed", "are all zero"),
    ):
        if tally.count:
            raise IntegrityError(
                f"{matrix.role}: expected {what}, found {tally.count} of {len(matrix)} rows that {why}, the first is row "
                f"{tally.first}; embed these again, or leave them out",
                tensor=matrix.role,
            )
    return Scan(hasher.hexdigest(), hashes)


def digest_of(matrix: Matrix) -> str:
    """xxh3-128 of dtype, shape and values of an input of any shape, in hex."""
    hasher = _hasher(matrix)
    for block in matrix.blocks(_BLOCK_ROWS):
        hasher.update(_bytes(block).data)
    return hasher.hexdigest()


def _hasher(matrix: Matrix) -> xxhash.xxh3_128:
    return xxhash.xxh3_128(f"{dtype_name(matrix.dtype)}{list(matrix.shape)}".encode())


def _bytes(block: torch.Tensor) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = block.contiguous().view(-1).view(torch.uint8).numpy()
    return found
