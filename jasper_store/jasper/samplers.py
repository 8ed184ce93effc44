"""The samplers and orders of :mod:`jasper_store.loading`, by the path that programs know them by."""

from __future__ import annotations

from jasper_store.loading.batches import BatchSampler
from jasper_store.loading.options import Padding
from jasper_store.loading.order import block_order, order
from jasper_store.loading.samplers import EpochSampler
from jasper_store.loading.shuffle_quality import shuffle_quality as mixing

__all__ = ["BatchSampler", "EpochSampler", "Padding", "block_order", "mixing", "order"]
