"""Execution of a plan: maps or loads each tensor, or gives it a chunk reader."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch

from jasper_store.formats.base import Parts
from jasper_store.paging.mapping import FileMap
from jasper_store.store.chunked import ChunkedTensor
from jasper_store.store.concat_buffer import allocate_concat_buffers
from jasper_store.store.device import DevicePreloader
from jasper_store.store.load import load, progress_nbytes
from jasper_store.store.mapped import MappedTensor
from jasper_store.store.parted import PartedTensor
from jasper_store.store.planning import target_dtype
from jasper_store.store.resident import DeviceTensor, ResidentTensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jasper_store.formats.base import TensorSpec
    from jasper_store.store.placement import Plan
    from jasper_store.store.tensors import StoredTensor

__all__ = ["Builder", "Progress"]

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (bytes done, total bytes) while tensors are loaded or warmed."""


class Builder:
    """Opens tensors where a plan puts them, with one map per file and one ring of buffers per device. For one use.

    Args:
        plan: where each tensor goes.
        dtype: floating dtype that the store was opened with, or ``None``.
        progress: called while tensors are loaded.
    """

    def __init__(self, plan: Plan, dtype: torch.dtype | None, progress: Progress | None = None) -> None:
        self._plan = plan
        self._dtype = dtype
        self._progress = progress
        self._maps: dict[Path, FileMap] = {}
        self._preloaders: dict[torch.device, DevicePreloader] = {}
        self._outputs: dict[str, torch.Tensor] = {}
        self._done = self._total = 0

    def build(
        self, specs: Sequence[TensorSpec], groups: Sequence[tuple[str, ...]]
    ) -> tuple[dict[str, StoredTensor], dict[tuple[str, ...], StoredTensor]]:
        """All tensors by name, and the concatenated tensors of those groups that can be gathered as one.

        Raises:
            CorruptFileError: a file is damaged.
            InsufficientMemoryError: the system refused memory, although the plan fits.
        """
        self._total = sum(
            progress_nbytes(spec) for spec in specs if self._plan.placement(spec.name) not in {"mmap", "chunked"}
        )
        dtypes = {spec.name: target_dtype(spec, self._dtype) for spec in specs}
        stacks = allocate_concat_buffers(groups, {spec.name: spec for spec in specs}, self._plan, dtypes)
        for stack in stacks:
            self._outputs.update(stack.parts)
        tensors = {spec.name: self.open(spec) for spec in specs}
        return tensors, {stack.names: stack.tensor for stack in stacks}

    def open(self, spec: TensorSpec) -> StoredTensor:
        """One tensor, placed as planned; errors as :meth:`build`."""
        placement = self._plan.placement(spec.name)
        dtype = target_dtype(spec, self._dtype)
        if placement == "chunked":
            from jasper_store.formats.hdf5.chunks import ChunkedReader

            return ChunkedTensor(spec, ChunkedReader(spec), dtype=dtype)
        if placement == "mmap" and isinstance(spec.location, Parts):
            return PartedTensor(spec, dtype=dtype)
        if placement == "mmap":
            return MappedTensor(spec, self._map(spec.path), dtype=dtype)
        # With several ranks on the same files, each would drop pages that the others need.
        drop_behind = self._plan.budget.ranks == 1
        out = self._outputs.get(spec.name)
        if placement == "ram":
            values = load(spec, dtype, out=out, drop_behind=drop_behind, on_bytes=self._count)
            return ResidentTensor(spec, values)
        preloader = self._preloader(torch.device(placement))
        values = preloader.load(spec, dtype, out=out, drop_behind=drop_behind, on_bytes=self._count)
        return DeviceTensor(spec, values)

    def _count(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _map(self, path: Path) -> FileMap:
        """The map of a file, shared by its tensors; it stays open as long as one of them."""
        if path not in self._maps:
            self._maps[path] = FileMap(path)
        return self._maps[path]

    def _preloader(self, device: torch.device) -> DevicePreloader:
        if device not in self._preloaders:
            self._preloaders[device] = DevicePreloader(device)
        return self._preloaders[device]
