"""``JASPERSteeringDataset``: (question, steering, source) triplets with hard negatives and a curriculum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import Self

from jasper_store.conversion.converter import convert
from jasper_store.conversion.report import ConversionReport
from jasper_store.errors import DatasetNotFoundError, IncompatibleOptionsError, UnknownNameError
from jasper_store.files.hub import local_path
from jasper_store.jasper.config import CONFIG_NAME, Config, read_config
from jasper_store.jasper.integrity import check_structure, unread_bounds
from jasper_store.jasper.schema import (
    NOUNS,
    SCHEMA,
    SPLITS,
    TENSORS,
    Split,
    check_split,
    declaration_for,
    packed_declaration,
)
from jasper_store.jasper.steering import VARIANTS, variant_number
from jasper_store.samples.dataset import Dataset
from jasper_store.samples.declaration import Declaration
from jasper_store.samples.integrity import Nouns
from jasper_store.samples.opened import OpenedDataset, open_dataset, packed_at
from jasper_store.samples.subset import ArraySubset
from jasper_store.store.guard import check_int, check_options
from jasper_store.store.placement import Plan
from jasper_store.store.ragged import RaggedTensor

__all__ = ["JASPERSteeringDataset"]

_HIGHEST_TIER = 4


class JASPERSteeringDataset(Dataset):
    """Pre-computed (question, steering, source) embeddings with hard negatives and a curriculum.

    A sample is a pure function of the dataset's bytes, ``seed``, the epoch and the sample's position. Worker count,
    start method, batch size, ranks, file format and placement change nothing.

    Safe to use from forked and spawned DataLoader workers; ``set_epoch``, ``force_steering`` and
    ``reload_negatives`` reach them while they run, persistent ones too. Pickles to a few kilobytes at any size and
    reopens its files where it arrives, preloaded tensors as maps.

    Args:
        dataset_dir: directory with ``config.json`` and the tensors, or a dataset of the Hub as ``"hf://owner/name"``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        epoch: initial epoch, which decides the steering probabilities.
        device: ``None`` or ``"cpu"`` for host memory; a CUDA device preloads everything there; ``"auto"`` decides.
        storage_format: ``"auto"``, ``"pt"``, ``"hdf5"``, ``"safetensors"`` or ``"npy"``.
        use_mmap: ``None`` plans by the memory available, ``True`` maps everything, ``False`` preloads everything.
        seed: seed of the steering draw.
        memory_limit: upper bound on what may be preloaded: bytes, or a text such as ``"8GiB"``.
        dtype: floating dtype to convert embeddings to while preloading; ``None`` keeps what is stored.

    Raises:
        IncompatibleOptionsError: options that are incompatible; raised before any data is touched.
        DatasetNotFoundError: directory, configuration, split or tensor missing.
        CorruptFileError: a file that cannot be trusted.
        IntegrityError: tensors that contradict each other or the configuration.
        InsufficientMemoryError: what should be preloaded does not fit.

    Example:
        >>> ds = JASPERSteeringDataset("data/wordnet", "train")            # doctest: +SKIP
        >>> batch = next(iter(DataLoader(ds, batch_size=32, shuffle=True)))  # doctest: +SKIP
        >>> batch["negative_embs"].shape                                   # doctest: +SKIP
        torch.Size([32, 5, 384])
    """

    split: Split
    reloadable: ClassVar[tuple[str, ...]] = ("hard_negatives", "negative_tiers")  # type: ignore[misc]
    nouns: ClassVar[Nouns] = NOUNS  # type: ignore[misc]

    def __init__(
        self,
        dataset_dir: str | PathLike[str],
        split: Split,
        epoch: int = 0,
        device: torch.device | str | None = None,
        storage_format: str = "auto",
        use_mmap: bool | None = None,
        *,
        seed: int = 42,
        memory_limit: int | str | None = None,
        dtype: torch.dtype | None = None,
        admit: Callable[[Plan], None] | None = None,
    ) -> None:
        check_int("epoch", epoch, at_least=0)
        config, opened = _opened(
            dataset_dir,
            (check_split(split),),
            format=storage_format,
            use_mmap=use_mmap,
            device=device,
            memory_limit=memory_limit,
            dtype=dtype,
            admit=admit,
        )
        self._config = config
        self._attach(opened, split, epoch=epoch, seed=seed)

    @classmethod
    def create_combined_splits(
        cls,
        dataset_dir: str | PathLike[str],
        epoch: int = 0,
        device: torch.device | str | None = None,
        storage_format: str = "auto",
        use_mmap: bool | None = None,
        *,
        seed: int = 42,
        memory_limit: int | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Self]:
        """All three splits over one store: what is preloaded is held once.

        Args are those of the constructor, without ``split``.

        Returns:
            ``{"train": ..., "val": ..., "test": ...}``; the store closes with the last of them.
        """
        return cls.open_splits(
            dataset_dir,
            SPLITS,
            epoch=epoch,
            seed=seed,
            format=storage_format,
            use_mmap=use_mmap,
            device=device,
            memory_limit=memory_limit,
            dtype=dtype,
        )

    @classmethod
    def open_splits(
        cls,
        dataset_dir: str | PathLike[str],
        splits: Sequence[Split],
        *,
        epoch: int = 0,
        seed: int = 42,
        **options: Any,
    ) -> dict[str, Self]:
        """Some splits over one store; the options are those of the constructor, with ``format`` for the format."""
        check_int("epoch", epoch, at_least=0)
        config, opened = _opened(dataset_dir, splits, **{"use_mmap": None, "device": None, **options})
        datasets: dict[str, Self] = {}
        for split in splits:
            datasets[split] = made = cls.__new__(cls)
            # An alternative constructor.
            made._config = config  # noqa: SLF001
            made._attach(opened, split, epoch=epoch, seed=seed)  # noqa: SLF001
        return datasets

    # --- curriculum -------------------------------------------------------------------------------------------

    @property
    def current_epoch(self) -> int:
        """The current epoch, as every worker sees it."""
        return self.epoch

    @property
    def steering_probs(self) -> dict[str, float]:
        """Probability of each steering variant in the current epoch, by its name."""
        return dict(zip(VARIANTS, self._config.curriculum.probabilities(self.epoch), strict=True))

    def force_steering(self, variant: str | None) -> None:
        """Give every sample one steering variant, as in validation; ``None`` returns to the curriculum.

        Args:
            variant: ``"none"``, ``"centroid"``, ``"keyword_weighted"``, ``"residual"`` (also ``"zero"`` and
                ``"keyword"``), or ``None``.

        Raises:
            UnknownNameError: no such variant.
        """
        self._state.force(None if variant is None else variant_number(variant))

    def get_steering_stats(self) -> dict[str, Any]:
        """The epoch, the curriculum's probabilities at it, and the names of the variants in the same order."""
        self._open()
        epoch = self.epoch
        probabilities = self._config.curriculum.probabilities(epoch)
        return {"epoch": epoch, "probs": list(probabilities), "variant_names": list(VARIANTS)}

    # --- parts ------------------------------------------------------------------------------------------------

    def subset_by_cluster(self, cluster_ids: Iterable[int]) -> ArraySubset:
        """The samples of some clusters.

        Args:
            cluster_ids: rows of ``centroid_embs``.

        Returns:
            A ``torch.utils.data.Subset``, in the order of the split; it may be empty.

        Raises:
            UnknownNameError: a cluster that does not exist.
        """
        wanted = torch.as_tensor(list(cluster_ids), dtype=torch.int64)
        clusters = self.n_clusters
        unknown = wanted[(wanted < 0) | (wanted >= clusters)].tolist()
        if unknown:
            raise UnknownNameError(f"unknown cluster {unknown[0]}; the dataset has clusters 0 to {clusters - 1}")
        found: list[torch.Tensor] = []
        start = 0
        clusters_of = self.store[self._cluster_tensor()]
        listed = self.split_indices
        for first in range(0, len(listed), 1 << 20):
            pairs = listed[first : first + (1 << 20)]
            ids = clusters_of.take(pairs.to(torch.int64)).to(torch.int64)
            found.append(torch.isin(ids.cpu(), wanted).nonzero().view(-1) + start)
            start += len(pairs)
        return ArraySubset(self, torch.cat([*found, torch.empty(0, dtype=torch.int64)]).numpy())

    def _cluster_tensor(self) -> str:
        """Name of the tensor that holds the cluster of each row.

        Raises:
            IncompatibleOptionsError: it was left out when the dataset was packed.
        """
        name = "pair_cluster_id" if self.packed is None else "cluster_id"
        if name not in self.store:
            raise IncompatibleOptionsError(
                "expected the clusters of the samples, found that they were left out when the dataset was packed; pack it"
                " with the field cluster_id"
            )
        return name

    @property
    def n_clusters(self) -> int:
        """How many clusters there are: rows of ``centroid_embs``, else what the configuration or the pairs say."""
        if "centroid_embs" in self.store:
            return self.store["centroid_embs"].n_rows
        if self._config.n_clusters is not None:
            return self._config.n_clusters
        return max((int(ids.max()) + 1 for ids in self.store[self._cluster_tensor()].blocks(1 << 20)), default=0)

    def reload_negatives(self) -> None:
        """Read ``hard_negatives`` and ``negative_tiers`` from disk again, as after mining new ones.

        The new ones are checked before they are swapped in; on any error the old ones stay. Running workers follow
        before their next batch.

        Raises:
            CorruptFileError, DatasetNotFoundError, IntegrityError: what is wrong with the new ones.
            IncompatibleOptionsError: the dataset is packed: its negatives are written anew by packing them again.
        """
        if self.packed is not None:
            raise IncompatibleOptionsError(
                "a packed dataset holds copies of its negatives: pack them again, js.pack(source, packed,"
                " columns=['negative_embs', 'negative_tiers']), and open the dataset again"
            )
        self.reload()

    # --- facts ------------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """The configuration file, as it stands."""
        self._open()
        return dict(self._config.values)

    @property
    def split_indices(self) -> torch.Tensor:
        """Pair rows [N] of the split's samples; of a packed dataset its own rows. A view, not to be written to."""
        return self.store[self.graph.nodes[self.graph.row.node].tensor].tensor()

    @property
    def embedding_dim(self) -> int:
        """Columns of every embedding, D."""
        return self._config.embedding_dim

    @property
    def n_neg(self) -> int:
        """Hard negatives per sample."""
        return self._config.n_neg

    def _compute_memory_usage(self) -> float:
        """:attr:`memory_usage_mb`, by the name that RAG_supporters gives it."""
        return self.memory_usage_mb

    def value_ranges(self) -> Mapping[str, tuple[float, float]]:
        """Lowest and highest value of the fields that have such."""
        return {
            "relevance": (0.0, 1.0),
            "centroid_distance": (0.0, 2.0),
            "steering_variant": (0, len(VARIANTS) - 1),
            "negative_tiers": (0, _HIGHEST_TIER),
            **({"cluster_id": (0, self.n_clusters - 1)} if self._has_clusters() else {}),
        }

    def _has_clusters(self) -> bool:
        return self.packed is None or "cluster_id" in self.store

    def __getattr__(self, name: str) -> torch.Tensor | RaggedTensor:
        """A tensor by its name, ``ds.question_embs``: a view, not to be written to. ``pair_keyword_ids`` is ragged."""
        if name not in TENSORS or self.__dict__.get("_opened") is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if f"{name}.offsets" in self.store:
            return self.store.ragged(name)
        if name not in self.store:
            raise AttributeError(f"this dataset has no tensor {name}; it has {', '.join(self.store)}")
        return self.store[name].tensor()

    @staticmethod
    def convert_pt_to_hdf5(
        dataset_dir: str | PathLike[str], compression: str | None = "gzip", *, overwrite: bool = False
    ) -> ConversionReport:
        """Write ``dataset.h5`` beside the ``.pt`` files of a directory and print the measured sizes.

        Args:
            dataset_dir: directory with the ``.pt`` files.
            compression: ``"gzip"`` (with the shuffle filter), ``"lzf"`` or ``None``.
            overwrite: replace a ``dataset.h5`` that is there.

        Returns:
            The report of the conversion, with sizes, times and checksums.

        Raises:
            DatasetNotFoundError: no ``.pt`` files there.
            ConversionError: it could not be finished; nothing was left behind.
        """
        report = convert(
            Path(dataset_dir),
            source_format="pt",
            format="hdf5",
            compression=compression,
            overwrite=overwrite,
            schema=SCHEMA,
        )
        print(report)  # noqa: T201 (the promised output of this method)
        return report


