"""``create_loader``: from a directory or a dataset to a loader, in one call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jasper_store.errors import IncompatibleOptionsError
from jasper_store.files.hub import local_path
from jasper_store.jasper.dataset import JASPERSteeringDataset
from jasper_store.jasper.recognise import is_jasper, is_packed_jasper
from jasper_store.jasper.schema import check_split
from jasper_store.loading.loader import Loader, make_loader
from jasper_store.loading.options import LoaderOptions, LoaderOrder, Padding
from jasper_store.loading.ranks import find_ranks
from jasper_store.samples.dataset import Dataset
from jasper_store.store.guard import check_options

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    import torch

__all__ = ["create_loader"]


def create_loader(
    dataset: str | os.PathLike[str] | Dataset,
    split: str | None = None,
    batch_size: int | None = None,
    num_workers: int = 0,
    distributed: bool = False,
    epoch: int | None = None,
    drop_last: bool | None = None,
    pin_memory: bool | None = None,
    *,
    storage_format: str = "auto",
    use_mmap: bool | None = None,
    device: torch.device | str | None = None,
    memory_limit: int | str | None = None,
    seed: int | None = None,
    order: LoaderOrder = "auto",
    padding: Padding = "wrap",
    rank: int | None = None,
    world_size: int | None = None,
    shuffle: bool | None = None,
    dtype: torch.dtype | None = None,
    **dataloader_options: Any,
) -> Loader:
    """Make a DataLoader of a dataset, or of a directory that holds one.

    A batch depends only on the dataset's bytes, ``seed``, the epoch, ``order`` and the position in the epoch. Training
    (the split ``"train"``, or a dataset without splits) shuffles and drops the last partial batch; other splits do
    neither.

    Args:
        dataset: a :class:`Dataset`, or a directory: of a JASPER dataset, of one that declares its samples in
            ``config.json``, or of any tensors with one number of rows; or a dataset of the Hub as ``"hf://owner/name"``.
        split: ``"train"``, ``"val"`` or ``"test"``, or what a dataset declares; ``None`` for one without splits.
        batch_size: samples per batch and rank.
        num_workers: worker processes; 0 gathers in this process, which is fastest for data in memory.
        distributed: share the epoch with other ranks, found by ``torch.distributed`` or torchrun's variables.
        epoch: the epoch to begin with; 0, or that of the dataset.
        drop_last: leave out the last partial batch (and, over several ranks, up to ``world_size - 1`` samples);
            ``None`` does so for training.
        pin_memory: pin batches; ``None`` does so if CUDA is available and the data is in host memory.
        storage_format: ``"auto"``, ``"pt"``, ``"hdf5"``, ``"safetensors"`` or ``"npy"``.
        use_mmap: ``None`` plans, ``True`` maps everything, ``False`` preloads everything.
        device: where the data lives: ``None`` for the host, a CUDA device, or ``"auto"``.
        memory_limit: upper bound on what may be preloaded: bytes, or a text such as ``"8GiB"``.
        seed: decides the shuffle and the draws; 42, or that of the dataset.
        order: ``"global"`` mixes all samples; ``"block"`` shuffles blocks, for data larger than memory;
            ``"auto"`` chooses by the plan (``"global"`` over several ranks, which must agree), and
            ``loader.explain()`` says why. Without ``shuffle`` it has no effect.
        padding: over several ranks without ``drop_last``: ``"wrap"`` repeats samples until all ranks have the
            same count, ``"none"`` serves every sample exactly once.
        rank: number of this rank, with ``world_size``; instead of what ``distributed`` finds.
        world_size: number of ranks.
        shuffle: whether to shuffle; ``None`` shuffles training only.
        dtype: floating dtype that embeddings are served in; ``None`` keeps what is stored.
        **dataloader_options: more of ``torch.utils.data.DataLoader``: ``collate_fn``, ``worker_init_fn``,
            ``prefetch_factor``, ``persistent_workers``, ``multiprocessing_context``, ``timeout``, ``generator``...

    Returns:
        A :class:`~jasper_store.loading.loader.Loader`, which is a ``DataLoader``.

    Raises:
        UnknownNameError: no such split, order, padding, format or DataLoader option.
        IncompatibleOptionsError: options that are incompatible, before any data is touched; an epoch without a batch.
        DatasetNotFoundError, CorruptFileError, IntegrityError, InsufficientMemoryError: as the dataset's.
        PerformanceWarning: free shared memory is too small for the batches of the workers.
    """
    if batch_size is None:
        raise IncompatibleOptionsError("create_loader needs a batch_size, as in create_loader(dataset, batch_size=256)")
    served = (shuffle, seed, order, padding, rank, world_size, dataloader_options)
    options = LoaderOptions(batch_size, num_workers, distributed, epoch, drop_last, pin_memory, *served)
    opening: dict[str, Any] = {"use_mmap": use_mmap, "device": device, "memory_limit": memory_limit, "dtype": dtype}
    if isinstance(dataset, Dataset):
        _require_unset(opening | {"storage_format": None if storage_format == "auto" else storage_format})
        if split not in {None, dataset.split}:
            raise IncompatibleOptionsError(f"split={split!r}: the dataset is open with split {dataset.split!r}")
        return make_loader(dataset, options)
    check_options(**opening, pin_memory=pin_memory, num_workers=num_workers)
    find_ranks(distributed=distributed, rank=rank, world_size=world_size)
    opened = _open(local_path(dataset), split, storage_format, options, opening)
    try:
        return make_loader(opened, options)
    except BaseException:
        opened.close()
        raise


def _open(
    path: Path, split: str | None, storage_format: str, options: LoaderOptions, opening: Mapping[str, Any]
) -> Dataset:
    """The dataset in a directory: a JASPER dataset, or any other."""
    more = {**opening, "seed": 42 if options.seed is None else options.seed, "admit": options.admit}
    if is_jasper(path) or is_packed_jasper(path) or not path.exists():
        return JASPERSteeringDataset(path, check_split(split), storage_format=storage_format, **more)
    return Dataset(path, split=split, format=storage_format, **more)


def _require_unset(opening: Mapping[str, Any]) -> None:
    for name, value in opening.items():
        if value is not None:
            raise IncompatibleOptionsError(
                f"{name}={value!r}: the dataset is open already; pass {name.removeprefix('storage_')}= when you open it"
            )
