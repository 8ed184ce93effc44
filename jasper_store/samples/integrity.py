"""Index checks: whether values are rows of what they index. Read in blocks, once; the manifest records the result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

import torch

from jasper_store.errors import IntegrityError

if TYPE_CHECKING:
    from jasper_store.samples.graph import Bound
    from jasper_store.store.store import TensorStore
    from jasper_store.store.tensors import StoredTensor

__all__ = ["Nouns", "check_bound", "check_bounds_once", "distinct_bounds", "unrecorded"]

_BLOCK_ROWS: Final = 1 << 20
_PASSED: Final[ContextVar[set[tuple[str, str]] | None]] = ContextVar("passed", default=None)
"""Checks that passed in an :func:`unrecorded` context, with path and digest of the files; ``None`` outside of one."""

Nouns = Mapping[str, tuple[str, str]]
"""What a row of a tensor is called, one and several: ``{"source_embs": ("source", "sources")}``."""


def check_bounds_once(store: TensorStore, bounds: Iterable[Bound], nouns: Nouns | None = None) -> None:
    """Check bounds, but for those that the manifest says these very files have passed before.

    Raises:
        IntegrityError: the message names tensor, position, value and bound.
    """
    passed, files = _PASSED.get(), f"{store.path} {store.digest}"
    unchecked = {name: bound for name, bound in distinct_bounds(bounds).items() if not store.is_verified(name)}
    if passed is not None:
        unchecked = {name: bound for name, bound in unchecked.items() if (files, name) not in passed}
    for bound in unchecked.values():
        check_bound(store[bound.tensor], bound, nouns)
    if passed is not None:
        passed.update((files, name) for name in unchecked)
    elif unchecked:
        store.record_checks(list(unchecked))


@contextmanager
def unrecorded() -> Iterator[None]:
    """Check bounds without a record in the manifest: for commands that only look, and write nothing.

    What passed is kept in memory instead, until the end of the outermost of these contexts, so that opening the same
    files again within it does not check them again. Of this thread and its tasks only.
    """
    if _PASSED.get() is not None:
        yield
        return
    token = _PASSED.set(set())
    try:
        yield
    finally:
        _PASSED.reset(token)


def distinct_bounds(bounds: Iterable[Bound]) -> dict[str, Bound]:
    """Bounds, one for each different check; targets with the same number of rows need the same check."""
    return {str(bound): bound for bound in reversed(list(bounds))}


def check_bound(tensor: StoredTensor, bound: Bound, nouns: Nouns | None = None) -> None:
    """Check that the values of one tensor, or of one of its columns, are rows of another.

    Args:
        tensor: the index tensor.
        bound: what its values are rows of.
        nouns: what rows are called in the message.

    Raises:
        IntegrityError: the message names tensor, position, value and bound.
    """
    start, last = 0, 0
    for block in tensor.blocks(_BLOCK_ROWS):
        values = block if bound.column is None else block[:, bound.column]
        if bound.offsets:
            last = _check_offsets(tensor, bound, values.long(), start, last)
        elif values.numel():
            low, high = (int(value) for value in torch.aminmax(_comparable(values)))
            if low < 0 or high >= bound.n_rows:
                raise _out_of_bounds(bound, values, start, nouns or {})
        start += len(block)
    if bound.offsets and last != bound.n_rows:
        name = tensor.name.removesuffix(".offsets")
        raise IntegrityError(
            f"{name}: its offsets end at {last}, expected {bound.n_rows}, the number of its values; the file is damaged:"
            " convert the dataset again",
            tensor=name,
        )


def _comparable(values: torch.Tensor) -> torch.Tensor:
    return values.long() if values.dtype in {torch.uint16, torch.uint32, torch.uint64} else values


def _check_offsets(tensor: StoredTensor, bound: Bound, values: torch.Tensor, start: int, last: int) -> int:
    """Check that offsets ascend from 0; returns the last one."""
    steps = torch.diff(values, prepend=values.new_tensor([last]))
    if len(values) and (
        int(steps.min()) < 0 or int(values.max()) > bound.n_rows or (start == 0 and int(values[0]) != 0)
    ):
        name = tensor.name.removesuffix(".offsets")
        position = start + int(((steps < 0) | (values > bound.n_rows)).nonzero().view(-1)[:1].sum())
        raise IntegrityError(
            f"{name}: its offsets should ascend from 0 to {bound.n_rows}, and do not at position {position}; the file is"
            " damaged: convert the dataset again",
            tensor=name,
        )
    return int(values[-1]) if len(values) else last


def _out_of_bounds(bound: Bound, values: torch.Tensor, start: int, nouns: Nouns) -> IntegrityError:
    values = values.long()
    position = ((values < 0) | (values >= bound.n_rows)).nonzero()[0].tolist()
    value = int(values[tuple(position)])
    position[0] += start
    if bound.column is not None:
        position.insert(1, bound.column)
    name = bound.tensor.removesuffix(".values")
    one, several = nouns.get(bound.target, ("row", "rows"))
    what = f"{one} {value}" if bound.target in nouns else f"row {value} of {bound.target}"
    return IntegrityError(
        f"{name} references {what}, but only {bound.n_rows} {several} exist"
        f" (at position {position}; valid rows are 0 to {bound.n_rows - 1}); rebuild {name} or restore the missing rows",
        tensor=name,
    )
