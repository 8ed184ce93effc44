"""A look at the first batch before an hour of training is spent on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NoReturn

import torch

from jasper_store.errors import BatchError
from jasper_store.loading.samplers import EpochSampler
from jasper_store.samples.dataset import Dataset
from jasper_store.samples.graph import Output, SampleGraph

__all__ = ["validate_first_batch"]

#: Values in half precision overshoot a range by a rounding error.
_SLACK: Final = 1e-2


def validate_first_batch(loader: Any) -> bool:
    """Make the first batch and check it: keys, shapes, dtypes, NaN and infinity, ranges.

    The batch is made in this process, by the loader's dataset and collation; no worker starts, and neither the
    loader's position in the epoch nor any random state moves.

    Args:
        loader: of ``create_loader``, or any ``DataLoader`` over a :class:`Dataset`, over part of one, or over several.

    Returns:
        True.

    Raises:
        BatchError: naming the check that failed, the key, what was expected and what was found.
    """
    dataset = _dataset_of(loader.dataset)
    if dataset is None:
        _fail("dataset", f"expected a loader over a dataset of jasper_store, got {type(loader.dataset).__name__}")
    batch = _first_batch(loader)
    if not isinstance(batch, Mapping):
        _fail("type", f"expected a dictionary of tensors, got {type(batch).__name__}; is there a collate_fn?")
    graph = dataset.graph
    _check_keys(batch, graph)
    _check_shapes(batch, graph)
    _check_dtypes(batch, graph)
    _check_finite(batch, graph)
    _check_ranges(batch, dataset)
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


def _dataset_of(dataset: Any) -> Dataset | None:
    """The dataset under Subsets, or the first of a concatenation."""
    while not isinstance(dataset, Dataset):
        inner = getattr(dataset, "dataset", None) or next(iter(getattr(dataset, "datasets", ())), None)
        if inner is None:
            return None
        dataset = inner
    return dataset


def _tensors_of(graph: SampleGraph, output: Output) -> list[tuple[str, tuple[str | int, ...], torch.dtype]]:
    """Key, sizes and dtype of the tensors of a field."""
    sizes = graph.shape_of(output)
    if output.key not in graph.ragged_keys:
        return [(output.key, ("batch", *sizes), output.dtype)]
    return [
        (f"{output.key}.values", ("any", *sizes), output.dtype),
        (f"{output.key}.offsets", ("batch + 1",), torch.int64),
    ]


def _check_keys(batch: Mapping[str, Any], graph: SampleGraph) -> None:
    missing = [key for key in graph.keys if key not in batch]
    if missing:
        _fail("keys", f"missing {', '.join(missing)}; the batch has {', '.join(map(str, batch))}")
    for key in graph.keys:
        if not isinstance(batch[key], torch.Tensor):
            _fail("type", f"{key} should be a tensor, got {type(batch[key]).__name__}")


def _check_shapes(batch: Mapping[str, torch.Tensor], graph: SampleGraph) -> None:
    """The batch has one size throughout, and each sample the sizes that the tensors say."""
    size: int | None = None
    first = ""
    for output in graph.outputs:
        for key, symbols, _ in _tensors_of(graph, output):
            shape = tuple(batch[key].shape)
            shown = ", ".join(map(str, symbols))
            if len(shape) != len(symbols) or shape[1:] != symbols[1:]:
                _fail("shape", f"{key} should be [{shown}], got {list(shape)}")
            if symbols[0] == "any":
                continue
            found = shape[0] - (symbols[0] == "batch + 1")
            size, first = (found, key) if size is None else (size, first)
            if found != size:
                _fail("shape", f"{key} has batch={found}, but {first} has batch={size}")


def _check_dtypes(batch: Mapping[str, torch.Tensor], graph: SampleGraph) -> None:
    """Integers stay integers, and floating point numbers such; which of them, a collation may have changed."""
    for output in graph.outputs:
        for key, _, wanted in _tensors_of(graph, output):
            found = batch[key].dtype
            if _kind(found) != _kind(wanted):
                _fail("dtype", f"{key} should be {_kind(wanted)}, got {found}")


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "booleans"
    if dtype.is_complex:
        return "complex"
    return "floating point" if dtype.is_floating_point else "integers"


def _check_finite(batch: Mapping[str, torch.Tensor], graph: SampleGraph) -> None:
    for key in graph.keys:
        values = batch[key]
        if not (values.dtype.is_floating_point or values.dtype.is_complex):
            continue
        bad = ~torch.isfinite(values)
        if bad.any():
            sample = int(bad.reshape(len(values), -1).any(1).nonzero()[0, 0])
            kind = "NaN" if bool(torch.isnan(values).any()) else "infinity"
            _fail(kind, f"{key} of sample {sample} in the batch; run jasper_store.verify on the dataset to find all")


def _check_ranges(batch: Mapping[str, torch.Tensor], dataset: Dataset) -> None:
    for key, (low, high) in dataset.value_ranges().items():
        values = batch[key]
        slack = _SLACK if values.dtype.is_floating_point else 0
        outside = (values < low - slack) | (values > high + slack)
        if outside.any():
            sample = int(outside.reshape(len(values), -1).any(1).nonzero()[0, 0])
            found = values.reshape(len(values), -1)[sample].tolist()
            _fail("range", f"{key} of sample {sample} in the batch is {found}, expected {low} to {high}")


def _fail(check: str, what: str) -> NoReturn:
    raise BatchError(f"first batch failed the check {check!r}: {what}")
