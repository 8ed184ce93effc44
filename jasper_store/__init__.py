"""Train on pre-computed embeddings from disk, memory or GPU.

One tensor API over ``.pt``, HDF5, safetensors and ``.npy``; a planner that says what to preload, what to map, and
why; converters that verify what they write; and :class:`JASPERSteeringDataset` with its loaders::

    import jasper_store as js

    loader = js.create_loader("data/wordnet", "train", batch_size=256)
    for epoch in range(10):
        js.set_epoch(loader, epoch)
        for batch in loader:
            ...
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jasper_store import errors

if TYPE_CHECKING:
    from jasper_store.building.build import build
    from jasper_store.building.build_report import BuildReport
    from jasper_store.building.mining_report import MiningReport
    from jasper_store.building.negatives import mine_negatives
    from jasper_store.conversion.report import ConversionReport
    from jasper_store.conversion.verify import VerifyReport
    from jasper_store.hub.push import PushReport, push
    from jasper_store.jasper.api import DatasetWriter, commit, compact, convert, open, plan, verify, warm_up  # noqa: A004
    from jasper_store.jasper.dataset import JASPERSteeringDataset
    from jasper_store.jasper.loader import create_loader
    from jasper_store.jasper.packed import pack
    from jasper_store.loading.device import to_device
    from jasper_store.loading.epochs import set_epoch
    from jasper_store.loading.first_batch import validate_first_batch
    from jasper_store.memory.report import MemoryReport, memory_report
    from jasper_store.packing.report import PackReport
    from jasper_store.samples.dataset import Dataset
    from jasper_store.samples.declaration import Choice, Variant
    from jasper_store.store.placement import Plan
    from jasper_store.store.store import TensorStore
    from jasper_store.store.tensors import StoredTensor
    from jasper_store.store.warmup import WarmupReport

__version__ = "0.1.0"

__all__ = [
    "BuildReport",
    "Choice",
    "ConversionReport",
    "Dataset",
    "DatasetWriter",
    "JASPERSteeringDataset",
    "MemoryReport",
    "MiningReport",
    "PackReport",
    "Plan",
    "PushReport",
    "StoredTensor",
    "TensorStore",
    "Variant",
    "VerifyReport",
    "WarmupReport",
    "build",
    "commit",
    "compact",
    "convert",
    "create_loader",
    "errors",
    "memory_report",
    "mine_negatives",
    "open",
    "pack",
    "plan",
    "push",
    "set_epoch",
    "to_device",
    "validate_first_batch",
    "verify",
    "warm_up",
]

# Where the names above live. Each is imported when it is first used: a program that asks for one pays for that one,
# and a program that only looks at the version pays for nothing. Type checkers see the imports at the top.
_HOMES = {
    "BuildReport": "building.build_report",
    "Choice": "samples.declaration",
    "Dataset": "samples.dataset",
    "Variant": "samples.declaration",
    "ConversionReport": "conversion.report",
    "DatasetWriter": "jasper.api",
    "JASPERSteeringDataset": "jasper.dataset",
    "MemoryReport": "memory.report",
    "MiningReport": "building.mining_report",
    "PackReport": "packing.report",
    "Plan": "store.placement",
    "PushReport": "hub.push",
    "StoredTensor": "store.tensors",
    "TensorStore": "store.store",
    "VerifyReport": "conversion.verify",
    "WarmupReport": "store.warmup",
    "build": "building.build",
    "commit": "jasper.api",
    "compact": "jasper.api",
    "convert": "jasper.api",
    "create_loader": "jasper.loader",
    "memory_report": "memory.report",
    "mine_negatives": "building.negatives",
    "open": "jasper.api",
    "pack": "jasper.packed",
    "plan": "jasper.api",
    "push": "hub.push",
    "set_epoch": "loading.epochs",
    "to_device": "loading.device",
    "validate_first_batch": "loading.first_batch",
    "verify": "jasper.api",
    "warm_up": "jasper.api",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A public name, at its first use."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    """The public names, whether they were used already or not."""
    return [*__all__, "__version__"]
