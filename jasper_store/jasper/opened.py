"""A dataset directory, opened and validated once, and shared by the splits that are served from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from jasper_store.jasper.config import Config, read_config
from jasper_store.jasper.integrity import check_indices, check_structure
from jasper_store.jasper.schema import SPLITS, Split, schema_for
from jasper_store.store.guard import check_options
from jasper_store.store.store import TensorStore, open_store

__all__ = ["OpenedDataset", "open_dataset"]


@dataclass(slots=True)
class OpenedDataset:
    """A validated store with its configuration.

    Attributes:
        store: the tensors.
        config: the configuration.
        sizes: sizes by symbol, as ``integrity.check_structure`` returns them.
        users: datasets that are served from it; the last one to leave closes the store.
    """

    store: TensorStore
    config: Config
    sizes: Mapping[str, int]
    users: int = 0

    def join(self) -> OpenedDataset:
        """Count one more user."""
        self.users += 1
        return self

    def leave(self) -> None:
        """Count one user less, and close the store after the last."""
        self.users -= 1
        if self.users <= 0:
            self.store.close()

    def __getstate__(self) -> tuple[TensorStore, Config, Mapping[str, int]]:
        return self.store, self.config, self.sizes

    def __setstate__(self, state: tuple[TensorStore, Config, Mapping[str, int]]) -> None:
        # One dataset travels to a worker, so whatever arrives has one user.
        self.store, self.config, self.sizes = state
        self.users = 1


def open_dataset(
    directory: Path,
    splits: Sequence[Split] = SPLITS,
    *,
    storage_format: str = "auto",
    use_mmap: bool | None = None,
    device: torch.device | str | None = None,
    memory_limit: int | None = None,
    dtype: torch.dtype | None = None,
) -> OpenedDataset:
    """Open a dataset directory and check that it may be served.

    The options are checked first, from themselves alone; then the configuration, the headers, and last the index
    tensors, unless the manifest vouches for them.

    Raises:
        IncompatibleOptionsError: options that cannot hold together.
        DatasetNotFoundError, CorruptFileError, IntegrityError: what is wrong with the dataset.
        InsufficientMemoryError: what should be preloaded does not fit.
    """
    check_options(use_mmap=use_mmap, device=device)
    config = read_config(directory)
    _, *steering = config.curriculum.typical()
    centroid, keyword, residual = steering
    store = open_store(
        directory,
        format=storage_format,
        use_mmap=use_mmap,
        device=device,
        memory_limit=memory_limit,
        schema=schema_for(config.n_neg, (centroid, keyword, residual)),
        dtype=dtype,
    )
    try:
        sizes = check_structure(store, config, splits)
        _check_indices_once(store, sizes, splits)
    except BaseException:
        store.close()
        raise
    return OpenedDataset(store, config, sizes)


def _check_indices_once(store: TensorStore, sizes: Mapping[str, int], splits: Sequence[Split]) -> None:
    """Check the indices, unless the manifest says that these very files were checked before."""
    check = "indices:" + ",".join(splits)
    if store.is_verified(check) or store.is_verified("indices:" + ",".join(SPLITS)):
        return
    check_indices(store, sizes, splits)
    store.record_check(check)
