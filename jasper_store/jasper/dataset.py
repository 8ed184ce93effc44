"""``JASPERSteeringDataset``: (question, steering, source) triplets with hard negatives and a curriculum."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset
from typing_extensions import Self

from jasper_store.conversion.converter import convert
from jasper_store.conversion.report import ConversionReport
from jasper_store.errors import ClosedError, UnknownNameError
from jasper_store.jasper.gather import KEYS, Draw, Rows, chain_of, gather, rows_of, steering_rows
from jasper_store.jasper.negatives import reopened_negatives, warn_kept
from jasper_store.jasper.opened import OpenedDataset, open_dataset
from jasper_store.jasper.schema import SCHEMA, SPLITS, Split, check_split, split_tensor
from jasper_store.jasper.steering import VARIANTS, variant_number
from jasper_store.samples.batch import Batch, Sample
from jasper_store.samples.shared_state import SharedState
from jasper_store.samples.subset import ArraySubset
from jasper_store.store.compiled_gather import CompiledGather
from jasper_store.store.resident import empty_rows, pinned_rows
from jasper_store.store.store import TensorStore

if TYPE_CHECKING:
    from jasper_store.loading.window_prefetcher import WindowPrefetcher

__all__ = ["JASPERSteeringDataset"]

_FINGERPRINT_SAMPLE = 4096


def _positions(indices: Sequence[int] | torch.Tensor | np.ndarray[Any, Any]) -> torch.Tensor:
    """Positions as an int64 tensor."""
    if isinstance(indices, list):
        # PyTorch's samplers give lists of ints; by way of an array they cost a third.
        return torch.from_numpy(np.array(indices, dtype=np.int64))
    return torch.as_tensor(indices, dtype=torch.int64)


class JASPERSteeringDataset(Dataset[dict[str, torch.Tensor]]):
    """Pre-computed (question, steering, source) embeddings with hard negatives and a curriculum.

    A sample is a pure function of the dataset's bytes, ``seed``, the epoch and the sample's position. Worker count,
    start method, batch size, ranks, file format and placement change nothing.

    Safe to use from forked and spawned DataLoader workers; ``set_epoch``, ``force_steering`` and
    ``reload_negatives`` reach them while they run, persistent ones too. Pickles to a few kilobytes at any size and
    reopens its files where it arrives, preloaded tensors as maps.

    Args:
        dataset_dir: directory with ``config.json`` and the tensors.
        split: ``"train"``, ``"val"`` or ``"test"``.
        epoch: initial epoch, which decides the steering probabilities.
        device: ``None`` or ``"cpu"`` for host memory; a CUDA device preloads everything there; ``"auto"`` decides.
        storage_format: ``"auto"``, ``"pt"``, ``"hdf5"``, ``"safetensors"`` or ``"npy"``.
        use_mmap: ``None`` plans by the memory available, ``True`` maps everything, ``False`` preloads everything.
        seed: seed of the steering draw.
        memory_limit: upper bound in bytes on what may be preloaded.
        dtype: floating dtype to convert embeddings to while preloading; ``None`` keeps what is stored.

    Raises:
        IncompatibleOptionsError: options that cannot hold together; raised before any data is touched.
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
        memory_limit: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        opened = open_dataset(
            Path(dataset_dir),
            (check_split(split),),
            storage_format=storage_format,
            use_mmap=use_mmap,
            device=device,
            memory_limit=memory_limit,
            dtype=dtype,
        )
        self._attach(opened, split, epoch, seed)

    def _attach(self, opened: OpenedDataset, split: Split, epoch: int, seed: int) -> None:
        self._opened: OpenedDataset | None = opened.join()
        self._control = SharedState(epoch)
        self._negatives_seen = 0
        self._draw: Draw | None = None
        self._chain: tuple[Draw, int, CompiledGather | None] | None = None
        # Whether a batch announces its own rows; a loader that looks ahead has done so before.
        self.announces = True
        # Steering rows that a loader has read ahead of its batches, while it serves a pass.
        self.staged: WindowPrefetcher | None = None
        self._size = opened.sizes[split]
        self.split: Split = split
        self.seed = seed

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
        memory_limit: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Self]:
        """All three splits over one store: what is preloaded is held once.

        Args are those of the constructor, without ``split``.

        Returns:
            ``{"train": ..., "val": ..., "test": ...}``; the store closes with the last of them.
        """
        opened = open_dataset(
            Path(dataset_dir),
            SPLITS,
            storage_format=storage_format,
            use_mmap=use_mmap,
            device=device,
            memory_limit=memory_limit,
            dtype=dtype,
        )
        datasets: dict[str, Self] = {}
        for split in SPLITS:
            datasets[split] = cls.__new__(cls)
            datasets[split]._attach(opened, split, epoch, seed)  # noqa: SLF001 (an alternative constructor)
        return datasets

    # --- samples ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of samples in the split."""
        return self._size

    def __getitem__(self, index: int) -> Sample:
        """One sample: the keys of a batch, without the leading dimension.

        Raises:
            IndexError: not 0 <= index < len(self); negative indices are not wrapped.
            ClosedError: the dataset was closed.
        """
        position = operator.index(index)
        if not 0 <= position < self._size:
            raise IndexError(f"Index {position} out of range [0, {self._size}) of split {self.split!r}")
        return self.__getitems__(torch.tensor([position]))[0]

    def __getitems__(self, indices: Sequence[int] | torch.Tensor | np.ndarray[Any, Any]) -> Batch:
        """Samples at these positions, gathered once per tensor; any order, repeats allowed.

        Args:
            indices: positions [B] in the split; an int64 tensor is fastest.

        Returns:
            A :class:`~jasper_store.samples.batch.Batch` of B samples: ``question_emb [B, D]``,
            ``target_source_emb [B, D]``, ``steering [B, D]``, ``negative_embs [B, n_neg, D]``, ``cluster_id [B]``,
            ``relevance [B]``, ``centroid_distance [B]``, ``steering_variant [B]`` (0 none, 1 centroid,
            2 keyword_weighted, 3 residual), ``negative_tiers [B, n_neg]``.

        Raises:
            IndexError: a position outside [0, len(self)).
            ClosedError: the dataset was closed.
        """
        return self.gathered(indices)

    def gathered(self, indices: Sequence[int] | torch.Tensor | np.ndarray[Any, Any], *, pinned: bool = False) -> Batch:
        """What :meth:`__getitems__` gives; in pinned memory if that costs no copy, which the caller has to look at.

        Args:
            indices: positions [B] in the split.
            pinned: for batches that go to a CUDA device next.
        """
        chain = self._chain_now()
        positions = _positions(indices)
        if chain is not None:
            taken = chain.run(positions, empty=pinned_rows if pinned else empty_rows)
            return Batch(dict(zip(KEYS, taken, strict=True)), positions.shape[0])
        steering = None
        if self.staged is not None:
            draw = self.draw_now()
            found = self.staged.batch(positions, draw)
            if found is not None:
                return Batch(dict(zip(KEYS, found, strict=True)), positions.shape[0])
            steering = self.staged.steering(positions, draw)
        rows = self._rows(positions)
        store = self.store
        if self.announces and store.use_mmap:
            for name, wanted in rows.by_tensor().items():
                store[name].announce(wanted)
        return Batch(gather(store, rows, steering), len(rows.pairs))

    def rows_of(
        self, indices: Sequence[int] | torch.Tensor | np.ndarray[Any, Any], epoch: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Rows of each large tensor that a batch at these positions will read, for announcing them beforehand.

        Args:
            indices: positions [B] in the split.
            epoch: epoch of the draw; the dataset's own by default.

        Returns:
            Tensor name to int64 rows; of the steering tensors only the rows whose variant will be drawn.
        """
        return self._rows(indices, epoch).by_tensor()

    def steering_rows(self, pairs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows of each steering tensor that pair rows will read; nothing is read to know them.

        Args:
            pairs: pair rows, int64 [B], on the dataset's device.

        Returns:
            Tensor name to int64 rows: of the pairs that draw its variant.
        """
        epoch, forced, _ = self._control.read()
        return steering_rows(pairs, self._draw_of(self._open(), epoch, forced).variants(pairs))

    def draw_now(self) -> Draw:
        """What decides the steering of batches from now on; also follows new negatives."""
        epoch, forced, generation = self._control.read()
        if generation != self._negatives_seen:
            self._follow_negatives(generation)
        return self._draw_of(self._open(), epoch, forced)

    def _chain_now(self) -> CompiledGather | None:
        """The whole gather as one call, where everything is in memory; of the present epoch and negatives."""
        draw = self.draw_now()
        opened = self._open()
        known = self._chain
        if known is None or known[0] is not draw or known[1] != opened.store.generation:
            made = chain_of(opened.store, self.split, draw)
            self._chain = known = (draw, opened.store.generation, made)
        return known[2]

    def _rows(self, indices: Sequence[int] | torch.Tensor | np.ndarray[Any, Any], epoch: int | None = None) -> Rows:
        draw, opened = self.draw_now(), self._open()
        if epoch is not None:
            draw = self._draw_of(opened, epoch, draw.forced)
        positions = _positions(indices)
        if opened.store.device.type != "cpu":
            positions = positions.to(opened.store.device, non_blocking=True)
        return rows_of(opened.store, self.split, positions, draw)

    def _draw_of(self, opened: OpenedDataset, epoch: int, forced: int | None) -> Draw:
        """The draw of an epoch; kept, because it is asked for with every batch and changes once an epoch."""
        draw = self._draw
        if draw is None or draw.epoch != epoch or draw.forced != forced:
            probabilities = opened.config.curriculum.probabilities(epoch)
            self._draw = draw = Draw(self.seed, epoch, probabilities, forced, opened.sizes["pairs"])
        return draw

    # --- curriculum -------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Move the curriculum and the steering draw to an epoch; reaches running workers.

        Batches that workers have already prefetched keep the epoch they were made for.
        """
        self._control.set_epoch(epoch)

    def settings(self) -> tuple[int, int | None, int]:
        """What may change during an epoch and decides batches from then on: epoch, forced variant, negatives."""
        return self._control.read()

    @property
    def epoch(self) -> int:
        """The current epoch, as every worker sees it."""
        return self._control.read()[0]

    def force_steering(self, variant: str | None) -> None:
        """Give every sample one steering variant, as in validation; ``None`` returns to the curriculum.

        Args:
            variant: ``"none"``, ``"centroid"``, ``"keyword_weighted"``, ``"residual"`` (also ``"zero"`` and
                ``"keyword"``), or ``None``.

        Raises:
            UnknownNameError: no such variant.
        """
        self._control.force(None if variant is None else variant_number(variant))

    def get_steering_stats(self) -> dict[str, Any]:
        """The epoch, the curriculum's probabilities at it, and the names of the variants in the same order."""
        epoch = self.epoch
        probabilities = self._open().config.curriculum.probabilities(epoch)
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
        clusters = self._open().sizes["clusters"]
        unknown = wanted[(wanted < 0) | (wanted >= clusters)].tolist()
        if unknown:
            raise UnknownNameError(f"unknown cluster {unknown[0]}; the dataset has clusters 0 to {clusters - 1}")
        found: list[torch.Tensor] = []
        start = 0
        for pairs in self.store[split_tensor(self.split)].blocks(1 << 20):
            ids = self.store["pair_cluster_id"].take(pairs.to(torch.int64)).to(torch.int64)
            found.append(torch.isin(ids.cpu(), wanted).nonzero().view(-1) + start)
            start += len(pairs)
        return ArraySubset(self, torch.cat([*found, torch.empty(0, dtype=torch.int64)]).numpy())

    def reload_negatives(self) -> None:
        """Read ``hard_negatives`` and ``negative_tiers`` from disk again, as after mining new ones.

        The new ones are checked before they are swapped in; on any error the old ones stay. Running workers follow
        before their next batch.

        Raises:
            CorruptFileError, DatasetNotFoundError, IntegrityError: what is wrong with the new ones.
        """
        opened = self._open()
        opened.store.replace(reopened_negatives(opened))
        self._control.negatives_changed()
        self._negatives_seen = self._control.read()[2]

    def _follow_negatives(self, generation: int) -> None:
        """Do in a worker what ``reload_negatives`` did in the trainer's process."""
        opened = self._open()
        try:
            opened.store.replace(reopened_negatives(opened))
        except (ValueError, OSError) as exc:
            warn_kept(exc)
        self._negatives_seen = generation

    # --- facts ------------------------------------------------------------------------------------------------

    def _open(self) -> OpenedDataset:
        if self._opened is None:
            raise ClosedError(f"the dataset (split {self.split!r}) is closed; open it again to use it")
        return self._opened

    @property
    def store(self) -> TensorStore:
        """The tensors that the samples are read from."""
        return self._open().store

    @property
    def config(self) -> dict[str, Any]:
        """The configuration file, as it stands."""
        return dict(self._open().config.values)

    @property
    def dataset_dir(self) -> Path:
        """The directory it was opened from."""
        return self.store.path

    @property
    def split_indices(self) -> torch.Tensor:
        """Pair rows [N] of the split's samples; a view, not to be written to."""
        return self.store[split_tensor(self.split)].tensor()

    @property
    def storage_format(self) -> str:
        """The format that is read: ``"pt"``, ``"hdf5"``, ``"safetensors"`` or ``"npy"``."""
        return self.store.format

    @property
    def use_mmap(self) -> bool:
        """Whether any tensor is mapped."""
        return self.store.use_mmap

    @property
    def device(self) -> torch.device:
        """Where batches are made."""
        return self.store.device

    @property
    def embedding_dim(self) -> int:
        """Columns of every embedding, D."""
        return self._open().config.embedding_dim

    @property
    def n_neg(self) -> int:
        """Hard negatives per sample."""
        return self._open().config.n_neg

    @property
    def memory_usage_mb(self) -> float:
        """MiB that preloaded tensors hold, in host or device memory; mapped pages belong to the page cache."""
        return self.store.plan.preloaded_nbytes / 2**20

    def fingerprint(self) -> str:
        """A short digest of what decides the order of samples: split, sizes, and a sample of the split's rows.

        Constant time at any size: the rows at up to 4096 evenly spaced positions are read.
        """
        opened = self._open()
        count = min(self._size, _FINGERPRINT_SAMPLE)
        positions = torch.arange(count, dtype=torch.int64) * self._size // max(count, 1)
        rows = opened.store[split_tensor(self.split)].take(positions.to(opened.store.device)).cpu().to(torch.int64)
        digest = xxhash.xxh3_64()
        digest.update(repr((self.split, sorted(opened.sizes.items()))).encode())
        digest.update(rows.numpy().tobytes())
        return digest.hexdigest()

    # --- end --------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # Workers open the files anew, so they begin with the negatives that are on disk, and draw for themselves.
        return self.__dict__ | {
            "_draw": None,
            "_chain": None,
            "staged": None,
            "_negatives_seen": self._control.read()[2],
        }

    def close(self) -> None:
        """Release files, maps and preloaded tensors; safe to call twice. Batches already made stay valid."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            opened.leave()

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._opened is None:
            return f"JASPERSteeringDataset(split={self.split!r}, closed)"
        return (
            f"JASPERSteeringDataset({str(self.dataset_dir)!r}, {self.split!r}, {self._size} samples,"
            f" format={self.storage_format!r}, use_mmap={self.use_mmap}, device={str(self.device)!r})"
        )

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
