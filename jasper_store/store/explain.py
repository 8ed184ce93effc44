"""What a store does and holds, in words and numbers for people."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from jasper_store.formats.files import dtype_name
from jasper_store.memory import report
from jasper_store.memory.budget import format_bytes
from jasper_store.memory.mounts import file_system
from jasper_store.native.gather import kernel
from jasper_store.paging.madvise import madvise_batcher
from jasper_store.store.chunked import ChunkedTensor
from jasper_store.store.paged import PagedTensor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from jasper_store.memory.report import MemoryReport
    from jasper_store.store.manifest import Manifest
    from jasper_store.store.placement import Plan
    from jasper_store.store.tensors import StoredTensor

__all__ = ["StoreMemory", "TensorMemory", "explain", "memory_of", "summary"]

_SHOWN = 12


@dataclass(frozen=True, slots=True)
class TensorMemory:
    """What one tensor holds.

    Attributes:
        name: the tensor's name.
        placement: where it lives.
        held: bytes that it holds in this process's memory, or the device's; 0 where the page cache holds it.
        cached: bytes of its file that are in the page cache, which every process shares and the kernel may take
            back; of the whole file where it is chunked.
        nbytes: bytes of its values.
    """

    name: str
    placement: str
    held: int
    cached: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoreMemory:
    """What a store and its process hold. ``str()`` is a table.

    Attributes:
        process: the process as a whole.
        tensors: one entry per tensor.
    """

    process: MemoryReport
    tensors: tuple[TensorMemory, ...]

    @property
    def held(self) -> int:
        """Bytes that the store holds and only closing it gives back."""
        return sum(entry.held for entry in self.tensors)

    @property
    def cached(self) -> int:
        """Bytes of its tensors in the page cache; :meth:`TensorStore.release` gives them back."""
        return sum(entry.cached for entry in self.tensors if entry.placement != "chunked")

    def __str__(self) -> str:
        width = max([6, *(len(entry.name) for entry in self.tensors)])
        lines = [f"{'tensor':<{width}}  {'place':<8}  {'size':>10}  {'held':>10}  {'page cache':>10}"]
        lines += [
            f"{entry.name:<{width}}  {entry.placement:<8}  {format_bytes(entry.nbytes):>10}  "
            f"{format_bytes(entry.held):>10}  {format_bytes(entry.cached):>10}"
            for entry in self.tensors
        ]
        lines.append(f"process: {self.process}")
        lines.append(
            f"store: {format_bytes(self.held)} held until it is closed, {format_bytes(self.cached)} in the page cache, "
            "which the kernel takes back when it is needed, or store.release() now"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        names = TensorMemory.__dataclass_fields__
        process = type(self.process).__dataclass_fields__
        return {
            "process": {name: getattr(self.process, name) for name in process},
            "held": self.held,
            "cached": self.cached,
            "tensors": [{name: getattr(entry, name) for name in names} for entry in self.tensors],
        }


def summary(path: Path, format_name: str, tensors: Mapping[str, StoredTensor]) -> str:
    """A store in a few lines: bytes by place, then its first tensors as a table."""
    places: dict[str, int] = {}
    for tensor in tensors.values():
        places[tensor.placement] = places.get(tensor.placement, 0) + tensor.nbytes
    sizes = ", ".join(f"{place} {format_bytes(nbytes)}" for place, nbytes in places.items())
    rows = [
        (name, dtype_name(tensor.dtype), str(list(tensor.shape)), tensor.placement)
        for name, tensor in islice(tensors.items(), _SHOWN)
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = [f"TensorStore({str(path)!r}): {format_name}, {len(tensors)} tensors in {sizes or 'no place'}"]
    lines += [f"  {r[0]:<{widths[0]}}  {r[1]:<{widths[1]}}  {r[2]:<{widths[2]}}  {r[3]}" for r in rows]
    if len(tensors) > _SHOWN:
        lines.append(f"  ... and {len(tensors) - _SHOWN} more")
    return "\n".join(lines)


def memory_of(tensors: Mapping[str, StoredTensor]) -> StoreMemory:
    """Measure what tensors and this process hold now."""
    entries = []
    for name, tensor in tensors.items():
        elsewhere = isinstance(tensor, (PagedTensor, ChunkedTensor))
        held = 0 if elsewhere else tensor.nbytes
        entries.append(TensorMemory(name, tensor.placement, held, tensor.residency(), tensor.nbytes))
    return StoreMemory(report.memory_report(), tuple(entries))


def explain(
    path: Path, format_name: str, plan: Plan, manifest: Manifest | None, tensors: Mapping[str, StoredTensor]
) -> str:
    """The plan, and how a store's tensors are read on this machine."""
    fstype, network = file_system(path)
    backend = madvise_batcher().backend
    mapped = [tensor for tensor in tensors.values() if isinstance(tensor, PagedTensor)]
    lines = [
        f"{path} ({format_name}), {len(tensors)} tensors",
        str(plan),
        f"file system: {fstype or 'unknown'}{', over a network' if network else ''}",
    ]
    lines.append(
        "gathers: "
        + ("the kernel, several tensors at a time" if kernel() else "torch; the kernel was not built with this package")
    )
    if mapped:
        how = {
            "process_madvise": "1024 ranges per call (process_madvise)",
            "madvise": "one range per call (madvise); process_madvise is not allowed or not there",
            "none": "not at all: this system has no such call",
        }[backend]
        cold = [tensor.name for tensor in mapped if tensor.prefetching]
        lines.append(f"prefetching rows: {how}; " + (f"on for {', '.join(cold)}" if cold else "off, all in memory"))
        lines.append("page advice: " + "; ".join(f"{tensor.name} {tensor.advice}" for tensor in mapped))
    checks = "none" if manifest is None else f"records {', '.join(manifest.verified) or 'no check yet'}"
    lines.append(f"manifest: {checks}")
    return "\n".join(lines)
