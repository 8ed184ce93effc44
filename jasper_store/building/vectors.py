"""Rows of embeddings, read in blocks: checked once, then served as they are or at length 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Protocol

import numpy as np
import torch
import xxhash

from jasper_store.building.similarity import dots
from jasper_store.errors import IntegrityError

__all__ = ["RowSource", "Vectors", "require_matrix", "scan"]

_BLOCK_NBYTES: Final = 2 << 20


class RowSource(Protocol):
    """Rows of floating numbers by their numbers; a stored tensor is one.

    ``take`` may be called from one thread at a time, and returns an owned tensor in host memory.
    """

    @property
    def shape(self) -> Any:
        """Sizes [n, D]."""

    def take(self, rows: Any, /) -> torch.Tensor:
        """Rows [len(rows), D] of an int64 tensor of row numbers."""


class Vectors:
    """Embeddings that were checked: every row is finite and has a direction.

    Attributes:
        name: what they are called in errors.
        n_rows: number of rows.
        dim: number of columns.
        norms: lengths of the rows, float64 [n_rows].
        digest: hash of all values, in hex.
        hashes: hash of each row's bytes, uint64 [n_rows, 2]; ``None`` unless asked for.
    """

    def __init__(self, source: RowSource, name: str, norms: np.ndarray, digest: str, hashes: np.ndarray | None) -> None:
        self._source = source
        self.name = name
        self.n_rows, self.dim = int(source.shape[0]), int(source.shape[1])
        self.norms = norms
        self.digest = digest
        self.hashes = hashes

    def raw(self, rows: np.ndarray) -> torch.Tensor:
        """Rows as they are stored, on the host."""
        return self._source.take(torch.from_numpy(np.ascontiguousarray(rows, np.int64))).cpu()

    def unit(self, rows: np.ndarray) -> torch.Tensor:
        """Rows at length 1, float32."""
        values = self.raw(rows).to(torch.float64)
        return values.div_(torch.from_numpy(self.norms[rows])[:, None]).to(torch.float32)


def require_matrix(source: RowSource, name: str) -> None:
    """Refuse what has another shape than [n, D] with D of at least 1.

    Raises:
        IntegrityError: it has.
    """
    if len(source.shape) != 2 or int(source.shape[1]) < 1:
        msg = f"{name}: expected embeddings of shape [n, D], found {list(source.shape)}; pass a row for each text"
        raise IntegrityError(msg, tensor=name)


def scan(source: RowSource, name: str, *, hash_rows: bool) -> Vectors:
    """Read all rows once: check them, measure their lengths, and hash them.

    Args:
        source: the rows, [n, D].
        name: what they are called in errors.
        hash_rows: whether to hash each row, too.

    Raises:
        IntegrityError: rows that are no floating numbers, a row with NaN or Inf, or one of zeros.
    """
    count = int(source.shape[0])
    norms = np.empty(count)
    hashes = np.empty((count, 2), np.uint64) if hash_rows else None
    digest = xxhash.xxh3_128()
    for start, values in _blocks(source):
        if not values.is_floating_point():
            msg = f"{name}: expected floating numbers, found {values.dtype}; convert them to float32"
            raise IntegrityError(msg, tensor=name)
        stop = start + len(values)
        norms[start:stop] = np.sqrt(dots(values, values))
        _require_directions(norms[start:stop], start, name)
        data = values.contiguous().view(torch.uint8).numpy()
        digest.update(data.data)
        if hashes is not None:
            hashes[start:stop] = _row_hashes(data)
    digest.update(f"{count} {source.shape[1]}".encode())
    return Vectors(source, name, norms, digest.hexdigest(), hashes)


def _blocks(source: RowSource) -> Iterator[tuple[int, torch.Tensor]]:
    count = int(source.shape[0])
    step = max(_BLOCK_NBYTES // (4 * int(source.shape[1])), 1)
    for start in range(0, count, step):
        yield start, source.take(torch.arange(start, min(start + step, count))).cpu()


def _require_directions(norms: np.ndarray, start: int, name: str) -> None:
    bad = ~(np.isfinite(norms) & (norms > 0))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        what = "is all zeros, and has no direction" if norms[row] == 0 else "holds NaN or Inf"
        msg = (
            f"{name}: expected finite rows other than zero, found {int(bad.sum())} in the block that begins at row {start}: "
            f"row {start + row} {what}; embed it again, or leave it out"
        )
        raise IntegrityError(msg, tensor=name)


def _row_hashes(data: np.ndarray) -> np.ndarray:
    """xxh3-128 of each row's bytes, as two numbers [n, 2]."""
    digests = b"".join([xxhash.xxh3_128_digest(row) for row in data])
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)
