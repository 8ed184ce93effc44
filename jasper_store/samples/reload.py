"""Tensors that are written anew while training runs: read again, checked, and only then swapped in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jasper_store.errors import IntegrityError
from jasper_store.samples.integrity import check_bound

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from jasper_store.samples.graph import Bound
    from jasper_store.samples.integrity import Nouns
    from jasper_store.store.store import TensorStore
    from jasper_store.store.tensors import StoredTensor

__all__ = ["reopened_tensors"]


def reopened_tensors(
    store: TensorStore, names: Sequence[str], bounds: Iterable[Bound], nouns: Nouns
) -> Mapping[str, StoredTensor]:
    """Open tensors as they now stand on disk and check them; the ones in use are not touched.

    Args:
        store: the open store.
        names: the tensors to read again.
        bounds: what values have to be rows of; bounds of other tensors are ignored.
        nouns: what rows are called in errors.

    Raises:
        CorruptFileError, DatasetNotFoundError: a file cannot be read.
        IntegrityError: another shape or dtype, or a value that is no row of what it indexes.
    """
    fresh = store.reopened(names)
    try:
        for tensor in fresh.values():
            _check_alike(tensor, store[tensor.name])
        for bound in bounds:
            if bound.tensor in fresh:
                check_bound(fresh[bound.tensor], bound, nouns)
    except BaseException:
        for tensor in fresh.values():
            tensor.close()
        raise
    return fresh


def _check_alike(new: StoredTensor, old: StoredTensor) -> None:
    if tuple(new.shape) != tuple(old.shape) or new.dtype != old.dtype:
        raise IntegrityError(
            f"the new {new.name} is {list(new.shape)} {new.dtype}, expected {list(old.shape)} {old.dtype} as before;"
            " the old ones stay in use",
            tensor=new.name,
        )
