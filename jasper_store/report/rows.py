"""Which rows a report looks at: of bounded number, and the same ones each time."""

from __future__ import annotations

import torch

from jasper_store.store.tensors import StoredTensor

__all__ = ["SCALARS", "distinct", "random_rows", "spread", "unit"]

SCALARS = 1 << 22
"""Numbers that are looked at, of a tensor of more."""

_RUNS = 256


def spread(tensor: StoredTensor, at_most: int = SCALARS, runs: int = _RUNS) -> torch.Tensor:
    """All rows of a tensor, or ``at_most`` of them in runs of neighbours, spread evenly; an owned copy."""
    if tensor.n_rows <= at_most:
        return tensor[:].clone()
    length = at_most // runs
    starts = torch.linspace(0, tensor.n_rows - length, runs, dtype=torch.float64).long().tolist()
    return torch.cat([tensor[start : start + length] for start in starts])


def random_rows(n: int, at_most: int) -> torch.Tensor:
    """Rows in ascending order, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    if n <= 4 * at_most:
        return torch.randperm(n, generator=generator)[:at_most].sort().values
    return distinct(torch.randint(n, (at_most,), generator=generator))


def distinct(values: torch.Tensor) -> torch.Tensor:
    """Each value once, in ascending order."""
    found: torch.Tensor = torch.unique(values)
    return found


def unit(values: torch.Tensor) -> torch.Tensor:
    """Embeddings as float32 of length 1, along the last dimension; zeros stay zeros."""
    found: torch.Tensor = torch.nn.functional.normalize(values.float(), dim=-1)
    return found
