"""Batches on the device where the model is: the next batch's copy overlaps the current step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ["DeviceLoader", "to_device"]


def to_device(loader: Any, device: torch.device | str) -> DeviceLoader:
    """Wrap a loader so that its batches arrive on ``device``, the next one being copied during the current step.

    Args:
        loader: any iterable of batches (tensors, or dicts, lists and tuples of them), usually a ``DataLoader``.
        device: where to; on a CUDA device copies run on a separate stream, from pinned memory, so that neither
            the step nor the next gather waits for them. On the CPU batches pass through untouched.

    Returns:
        An iterable with the loader's length, state and other attributes. One batch more than the trainer has is in
        flight; ``state_dict()`` does not count it.

    Raises:
        RuntimeError: PyTorch knows no such device, or has not been built for it.
    """
    return DeviceLoader(loader, torch.device(device))


class DeviceLoader:
    """See :func:`to_device`. Iterate it from one thread; everything else is the loader's own.

    Attributes:
        loader: the wrapped loader.
        device: where batches arrive.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self._state: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if name in {"loader", "device"}:  # not set yet: a copy or an unpickling is under way
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Yield the loader's batches on the device, in the same order."""
        self._state = None
        if self.device.type == "cuda":
            return self._overlapped()
        return iter(self.loader) if self.device.type == "cpu" else self._copied()

    def state_dict(self) -> dict[str, Any]:
        """The loader's state after the batches that were yielded here."""
        state: dict[str, Any] = self.loader.state_dict() if self._state is None else self._state
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; see the loader's own method."""
        self._state = None
        self.loader.load_state_dict(state)

    def set_epoch(self, epoch: int) -> None:
        """Move the loader to an epoch, as ``jasper_store.set_epoch`` does."""
        from jasper_store.loading.epochs import set_epoch

        self._state = None
        set_epoch(self.loader, epoch)

    def _copied(self) -> Iterator[Any]:
        for batch in self.loader:
            yield _moved(batch, self.device)

    def _overlapped(self) -> Iterator[Any]:
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        batches = iter(self.loader)
        stateful = hasattr(self.loader, "state_dict")
        watch = getattr(self.loader, "stopwatch", None)
        ahead = self._fetch(batches, stream, watch)
        while ahead is not None:
            batch, copied = ahead
            # The state now counts the batch at hand and not the one fetched next.
            self._state = self.loader.state_dict() if stateful else None
            ahead = self._fetch(batches, stream, watch)
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            _record(batch, current)
            yield batch
        self._state = None

    def _fetch(self, batches: Iterator[Any], stream: torch.cuda.Stream, watch: Any) -> tuple[Any, Any] | None:
        batch = next(batches, self)
        if batch is self:
            return None
        began = time.perf_counter()
        with torch.cuda.stream(stream):
            moved = _moved(batch, self.device)
            copied = stream.record_event()
        if watch is not None:
            watch.transfer += time.perf_counter() - began
        return moved, copied


def _moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device; what is not a tensor stays."""
    if isinstance(batch, torch.Tensor):
        if device.type == "cuda" and batch.device.type == "cpu" and not batch.is_pinned():
            batch = batch.pin_memory()
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_moved(value, device) for value in batch)
    return batch


def _record(batch: Any, stream: torch.cuda.Stream) -> None:
    """Tell the allocator that a stream uses these tensors, so that it does not reuse their memory too early."""
    if isinstance(batch, torch.Tensor):
        if batch.is_cuda:
            batch.record_stream(stream)
    elif isinstance(batch, Mapping):
        for value in batch.values():
            _record(value, stream)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            _record(value, stream)
