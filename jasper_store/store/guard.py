"""Which options may not go together. Decided from configuration alone: no file, no page and no device is touched.

============================  ==============================================================================
refused                       because
============================  ==============================================================================
map + CUDA device             pages of a file cannot live on a device; each step would fault and copy
map + pin_memory=True         pinning copies every batch out of pages that may have to be read from disk first,
                              in a thread that then stalls the loader
CUDA-resident + num_workers   a CUDA context does not survive a fork, and a spawned worker would hold a copy
CUDA-resident + pin_memory    pinned memory is host memory; there is nothing left to copy
============================  ==============================================================================
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from jasper_store.errors import IncompatibleOptionsError
from jasper_store.formats.files import dtype_name
from jasper_store.memory.sizes import nbytes_of

if TYPE_CHECKING:
    from typing import NoReturn, TypeGuard

__all__ = ["check_int", "check_options", "is_cuda", "normalize_device", "resolve_pin_memory"]

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
NARROW = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def check_options(
    *,
    use_mmap: bool | None = None,
    device: str | torch.device | None = None,
    pin_memory: bool | None = None,
    num_workers: int = 0,
    any_mapped: bool | None = None,
    dtype: torch.dtype | None = None,
    memory_limit: int | str | None = None,
) -> int | None:
    """Refuse options that are incompatible. Needs no CUDA on the machine and initialises none.

    Call it with what the user asked for before anything is opened, and again with ``any_mapped`` and the plan's
    device once a plan is known.

    Args:
        use_mmap: ``None`` plans, ``True`` maps everything, ``False`` preloads everything.
        device: ``None`` or ``"cpu"`` for the host, ``"cuda"``, ``"cuda:N"`` or ``"auto"``.
        pin_memory: of the loader; ``None`` decides by itself.
        num_workers: of the loader.
        any_mapped: whether the plan maps anything that a batch reads; ``None`` before there is a plan.
        dtype: floating dtype to convert to while loading.
        memory_limit: bytes, or a text such as ``"8GiB"``.

    Returns:
        ``memory_limit`` in bytes.

    Raises:
        IncompatibleOptionsError: naming both options and what to change.
    """
    _check_types(use_mmap, pin_memory, num_workers, dtype)
    limit = None if memory_limit is None else nbytes_of(memory_limit, "memory_limit")
    device = normalize_device(device)
    if is_cuda(device):
        if use_mmap or any_mapped:
            _refuse(
                f"use_mmap=True with device={device!r}" if use_mmap else f"mapped tensors with device={device!r}",
                "a map shows pages of a file, which cannot live on a CUDA device",
                f"use_mmap=False with device={device!r} (preload onto the device), or use_mmap=True with device=None "
                "and move each batch to the device (jasper_store.to_device)",
            )
        if num_workers > 0:
            _refuse(
                f"device={device!r} with num_workers={num_workers}",
                "worker processes cannot share data that is resident on a CUDA device",
                "num_workers=0 (a batch on the device costs a few microseconds), or device=None with workers",
            )
        if pin_memory:
            _refuse(
                f"device={device!r} with pin_memory=True",
                "pinned memory is host memory, and this data is resident on a CUDA device",
                "pin_memory=False or None, or device=None",
            )
    if pin_memory and (use_mmap or any_mapped):
        _refuse(
            "use_mmap=True with pin_memory=True" if use_mmap else "mapped tensors with pin_memory=True",
            "pinning copies every batch out of pages that may still have to be read from disk",
            "pin_memory=False or None, or use_mmap=False (preload, then pin)",
        )
    if dtype is not None and use_mmap:
        _refuse(
            f"use_mmap=True with dtype={dtype}",
            "a map shows the bytes as they are stored, and dtype converts them while loading",
            f"use_mmap=None or False with dtype, or convert the files once (jasper-store convert --dtype {dtype_name(dtype)})",
        )
    return limit


def resolve_pin_memory(pin_memory: bool | None, *, any_mapped: bool, device: str | None, cuda_available: bool) -> bool:
    """What ``pin_memory=None`` means: pinned when CUDA is present, nothing is mapped and the data is on the host."""
    if pin_memory is None:
        return cuda_available and not any_mapped and not is_cuda(device)
    return pin_memory


def normalize_device(device: str | torch.device | None) -> str | None:
    """A device as text: ``None`` for the host, else ``"auto"``, ``"cuda"`` or ``"cuda:N"``.

    Raises:
        IncompatibleOptionsError: any other device.
    """
    text = None if device is None else str(device)
    if text is not None and not _DEVICE.fullmatch(text):
        msg = f"device={text!r}: expected None, 'cpu', 'cuda', 'cuda:N' or 'auto'; other devices hold no data here"
        raise IncompatibleOptionsError(msg)
    return None if text == "cpu" else text


def is_cuda(device: str | None) -> TypeGuard[str]:
    """Whether a normalized device is a CUDA device; ``"auto"`` is not one yet."""
    return device is not None and device.startswith("cuda")


def check_int(name: str, value: Any, *, at_least: int) -> None:
    """Refuse what is not a whole number, or too small a one; True and 2.0 are not whole numbers here.

    Raises:
        IncompatibleOptionsError: naming the option.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise IncompatibleOptionsError(f"{name}={value!r}: expected a whole number, {at_least} or more")


def _check_types(use_mmap: Any, pin_memory: Any, num_workers: Any, dtype: Any) -> None:
    """Refuse types that would otherwise be read as true or false."""
    for name, value in (("use_mmap", use_mmap), ("pin_memory", pin_memory)):
        if value is not None and not isinstance(value, bool):
            msg = f"{name}={value!r}: expected None, True or False"
            raise IncompatibleOptionsError(msg)
    if not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 0:
        msg = f"num_workers={num_workers!r}: expected a number of processes, 0 or more"
        raise IncompatibleOptionsError(msg)
    if dtype is not None and dtype not in NARROW:
        names = ", ".join(sorted(dtype_name(d) for d in NARROW))
        msg = f"dtype={dtype!r}: expected one of torch's {names}; only floating tensors are converted"
        raise IncompatibleOptionsError(msg)


def _refuse(what: str, why: str, remedy: str) -> NoReturn:
    msg = f"{what} cannot go together: {why}. Use {remedy}"
    raise IncompatibleOptionsError(msg)
