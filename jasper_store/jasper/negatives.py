"""Hard negatives that are mined anew while training runs: read again, checked, and only then swapped in."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Final

from jasper_store.errors import IntegrityError, JasperStoreWarning
from jasper_store.jasper.integrity import check_bounds
from jasper_store.jasper.opened import OpenedDataset
from jasper_store.store.tensors import StoredTensor

__all__ = ["NEGATIVE_TENSORS", "reopened_negatives", "warn_kept"]

NEGATIVE_TENSORS: Final = ("hard_negatives", "negative_tiers")


def reopened_negatives(opened: OpenedDataset) -> Mapping[str, StoredTensor]:
    """Open the negatives as they now stand on disk and check them; the store in use is not touched.

    Raises:
        CorruptFileError, DatasetNotFoundError: a file cannot be read.
        IntegrityError: another shape or dtype, or a negative that is not a source row.
    """
    fresh = opened.store.reopened(NEGATIVE_TENSORS)
    try:
        for tensor in fresh.values():
            _check_alike(tensor, opened.store[tensor.name])
        check_bounds(fresh["hard_negatives"], None, "sources", opened.sizes["sources"])
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


def warn_kept(error: Exception) -> None:
    """Say in a worker that the new negatives could not be read and the old ones stay in use."""
    warnings.warn(
        f"new negatives could not be read in this worker, the old ones stay in use: {error}",
        JasperStoreWarning,
        stacklevel=2,
    )