def _opened(
    dataset_dir: str | PathLike[str],
    splits: Sequence[Split],
    *,
    use_mmap: bool | None,
    device: torch.device | str | None,
    admit: Callable[[Plan], None] | None = None,
    **options: Any,
) -> tuple[Config, OpenedDataset]:
    """Configuration and checked store of a directory."""
    # What is wrong with the options alone is said first, even of a directory that is not there.
    check_options(use_mmap=use_mmap, device=device)
    directory = local_path(dataset_dir)
    config = read_config(directory)
    packed = packed_at(directory)
    if packed is not None:
        declaration = packed_declaration(config.curriculum, config.values, directory / CONFIG_NAME)
        _require_packed_splits(declaration, splits, directory)
        more: dict[str, Any] = {"packed": packed}
    else:
        declaration = declaration_for(config.curriculum)
        more = {
            "schema": SCHEMA,
            "inspect": lambda specs: _inspect(specs, config, splits, directory),
            "nouns": NOUNS,
            "bounds": unread_bounds,
        }
    opened = open_dataset(
        directory, declaration, list(splits), use_mmap=use_mmap, device=device, admit=admit, **more, **options
    )
    return config, opened


def _require_packed_splits(declaration: Declaration, splits: Sequence[Split], directory: Path) -> None:
    for split in splits:
        if split not in declaration.splits:
            raise DatasetNotFoundError(
                f"{directory}: expected a packed split {split!r}, found {', '.join(declaration.splits) or 'none'}; pack"
                " that split too, or serve another one",
                path=directory,
            )


def _inspect(specs: Mapping[str, Any], config: Config, splits: Sequence[Split], directory: Path) -> None:
    check_structure(specs, config, splits, directory)
