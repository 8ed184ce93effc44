"""A look at the first batch before an hour of training is spent on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from jasper_store.errors import BatchError
from jasper_store.jasper.steering import VARIANTS
from jasper_store.loading.samplers import EpochSampler

__all__ = ["validate_first_batch"]

_MATRIX, _VECTOR, _CUBE = ("batch", "D"), ("batch",), ("batch", "n_neg", "D")
_SHAPES: Final[Mapping[str, tuple[str, ...]]] = {
    "question_emb": _MATRIX,
    "target_source_emb": _MATRIX,
    "steering": _MATRIX,
    "negative_embs": _CUBE,
    "cluster_id": _VECTOR,
    "relevance": _VECTOR,
    "centroid_distance": _VECTOR,
    "steering_variant": _VECTOR,
    "negative_tiers": ("batch", "n_neg"),
}
_INTEGERS: Final = frozenset({"cluster_id", "steering_variant", "negative_tiers"})
#: Cosine distances of embeddings in half precision overshoot 2 by a rounding error.
_SLACK: Final = 1e-2
_HIGHEST_TIER: Final = 4


def validate_first_batch(loader: Any) -> bool:
    """Make the first batch and check it: keys, shapes, dtypes, NaN and infinity, ranges.

    The batch is made in this process, by the loader's dataset and collation; no worker starts, and neither the
    loader's place in the epoch nor any random state moves.

    Args:
        loader: of ``create_loader``, or any ``DataLoader`` over a :class:`JASPERSteeringDataset` or part of one.

    Returns:
        True.

    Raises:
        BatchError: naming the check that failed, the key, what was expected and what was found.
    """
    batch = _first_batch(loader)
    if not isinstance(batch, Mapping):
        _fail("type", f"expected a dictionary of tensors, got {type(batch).__name__}; is there a collate_fn?")
    _check_keys(batch)
    _check_shapes(batch)
    _check_dtypes(batch)
    _check_finite(batch)
    _check_ranges(batch, _dataset_of(loader))
    return True


def _first_batch(loader: Any) -> Any:
    dataset, size = loader.dataset, loader.batch_size or getattr(loader.batch_sampler, "batch_size", 1)
    sampler = loader.sampler
    if isinstance(sampler, EpochSampler):
        wanted: Any = sampler.indices(sampler.start, 0, min(size, sampler.count(sampler.start)))
    else:
        # A foreign sampler may draw from the global generator, so it is not asked.
        wanted = list(range(min(size, len(dataset))))
    if len(wanted) == 0:
        _fail("size", f"this rank has no samples: the dataset has {len(dataset)}")
    gather = getattr(dataset, "__getitems__", None)
    samples = gather(wanted) if callable(gather) else [dataset[int(index)] for index in wanted]
    return loader.collate_fn(samples)


def _dataset_of(loader: Any) -> Any:
    """The JASPER dataset under Subsets, or None under a concatenation of several."""
    dataset = loader.dataset
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset if hasattr(dataset, "store") else None


def _check_keys(batch: Mapping[str, Any]) -> None:
    missing = [key for key in _SHAPES if key not in batch]
    if missing:
        _fail("keys", f"missing {', '.join(missing)}; the batch has {', '.join(map(str, batch))}")
    for key in _SHAPES:
        if not isinstance(batch[key], torch.Tensor):
            _fail("type", f"{key} should be a tensor, got {type(batch[key]).__name__}")


def _check_shapes(batch: Mapping[str, torch.Tensor]) -> None:
    """Every symbol has one size throughout the batch."""
    sizes: dict[str, tuple[int, str]] = {}
    for key, symbols in _SHAPES.items():
        shape = tuple(batch[key].shape)
        if len(shape) != len(symbols):
            _fail("shape", f"{key} should be [{', '.join(symbols)}], got {list(shape)}")
        for symbol, size in zip(symbols, shape, strict=True):
            expected, who = sizes.setdefault(symbol, (size, key))
            if size != expected:
                _fail("shape", f"{key} has {symbol}={size}, but {who} has {symbol}={expected}")


def _check_dtypes(batch: Mapping[str, torch.Tensor]) -> None:
    for key in _SHAPES:
        dtype = batch[key].dtype
        if key in _INTEGERS:
            if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
                _fail("dtype", f"{key} should be integers, got {dtype}")
        elif not dtype.is_floating_point:
            _fail("dtype", f"{key} should be floating point, got {dtype}")


def _check_finite(batch: Mapping[str, torch.Tensor]) -> None:
    for key in _SHAPES:
        if key in _INTEGERS:
            continue
        values = batch[key]
        bad = ~torch.isfinite(values)
        if bad.any():
            sample = int(bad.reshape(len(values), -1).any(1).nonzero()[0, 0])
            kind = "NaN" if bool(torch.isnan(values).any()) else "infinity"
            _fail(kind, f"{key} of sample {sample} in the batch; run jasper_store.verify on the dataset to find all")


def _check_ranges(batch: Mapping[str, torch.Tensor], dataset: Any) -> None:
    ranges: dict[str, tuple[float, float]] = {
        "relevance": (0.0, 1.0),
        "centroid_distance": (0.0, 2.0),
        "steering_variant": (0, len(VARIANTS) - 1),
        "negative_tiers": (0, _HIGHEST_TIER),
    }
    if dataset is not None:
        ranges["cluster_id"] = (0, dataset.store["centroid_embs"].shape[0] - 1)
    for key, (low, high) in ranges.items():
        values = batch[key]
        slack = 0 if key in _INTEGERS else _SLACK
        outside = (values < low - slack) | (values > high + slack)
        if outside.any():
            sample = int(outside.reshape(len(values), -1).any(1).nonzero()[0, 0])
            found = values.reshape(len(values), -1)[sample].tolist()
            _fail("range", f"{key} of sample {sample} in the batch is {found}, expected {low} to {high}")


def _fail(check: str, what: str) -> None:
    raise BatchError(f"first batch failed the check {check!r}: {what}")
