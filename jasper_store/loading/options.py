"""Options of PyTorch's DataLoader, checked before anything is opened, and the shared memory that workers need."""

from __future__ import annotations

import difflib
import inspect
import os
import shutil
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from torch.utils.data import DataLoader

from jasper_store.errors import IncompatibleOptionsError, PerformanceWarning, UnknownNameError
from jasper_store.memory.budget import format_bytes
from jasper_store.store.guard import check_int, check_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jasper_store.store.placement import Plan

__all__ = ["LoaderOptions", "LoaderOrder", "Padding", "warn_of_small_shared_memory"]

LoaderOrder: TypeAlias = Literal["auto", "global", "block"]
Padding: TypeAlias = Literal["wrap", "none"]

_DECIDED: Final = {
    "sampler": "create_loader makes the sampler, loader.sampler_obj",
    "batch_sampler": "create_loader makes the batch sampler; to use your own, make a DataLoader of the dataset, which is"
    " as fast",
}
"""Options of DataLoader that create_loader decides, and why or how."""

_NEED_WORKERS: Final = ("prefetch_factor", "persistent_workers", "timeout", "multiprocessing_context")
_SHARED_MEMORY: Final = "/dev/shm"  # noqa: S108 - not a temporary file: where PyTorch passes tensors


@dataclass(frozen=True)
class LoaderOptions:
    """How a dataset is served; see ``create_loader`` for what each means. Checked when it is made.

    Raises:
        UnknownNameError: no such order, padding or DataLoader option.
        IncompatibleOptionsError: options that are incompatible.
    """

    batch_size: int
    num_workers: int = 0
    distributed: bool = False
    epoch: int | None = None
    drop_last: bool | None = None
    pin_memory: bool | None = None
    shuffle: bool | None = None
    seed: int | None = None
    order: LoaderOrder = "auto"
    padding: Padding = "wrap"
    rank: int | None = None
    world_size: int | None = None
    dataloader: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in (("order", ("auto", "global", "block")), ("padding", ("wrap", "none"))):
            if getattr(self, name) not in known:
                shown = ", ".join(map(repr, known))
                raise UnknownNameError(f"unknown {name} {getattr(self, name)!r}; expected one of {shown}")
        if self.epoch is not None:
            check_int("epoch", self.epoch, at_least=0)
        if self.shuffle is not None and not isinstance(self.shuffle, bool):
            raise IncompatibleOptionsError(f"shuffle={self.shuffle!r}: expected None, True or False")
        check_options(pin_memory=self.pin_memory, num_workers=self.num_workers)
        _check_dataloader(self.batch_size, self.num_workers, self.dataloader)

    def admit(self, plan: Plan) -> None:
        """Refuse a plan that is incompatible with these options, before it is carried out.

        Raises:
            IncompatibleOptionsError: naming both.
        """
        check_options(
            device=plan.device, pin_memory=self.pin_memory, num_workers=self.num_workers, any_mapped=plan.reads_maps
        )


def _check_dataloader(batch_size: int, num_workers: int, options: Mapping[str, Any]) -> None:
    """Refuse what DataLoader does not know, what create_loader decides, and what is incompatible.

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
    """Warn if batches on their way from workers may not fit into shared memory, which would end in a bus error.

    Batches of the default collation need none of it (:mod:`jasper_store.samples.shared_batch`).
    """
    if num_workers == 0 or (options.get("collate_fn") is None and hasattr(os, "memfd_create")):
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
