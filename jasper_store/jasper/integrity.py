"""What has to hold before a dataset may be served: tensors, shapes, dtypes, and every index within its bound.

The checks read the index tensors once, in blocks, so they need no memory for large data. Values of embeddings are
not read here; that is :mod:`jasper_store.jasper.audit`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from jasper_store.errors import DatasetNotFoundError, IntegrityError
from jasper_store.jasper.config import Config
from jasper_store.jasper.schema import PAIR_KEYWORDS, SPLITS, TENSORS, Split, TensorRule, split_tensor
from jasper_store.store.store import TensorStore
from jasper_store.store.tensors import StoredTensor

__all__ = ["check_bounds", "check_indices", "check_structure", "index_rules"]

_SINGULAR = {
    "questions": "question",
    "sources": "source",
    "keywords": "keyword",
    "clusters": "cluster",
    "pairs": "pair",
}
_INTEGERS = frozenset({torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8})
_BLOCK_ROWS = 1 << 20


class _Described(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


def check_structure(store: TensorStore, config: Config, splits: Iterable[Split] = SPLITS) -> Mapping[str, int]:
    """Check that every tensor is there and that shapes and dtypes agree with each other and the configuration.

    Reads no data. Splits that are not asked for may be missing.

    Returns:
        Sizes by symbol: ``"pairs"``, ``"questions"``, ``"sources"``, ``"keywords"``, ``"clusters"``, and each split.

    Raises:
        DatasetNotFoundError: a tensor is missing.
        IntegrityError: a shape or dtype is wrong; the message names the tensor, what it is and what it should be.
    """
    wanted = set(splits)
    sizes: dict[str, int] = {"D": config.embedding_dim, "n_neg": config.n_neg}
    origin = {"D": "embedding_dim in the configuration", "n_neg": "n_neg in the configuration"}
    # The tensor that defines a count comes before those that must agree with it.
    for name in sorted(TENSORS, key=lambda name: name != "pair_index"):
        if name in _optional_splits(wanted) and name not in store:
            continue
        rule = TENSORS[name]
        if name == PAIR_KEYWORDS:
            _match_shape(name, (_ragged_rows(store),), rule, sizes, origin)
            continue
        tensor = _present(store, name)
        _match_dtype(name, tensor, rule)
        _match_shape(name, tensor.shape, rule, sizes, origin)
    _match_config(sizes, config, wanted)
    return sizes


def _optional_splits(wanted: set[Split]) -> set[str]:
    return {split_tensor(split) for split in SPLITS if split not in wanted}


def _present(store: TensorStore, name: str) -> _Described:
    if name in store:
        return store[name]
    hint = ""
    if name.endswith("_idx"):
        there = [split for split in SPLITS if split_tensor(split) in store]
        hint = f" Splits found: {', '.join(there) or 'none'}."
    raise DatasetNotFoundError(
        f"{name} is missing: no such tensor in {store.path} ({store.format} format).{hint}"
        f" Write it, convert it (jasper-store convert), or open another format of this dataset.",
        path=store.path,
        tensor=name,
    )


def _ragged_rows(store: TensorStore) -> int:
    for part in ("values", "offsets"):
        if f"{PAIR_KEYWORDS}.{part}" not in store:
            _present(store, PAIR_KEYWORDS)
    return len(store.ragged(PAIR_KEYWORDS))


def _match_dtype(name: str, tensor: _Described, rule: TensorRule) -> None:
    fits = tensor.dtype in _INTEGERS if rule.kind == "int" else tensor.dtype.is_floating_point
    if not fits:
        expected = "an integer dtype (int64)" if rule.kind == "int" else "a floating dtype (float32)"
        raise IntegrityError(f"{name} should have {expected}, found {tensor.dtype}; write it anew", tensor=name)


def _match_shape(
    name: str, shape: tuple[int, ...], rule: TensorRule, sizes: dict[str, int], origin: dict[str, str]
) -> None:
    if len(shape) != len(rule.shape):
        expected = ", ".join(str(size) for size in rule.shape)
        raise IntegrityError(f"{name} should have shape [{expected}], found {list(shape)}", tensor=name)
    for axis, (found, symbol) in enumerate(zip(shape, rule.shape, strict=True)):
        expected_size = symbol if isinstance(symbol, int) else sizes.setdefault(symbol, found)
        source = origin.setdefault(symbol, name) if isinstance(symbol, str) else "the layout"
        if found != expected_size:
            what = "entries" if axis == 0 else "columns"
            raise IntegrityError(
                f"{name} has {found} {what}, expected {expected_size} as in {source}"
                f" (shape {list(shape)}, expected [{', '.join(map(str, rule.shape))}])",
                tensor=name,
            )


def _match_config(sizes: Mapping[str, int], config: Config, wanted: set[Split]) -> None:
    if config.n_clusters is not None and sizes["clusters"] != config.n_clusters:
        raise IntegrityError(
            f"centroid_embs has {sizes['clusters']} entries, expected {config.n_clusters} as n_clusters in the"
            " configuration says; correct whichever is wrong",
            tensor="centroid_embs",
        )
    for split in wanted:
        said = config.split_sizes.get(split)
        if said is not None and sizes[split] != said:
            raise IntegrityError(
                f"{split_tensor(split)} has {sizes[split]} entries, expected {said} as split_sizes in the"
                " configuration says; correct whichever is wrong",
                tensor=split_tensor(split),
            )


def index_rules(splits: Iterable[Split]) -> list[tuple[str, int | None, str]]:
    """Which values are rows of what: (stored tensor, column or None for all, symbol of the bound)."""
    rules: list[tuple[str, int | None, str]] = [("pair_index", 0, "questions"), ("pair_index", 1, "sources")]
    wanted = {split_tensor(split) for split in splits}
    for name, rule in TENSORS.items():
        if rule.refers_to is None or (name.endswith("_idx") and name not in wanted):
            continue
        stored = f"{name}.values" if name == PAIR_KEYWORDS else name
        rules.append((stored, None, rule.refers_to))
    return rules


def check_indices(store: TensorStore, sizes: Mapping[str, int], splits: Iterable[Split] = SPLITS) -> None:
    """Check that every index lies within [0, n), negative ones included; streamed in blocks.

    Args:
        store: an open store.
        sizes: as :func:`check_structure` returned them.
        splits: splits whose index tensors are checked.

    Raises:
        IntegrityError: the message names tensor, position, value and bound.
    """
    for stored, column, symbol in index_rules(splits):
        check_bounds(store[stored], column, symbol, sizes[symbol])


def check_bounds(tensor: StoredTensor, column: int | None, symbol: str, bound: int) -> None:
    """Check that the values of one tensor (or of one of its columns) are rows of ``symbol``, of which ``bound`` exist.

    Raises:
        IntegrityError: the message names tensor, position, value and bound.
    """
    start = 0
    for block in tensor.blocks(_BLOCK_ROWS):
        values = block if column is None else block[:, column]
        if values.numel():
            low, high = (int(value) for value in torch.aminmax(values))
            if low < 0 or high >= bound:
                raise _out_of_bounds(tensor.name, column, symbol, bound, values, start)
        start += len(block)


def _out_of_bounds(
    stored: str, column: int | None, symbol: str, bound: int, values: torch.Tensor, start: int
) -> IntegrityError:
    position = ((values < 0) | (values >= bound)).nonzero()[0].tolist()
    value = int(values[tuple(position)])
    position[0] += start
    if column is not None:
        position.append(column)
    name = stored.removesuffix(".values")
    return IntegrityError(
        f"{name} references {_SINGULAR[symbol]} {value}, but only {bound} {symbol} exist"
        f" (at position {position}; valid rows are 0 to {bound - 1}); rebuild {name} or restore the missing rows",
        tensor=name,
    )
