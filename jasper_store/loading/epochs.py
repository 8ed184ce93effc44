"""Moving everything that has an epoch to the same one, whatever a trainer has wrapped around it."""

from __future__ import annotations

import warnings
from typing import Any, Final

from jasper_store.errors import IncompatibleOptionsError, JasperStoreWarning
from jasper_store.store.guard import check_int

__all__ = ["set_epoch", "warn_same_epoch"]

#: Where wrappers of loaders, samplers and datasets keep what they wrap: ours, Lightning's, Accelerate's, PyTorch's.
_INSIDE: Final = (
    "loader",
    "dataloader",
    "_dataloader",
    "base_dataloader",
    "batch_sampler",
    "sampler",
    "dataset",
    "datasets",
)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell dataset, sampler and batch sampler the epoch, together; call it before each epoch of training.

    Works on loaders of ``create_loader``, on plain ``DataLoader``s, and through wrappers: ``to_device``,
    Lightning Fabric's and Accelerate's loaders, ``Subset`` and ``ConcatDataset``.

    Args:
        loader: the loader.
        epoch: number of the epoch, from 0.

    Raises:
        IncompatibleOptionsError: the epoch is not a number from 0 on, or nothing in the loader has an epoch.
    """
    check_int("epoch", epoch, at_least=0)
    if not _tell(loader, epoch, set()):
        raise IncompatibleOptionsError(
            f"nothing in this {type(loader).__name__} has an epoch to set: neither its dataset nor its sampler has a"
            " set_epoch method; pass a loader over a dataset of jasper_store"
        )


def _tell(thing: Any, epoch: int, seen: set[int]) -> bool:
    """Tell an object and what it wraps, each once; whether any had an epoch."""
    if thing is None or id(thing) in seen:
        return False
    seen.add(id(thing))
    if isinstance(thing, (list, tuple)):
        return sum(_tell(part, epoch, seen) for part in thing) > 0
    tell: Any = getattr(thing, "set_epoch", None)
    told = 0
    if callable(tell):
        tell(epoch)
        told = 1
    inside = [getattr(thing, name, None) for name in _INSIDE]
    # All of them are told, not only the first that has an epoch, as any() would.
    return sum(_tell(part, epoch, seen) for part in inside if _is_wrapped(part)) + told > 0


def _is_wrapped(part: Any) -> bool:
    """Whether an attribute can hold a wrapped object; plain data that happens to have such a name is skipped."""
    return part is not None and not isinstance(part, (str, bytes, int, float, dict))


def warn_same_epoch(epoch: int) -> None:
    """Warn that a pass begins with the epoch of the pass before it."""
    warnings.warn(
        f"a second pass begins with epoch {epoch} again, so it serves the same batches in the same order with the same"
        " steering; call jasper_store.set_epoch(loader, epoch) before each epoch",
        JasperStoreWarning,
        stacklevel=5,  # the caller that asked for the first batch
    )
