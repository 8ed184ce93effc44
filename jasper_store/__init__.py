"""Train on pre-computed embeddings from disk, memory or GPU.

One tensor API over ``.pt``, HDF5, safetensors and ``.npy``; a planner that says what to preload, what to map, and
why; converters that can be trusted; and :class:`JASPERSteeringDataset` with its loaders::

    import jasper_store as js

    loader = js.create_loader("data/wordnet", "train", batch_size=256)
    for epoch in range(10):
        js.set_epoch(loader, epoch)
        for batch in loader:
            ...
"""

from __future__ import annotations

from jasper_store import errors
from jasper_store.convert.report import ConversionReport
from jasper_store.convert.verify import VerifyReport
from jasper_store.jasper.api import DatasetWriter, convert, open, plan, verify, warm_up  # noqa: A004
from jasper_store.jasper.dataset import JASPERSteeringDataset
from jasper_store.jasper.device import to_device
from jasper_store.jasper.loader import create_loader, set_epoch, validate_first_batch
from jasper_store.memory.report import MemoryReport, memory_report
from jasper_store.store.placement import Plan
from jasper_store.store.store import TensorStore
from jasper_store.store.tensors import StoredTensor
from jasper_store.store.warmup import WarmupReport

__version__ = "0.1.0"

__all__ = [
    "ConversionReport",
    "DatasetWriter",
    "JASPERSteeringDataset",
    "MemoryReport",
    "Plan",
    "StoredTensor",
    "TensorStore",
    "VerifyReport",
    "WarmupReport",
    "convert",
    "create_loader",
    "errors",
    "memory_report",
    "open",
    "plan",
    "set_epoch",
    "to_device",
    "validate_first_batch",
    "verify",
    "warm_up",
]
