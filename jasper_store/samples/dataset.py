"""``Dataset``: the samples of any directory of tensors, each batch gathered once per tensor."""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final, overload

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset as TorchDataset
from typing_extensions import Self

from jasper_store.errors import ClosedError, DeclarationError, JasperStoreWarning
from jasper_store.samples.batch import Batch, Sample
from jasper_store.samples.compiler import build_graph
from jasper_store.samples.context import DIRECT, PREFETCHED, GatherContext, PrefetchedIndices
from jasper_store.samples.declaration import Choice, Declaration, FieldLike
from jasper_store.samples.describe import field_lines, placement_of
from jasper_store.samples.draw import VariantSampler
from jasper_store.samples.graph import SampleGraph
from jasper_store.samples.integrity import Nouns
from jasper_store.samples.opened import OpenedDataset, open_dataset
from jasper_store.samples.packed import Packed
from jasper_store.samples.reader import BatchIndices, SampleReader
from jasper_store.samples.reload import reopened_tensors
from jasper_store.samples.shared_batch import BatchSpace, in_worker
from jasper_store.samples.shared_state import SharedState
from jasper_store.store.guard import check_int

if TYPE_CHECKING:
    from collections.abc import Callable

    from jasper_store.store.compiled_gather import CompiledGather
    from jasper_store.store.opening import FileOrFiles
    from jasper_store.store.placement import Plan
    from jasper_store.store.store import TensorStore

__all__ = ["Dataset"]

_LOG: Final = logging.getLogger("jasper_store")
_FINGERPRINT_SAMPLE: Final = 4096
_OWN: Final = frozenset({"_opened", "_state", "_draw", "_compiled", "_reader"})
"""Attributes that a copy of a dataset makes for itself."""
_FIXED: Final = frozenset({"_config", "_keys"})
"""Attributes that are never written to, so that copies share them; a subclass's own are copied."""


