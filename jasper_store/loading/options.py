"""Options of PyTorch's DataLoader, checked before anything is opened, and the shared memory that workers need."""

from __future__ import annotations

import difflib
import inspect
import shutil
import warnings
from typing import TYPE_CHECKING, Any, Final

from torch.utils.data import DataLoader

from jasper_store.errors import IncompatibleOptionsError, PerformanceWarning, UnknownNameError
from jasper_store.memory.budget import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["check_int", "check_loader_options", "warn_of_small_shared_memory"]

_DECIDED: Final = {
    "dataset": "the dataset is opened from dataset_dir",
    "shuffle": "training shuffles and validation does not; split= and order= decide",
    "sampler": "create_loader makes the sampler, loader.sampler_obj",
    "batch_sampler": "create_loader makes the batch sampler; to use your own, make a DataLoader of a"
    " JASPERSteeringDataset, which is as fast",
}
"""Options of DataLoader that create_loader decides, and why or how."""

_NEED_WORKERS: Final = ("prefetch_factor", "persistent_workers", "timeout", "multiprocessing_context")
_SHARED_MEMORY: Final = "/dev/shm"  # noqa: S108 - not a temporary file: where PyTorch passes tensors


def check_int(name: str, value: Any, *, at_least: int) -> None:
    """Refuse what is not a whole number, or too small a one; True and 2.0 are not whole numbers here.

    Raises:
        IncompatibleOptionsError: naming the option.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise IncompatibleOptionsError(f"{name}={value!r}: expected a whole number, {at_least} or more")


def check_loader_options(batch_size: int, num_workers: int, options: Mapping[str, Any]) -> None:
    """Refuse what DataLoader does not know, what create_loader decides, and what cannot hold together.

    Raises:
        UnknownNameError: DataLoader has no such option; the message lists those that are near.
        IncompatibleOptionsError: anything else, naming both options.
    """
    check_int("batch_size", batch_size, at_least=1)
    known = [name for name in inspect.signature(DataLoader.__init__).parameters if name != "self"]
    for name, value in options.items():
        if name in _DECIDED:
            raise IncompatibleOptionsError(f"create_loader takes no {name}=: {_DECIDED[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; DataLoader has {', '.join(known)}"
            raise UnknownNameError(f"unknown option {name!r} of create_loader and DataLoader{hint}")
        if name in _NEED_WORKERS and value and num_workers == 0:
            raise IncompatibleOptionsError(f"{name}={value!r} needs workers, and num_workers=0; leave {name} out")
    if options.get("in_order") is False:
        raise IncompatibleOptionsError(
            "in_order=False would serve batches in the order in which workers finish, so that no state could say which"
            " samples were served; leave it out"
        )


def warn_of_small_shared_memory(batch_nbytes: int, num_workers: int, options: Mapping[str, Any]) -> None:
    """Warn if batches on their way from workers may not fit into shared memory, which would end in a bus error."""
    if num_workers == 0:
        return
    in_flight = num_workers * (options.get("prefetch_factor") or 2) + 1
    try:
        free = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        return  # no such mount: this system passes tensors in another way
    if batch_nbytes * in_flight > free:
        warnings.warn(
            f"{in_flight} batches of {format_bytes(batch_nbytes)} may be on their way from {num_workers} workers at once,"
            f" but {_SHARED_MEMORY} has {format_bytes(free)} free; workers would die of a bus error. Enlarge it (docker"
            " run --shm-size=8g, or mount -o remount,size=8g /dev/shm), or use fewer workers, a smaller"
            " prefetch_factor or batch_size, or num_workers=0",
            PerformanceWarning,
            stacklevel=3,
        )