class Dataset(TorchDataset[dict[str, torch.Tensor]]):
    """Samples of any tensors: declared once, gathered once per tensor and batch.

    A sample is a pure function of the tensors' bytes, ``seed``, the epoch and the sample's position. Worker count,
    start method, batch size, ranks, file format and placement change nothing.

    Safe to use from forked and spawned DataLoader workers; ``set_epoch`` reaches them while they run, persistent ones
    too. Pickles to a few kilobytes at any size and reopens its files where it arrives, preloaded tensors as maps.

    Args:
        path: a directory of tensor files in any format, one file, several files, or a dataset of the Hub as
            ``"hf://owner/name"``.
        fields: name of each field to the expression that it is read by, see :mod:`jasper_store.samples.expression`.
            Without, what ``config.json`` declares under ``"samples"``; else each tensor of the common number of rows
            is a field of the same name.
        splits: name of each split to the tensor that lists its rows; then ``i`` is a sample's position in the split,
            and ``row`` its row. Goes with ``fields``.
        split: the split to serve; ``None`` serves all rows.
        seed: seed of draws.
        format: ``"auto"``, ``"pt"``, ``"hdf5"``, ``"safetensors"`` or ``"npy"``.
        use_mmap: ``None`` plans by the memory available, ``True`` maps everything, ``False`` preloads everything.
        device: ``None`` or ``"cpu"`` for host memory; a CUDA device preloads what is read there; ``"auto"`` decides.
        memory_limit: upper bound on what may be preloaded: bytes, or a text such as ``"8GiB"``.
        dtype: floating dtype that floating tensors of two or more dimensions are served in.
        admit: called with the plan before anything is loaded; raises what forbids it.

    Raises:
        IncompatibleOptionsError: options that are incompatible; raised before any data is touched.
        DeclarationError: fields that cannot be understood or do not fit the tensors.
        UnknownNameError: a tensor or a split that does not exist.
        DatasetNotFoundError, CorruptFileError: files that are not there or cannot be trusted.
        IntegrityError: an index that is no row of what it indexes.
        InsufficientMemoryError: what should be preloaded does not fit.

    Example:
        >>> ds = Dataset("data/", {"emb": "embeddings[i]", "label": "labels[i]"})  # doctest: +SKIP
        >>> ds.__getitems__([5, 3, 5]).tensors["emb"].shape                        # doctest: +SKIP
        torch.Size([3, 384])
    """

    #: Tensors that :meth:`reload` reads again, and what rows of tensors are called in errors.
    reloadable: tuple[str, ...] = ()
    nouns: Nouns = MappingProxyType({})

    def __init__(
        self,
        path: FileOrFiles,
        fields: Mapping[str, FieldLike] | None = None,
        *,
        splits: Mapping[str, str] | None = None,
        split: str | None = None,
        seed: int = 42,
        format: str = "auto",  # noqa: A002 - the word that users pass
        use_mmap: bool | None = None,
        device: torch.device | str | None = None,
        memory_limit: int | str | None = None,
        dtype: torch.dtype | None = None,
        admit: Callable[[Plan], None] | None = None,
    ) -> None:
        if fields is None and splits is not None:
            raise DeclarationError("splits= goes with fields=; declare both, or neither to take those of config.json")
        opened = open_dataset(
            path,
            None if fields is None else Declaration.parse(fields, splits),
            [split],
            format=format,
            use_mmap=use_mmap,
            device=device,
            memory_limit=memory_limit,
            dtype=dtype,
            admit=admit,
        )
        self._attach(opened, split, epoch=0, seed=seed)

    @classmethod
    def over(cls, opened: OpenedDataset, split: str | None, *, epoch: int = 0, seed: int = 42) -> Self:
        """A split of a dataset that is open: splits of one share its store, which closes with the last of them."""
        made = cls.__new__(cls)
        made._attach(opened, split, epoch=epoch, seed=seed)  # noqa: SLF001 (an alternative constructor)
        return made

    def _attach(self, opened: OpenedDataset, split: str | None, *, epoch: int, seed: int) -> None:
        self._opened: OpenedDataset | None = opened.acquire()
        self._state = SharedState(epoch)
        self._generation_seen = 0
        self._draw: VariantSampler | None = None
        self._compiled: tuple[VariantSampler | None, int, CompiledGather | None] | None = None
        self._reader: SampleReader | None = None
        self.split = split
        self.seed = seed
        graph = self.reader.graph
        self._size = graph.length
        self._sample_nbytes = graph.sample_nbytes
        if graph.choice is not None:
            self.choice().at(0)  # a function that is missing is said now, and not by the first batch
        _LOG.info("%s: %s", opened.store.path, placement_of(opened.store.plan, self._size))

    # --- samples ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of samples in the split."""
        return self._size

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(
        self, index: Sequence[int] | torch.Tensor | np.ndarray[Any, Any] | slice
    ) -> dict[str, torch.Tensor]: ...
    def __getitem__(self, index: Any) -> dict[str, torch.Tensor]:
        """One sample, or a batch of several.

        Args:
            index: a position; or several as a list, a 1-D tensor or array, or a slice, so that
                ``DataLoader(ds, batch_size=None, sampler=BatchSampler(...))`` works.

        Returns:
            For one position the keys of a batch without the leading dimension; for several a batch, as a dictionary.

        Raises:
            IndexError: not 0 <= index < len(self); negative indices are not wrapped.
            ClosedError: the dataset was closed.
        """
        if isinstance(index, slice):
            return self.__getitems__(torch.arange(self._size)[index]).tensors
        if getattr(index, "ndim", 0) == 1 or isinstance(index, (list, tuple, range)):
            return self.__getitems__(index).tensors
        position = operator.index(index)
        if not 0 <= position < self._size:
            of = "" if self.split is None else f" of split {self.split!r}"
            raise IndexError(f"Index {position} out of range [0, {self._size}){of}")
        return self.gather(torch.tensor([position]))[0]

    def __getitems__(self, indices: Sequence[int] | torch.Tensor | np.ndarray[Any, Any]) -> Batch:
        """Samples at these positions, gathered once per tensor; any order, repeats allowed.

        Args:
            indices: positions [B] in the split; an int64 tensor is fastest.

        Returns:
            A :class:`~jasper_store.samples.batch.Batch` of B samples, each field [B, ...]. A ragged field X is
            ``X.values`` [total, ...] and ``X.offsets`` [B + 1], int64, as embedding bags and variable-length attention
            take it; ``torch.nested.nested_tensor_from_jagged`` makes a nested tensor of both.

        Raises:
            IndexError: a position outside [0, len(self)).
            ClosedError: the dataset was closed.
        """
        context = PREFETCHED if isinstance(indices, PrefetchedIndices) else DIRECT
        if not in_worker():
            return self.gather(indices, context)
        positions = _positions(indices)
        space = BatchSpace(positions.shape[0], self._sample_nbytes, ragged=bool(self.graph.ragged_keys))
        batch = self.gather(positions, GatherContext(context.prefetched, empty=space.empty))
        return Batch(space.hold(batch.tensors), len(batch), batch.ragged)

    def gather(
        self, indices: Sequence[int] | torch.Tensor | np.ndarray[Any, Any], context: GatherContext = DIRECT
    ) -> Batch:
        """What :meth:`__getitems__` gives, for a loader that knows more of the batch.

        Args:
            indices: positions [B] in the split.
            context: what it knows.
        """
        draw = self.draw_now()
        compiled, positions = self._compiled_now(draw), _positions(indices)
        if compiled is not None:
            taken = compiled.run(positions, empty=context.empty)
            return Batch(dict(zip(self._keys, taken, strict=True)), positions.shape[0])
        size = positions.shape[0]
        staged: Mapping[int, torch.Tensor] = {}
        if context.staged is not None:
            whole = context.staged.batch(positions, draw)
            if whole is not None:
                return Batch(dict(zip(self._keys, whole, strict=True)), size)
            staged = context.staged.rows(positions, draw)
        found = self.reader.resolve(self._on_device(positions), draw)
        if not context.prefetched and self.store.use_mmap:
            self._prefetch(found)
        return Batch(self.reader.gather(found, draw, staged), size, self.graph.ragged_keys)

    def begin_gather(self, positions: torch.Tensor, context: GatherContext = DIRECT) -> Callable[[], Batch] | None:
        """Let a helper thread begin :meth:`gather`.

        Args:
            positions: int64 [B] in the split, in host memory.
            context: what a loader knows of the batch.

        Returns:
            Waits for the batch; ``None`` unless all tensors are in memory.

        Raises:
            IndexError: a position outside [0, len(self)).
        """
        compiled = self._compiled_now(self.draw_now())
        if compiled is None:
            return None
        finish = compiled.begin(positions, empty=context.empty)
        return lambda: Batch(dict(zip(self._keys, finish(), strict=True)), positions.shape[0])

    def rows_of(self, indices: Sequence[int] | torch.Tensor | np.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
        """Rows of each tensor that a batch at these positions will read last, for prefetching them.

        Args:
            indices: positions [B] in the split.

        Returns:
            Stored name to int64 rows; of a choice only the rows of the variant that will be drawn.
        """
        positions = self._on_device(_positions(indices))
        reader = self.reader
        return reader.rows_by_tensor(reader.resolve(positions, self.draw_now()), reader.last_nodes)

    def _prefetch(self, found: BatchIndices) -> None:
        """Ask for the rows of all tensors at once, before they are gathered one after the other."""
        store, draw = self.store, self._draw
        cold: dict[int, list[str]] = {}
        for number in self.reader.last_nodes:
            node = self.graph.nodes[number]
            for variant, name in enumerate(node.tensors, start=1):
                # A variant that is never drawn prefetches nothing, so the state of its pages stays unknown.
                if store[name].prefetching and not (node.choice and draw is not None and not draw.draws(variant)):
                    cold.setdefault(number, []).append(name)
        if cold:
            wanted = {name for names in cold.values() for name in names}
            for name, rows in self.reader.rows_by_tensor(found, list(cold)).items():
                if name in wanted:
                    store[name].prefetch(rows)

    def _on_device(self, positions: torch.Tensor) -> torch.Tensor:
        device = self.store.device
        return positions if device.type == "cpu" else positions.to(device, non_blocking=True)

    def draw_now(self) -> VariantSampler | None:
        """The draw that decides the variants of the next batches; also picks up reloaded tensors."""
        epoch, forced, generation = self._state.read()
        if generation != self._generation_seen:
            self._follow_reload(generation)
        draw = self._draw
        if draw is not None and draw.epoch == epoch and draw.forced == forced:
            return draw
        graph = self.reader.graph
        if graph.choice is not None:
            # Kept, because it is asked for with every batch and changes once an epoch.
            node = graph.nodes[graph.choice]
            choice = self.choice()
            numbers = None if choice.key is None else self.store[choice.key].take
            self._draw = VariantSampler(self.seed, epoch, choice.at(epoch), forced, node.n_rows, numbers)
        return self._draw

    def choice(self) -> Choice:
        """The choice that samples make, for a graph that has one."""
        fields = self.reader.graph.declaration.fields.values()
        return next(value for value in fields if isinstance(value, Choice))

    def _compiled_now(self, draw: VariantSampler | None) -> CompiledGather | None:
        """The whole gather as one call, for the current draw and tensors; ``None`` unless all is in memory."""
        generation, known = self.store.generation, self._compiled
        if known is None or known[0] is not draw or known[1] != generation:
            self._compiled = known = (draw, generation, self.reader.compile(draw))
        return known[2]

    # --- what changes while it is served ------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Move draws to an epoch; reaches running workers.

        Batches that workers have already prefetched keep the epoch they were made for.

        Raises:
            IncompatibleOptionsError: not a whole number from 0 on.
        """
        check_int("epoch", epoch, at_least=0)
        self._state.set_epoch(epoch)

    def state_version(self) -> tuple[int, int | None, int]:
        """What may change during an epoch and decides batches from then on: epoch, forced variant, reloaded tensors."""
        return self._state.read()

    @property
    def epoch(self) -> int:
        """The current epoch, as every worker sees it."""
        return self._state.read()[0]

    # --- facts ------------------------------------------------------------------------------------------------

    def _open(self) -> OpenedDataset:
        if self._opened is None:
            raise ClosedError(f"the dataset{self._of_split()} is closed; open it again to use it")
        return self._opened

    def _of_split(self) -> str:
        return "" if self.split is None else f" (split {self.split!r})"

    @property
    def store(self) -> TensorStore:
        """The tensors that the samples are read from."""
        return self._open().store

    @property
    def reader(self) -> SampleReader:
        """Which rows a sample reads, and how they are read."""
        found, opened = self._reader, self._open()
        if found is None:
            graph = build_graph(opened.declaration, opened.store, self.split)
            self._reader = found = SampleReader(graph, opened.store)
            self._keys = graph.keys
        return found

    @property
    def graph(self) -> SampleGraph:
        """What a sample reads, compiled: keys, shapes, dtypes, bounds."""
        return self.reader.graph

    @property
    def packed(self) -> Packed | None:
        """How the samples were packed; ``None`` for a dataset that was not packed."""
        return self._open().packed

    @property
    def fields(self) -> dict[str, str]:
        """Name of each field that is served, and the expression that it is read by."""
        declaration = self._open().declaration
        return {name: declaration.text_of(name) for name in declaration.served}

    @property
    def dataset_dir(self) -> Path:
        """The directory, or the file, that it was opened from."""
        return self.store.path

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
    def memory_usage_mb(self) -> float:
        """MiB that preloaded tensors hold, in host or device memory; mapped pages belong to the page cache."""
        return self.store.plan.preloaded_nbytes / 2**20

    def value_ranges(self) -> Mapping[str, tuple[float, float]]:
        """Fields of which more is known than their dtype: lowest and highest value, for ``validate_first_batch``."""
        return {}

    def fingerprint(self) -> str:
        """A short digest of what decides the order of samples: split, fields, shapes, and a sample of the split's rows.

        Constant time at any size: the rows at up to 4096 evenly spaced positions are read.
        """
        graph, store = self.graph, self.store
        sampled = b""
        if self.split is not None:
            count = min(self._size, _FINGERPRINT_SAMPLE)
            positions = torch.arange(count, dtype=torch.int64) * self._size // max(count, 1)
            rows = store[graph.nodes[graph.row.node].tensor].take(positions.to(store.device))
            sampled = rows.cpu().to(torch.int64).numpy().tobytes()
        names = {name for node in graph.nodes for name in node.tensors}
        return graph.fingerprint([(name, tuple(store[name].shape)) for name in names], sampled)

    def contents(self) -> str:
        """A digest of the checksums that the manifest records of the tensors that samples read; empty if one has none.

        Equal for copies of a dataset, whatever their place, format or file times. Reads no data.
        """
        manifest = self.store.manifest
        if manifest is None:
            return ""
        if manifest.generation is not None:
            return manifest.generation.digest()
        names = {name for node in self.graph.nodes for name in node.tensors}
        marks = sorted((spec.name, manifest.checksum(spec)) for spec in self.store.specs if spec.name in names)
        return "" if None in (mark for _, mark in marks) else xxhash.xxh3_128_hexdigest(repr(marks).encode())

    # --- reloading --------------------------------------------------------------------------------------------

    def reload(self) -> None:
        """Read the tensors of :attr:`reloadable` from disk again, as after writing new ones.

        The new ones are checked before they are swapped in; on any error the old ones stay. Running workers follow
        before their next batch.

        Raises:
            CorruptFileError, DatasetNotFoundError, IntegrityError: what is wrong with the new ones.
        """
        self.store.replace(reopened_tensors(self.store, self.reloadable, self.graph.bounds, self.nouns))
        self._state.tensors_changed()
        self._generation_seen = self._state.read()[2]

    def _follow_reload(self, generation: int) -> None:
        """Do in a worker what :meth:`reload` did in the trainer's process."""
        try:
            self.store.replace(reopened_tensors(self.store, self.reloadable, self.graph.bounds, self.nouns))
        except (ValueError, OSError) as exc:
            warnings.warn(
                f"new {' and '.join(self.reloadable)} could not be read in this worker, the old ones stay in use: {exc}",
                JasperStoreWarning,
                stacklevel=2,
            )
        self._generation_seen = generation

    # --- end --------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # Workers open the files anew, so they begin with the tensors that are on disk, and draw for themselves.
        mine = {"_draw": None, "_compiled": None, "_reader": None, "_generation_seen": self._state.read()[2]}
        return self.__dict__ | mine

    def __copy__(self) -> Self:
        return self._sharing({name: value for name, value in self.__dict__.items() if name not in _OWN})

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A dataset with a separate epoch over the same open store, wherever its tensors live.

        The tensors are never written to, so there is nothing to copy; the store closes with the last of its datasets.
        """
        rest = {name: value for name, value in self.__dict__.items() if name not in _OWN}
        made = self._sharing({name: value if name in _FIXED else deepcopy(value, memo) for name, value in rest.items()})
        memo[id(self)] = made
        return made

    def _sharing(self, attributes: Mapping[str, Any]) -> Self:
        made = type(self).__new__(type(self))
        made.__dict__.update(attributes)
        made._opened = self._open().acquire()  # noqa: SLF001 (an alternative constructor)
        made._state = self._state.copy()  # noqa: SLF001
        made._draw = made._compiled = made._reader = None  # noqa: SLF001
        return made

    def close(self) -> None:
        """Release files, maps and preloaded tensors; safe to call twice. Batches already made stay valid."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            self._reader = self._compiled = None
            opened.release()

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        kind = type(self).__name__
        if self._opened is None:
            return f"{kind}(closed{self._of_split()})"
        split = "" if self.split is None else f", split {self.split!r}"
        head = f"{kind}({str(self.dataset_dir)!r}{split}, {placement_of(self.store.plan, self._size)})"
        return "\n".join([head, *field_lines(self.graph)])


def _positions(indices: Sequence[int] | torch.Tensor | np.ndarray[Any, Any]) -> torch.Tensor:
    """Positions as an int64 tensor."""
    if type(indices) is torch.Tensor and indices.dtype is torch.int64 and indices.ndim == 1:
        return indices
    if type(indices) is list:
        array = np.array(indices)
        if array.dtype == np.int64 and array.ndim == 1:
            return torch.from_numpy(array)
    if not isinstance(indices, torch.Tensor):
        # PyTorch's samplers give lists of ints; by way of an array they cost a third.
        array = np.asarray(indices)
        indices = torch.from_numpy(
            np.ascontiguousarray(array if array.size else array.astype(np.int64)).view(np.ndarray)
        )
    if indices.ndim != 1 or indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise IndexError(
            f"samples are named by a 1-D list or tensor of whole numbers, got {indices.dtype} {list(indices.shape)}"
        )
    return indices.to(torch.int64)
