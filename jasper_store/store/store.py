"""``open_store``: find the tensors, plan where they live, load or map them, and hand them out by name."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from jasper_store.errors import (
    ClosedError,
    DatasetNotFoundError,
    PerformanceWarning,
    StaleDataWarning,
)
from jasper_store.formats.base import Schema
from jasper_store.formats.registry import base_name, locate
from jasper_store.store import manifest_file
from jasper_store.store.build import Builder, Progress
from jasper_store.store.explain import explain, memory_of, summary
from jasper_store.store.guard import check_options
from jasper_store.store.planning import plan_for
from jasper_store.store.ragged import RaggedTensor
from jasper_store.store.reopen import ReopenSpec, digest_of, identities_of
from jasper_store.store.tensors import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from jasper_store.files.fingerprint import FileIdentity
    from jasper_store.formats.base import FormatName, TensorSpec
    from jasper_store.formats.registry import Located
    from jasper_store.store.explain import StoreMemory
    from jasper_store.store.manifest import Manifest
    from jasper_store.store.placement import Plan

__all__ = ["FileOrFiles", "Progress", "TensorStore", "absolute", "open_store", "plan_store"]

FileOrFiles: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"
"""A directory, a file, or several files."""


def open_store(
    path: FileOrFiles,
    *,
    format: str = "auto",  # noqa: A002 - the word that users pass
    use_mmap: bool | None = None,
    device: str | torch.device | None = None,
    memory_limit: int | str | None = None,
    schema: Schema | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    describe: Callable[[Sequence[TensorSpec]], Schema] | None = None,
    admit: Callable[[Plan], None] | None = None,
) -> TensorStore:
    """Open a dataset directory, any directory of tensor files, or one file.

    Headers are read, a plan is made against the memory that is really available, what the plan says is loaded, and
    the rest is mapped.

    Args:
        path: a directory, a file, or several files.
        format: ``"auto"`` (safetensors, npy, hdf5, pt, whichever is complete first) or one of them.
        use_mmap: ``None`` loads what is worth it and fits; ``True`` maps everything; ``False`` loads everything.
        device: ``None`` or ``"cpu"`` for host memory; ``"cuda"`` or ``"cuda:N"`` loads everything that is read
            onto the device; ``"auto"`` the device if everything fits there, else the host.
        memory_limit: bytes, or a text such as ``"8GiB"``; one more upper bound on what is loaded (of which the
            budget takes 0.8).
        schema: what is known of the names; by default every tensor is read once per sample.
        dtype: floating dtype that floating tensors of two or more dimensions are converted to, with
            ``Tensor.to``'s rounding. Loaded tensors are converted while they are read and held in it. One that the
            plan leaves mapped or chunked is converted row by row as it is taken, so its values are the same.
        progress: called while tensors are loaded.
        describe: called with what the headers say; returns what is known of the names from then on.
        admit: called with the plan before it is carried out; raises what forbids it.

    Returns:
        A :class:`TensorStore`; close it, or use it in a ``with`` statement.

    Raises:
        IncompatibleOptionsError: options that are incompatible; before anything is touched.
        DatasetNotFoundError: no such path, or no tensors there.
        CorruptFileError: a file is damaged, or is not the one that the manifest records.
        InsufficientMemoryError: what must be loaded does not fit; before anything is loaded.

    Warns:
        PerformanceWarning: what was asked for works, but slowly; says what would make it fast.
        StaleDataWarning: a file is older than what it was made from.
    """
    limit = check_options(use_mmap=use_mmap, device=device, dtype=dtype, memory_limit=memory_limit)
    schema = schema or Schema()
    # Absolute from here on: what a store pickles as is opened in another process, maybe in another directory.
    where = absolute(path)
    located = locate(where, format, schema)
    manifest, stale = manifest_file.read_and_check(_directory(located.root), located)
    identities = identities_of(located.specs)
    if describe is not None:
        schema = describe(located.specs)
    plan = plan_for(located, schema, use_mmap=use_mmap, device=device, memory_limit=limit, dtype=dtype)
    if admit is not None:
        admit(plan)
    for text in stale:
        warnings.warn(text, StaleDataWarning, stacklevel=3)
    for text in plan.warnings:
        warnings.warn(text, PerformanceWarning, stacklevel=3)
    digest = digest_of(located.specs, identities)
    reopen_spec = ReopenSpec(where, located.format, schema, dtype, digest, opener=_reopened)
    return TensorStore(reopen_spec, located, plan, manifest=manifest, identities=identities, progress=progress)


def absolute(path: FileOrFiles) -> Path | tuple[Path, ...]:
    """A path, or several, as they are named from any directory."""
    if isinstance(path, (str, os.PathLike)):
        return Path(path).absolute()
    return tuple(Path(each).absolute() for each in path)


def _directory(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def plan_store(
    path: FileOrFiles,
    *,
    format: str = "auto",  # noqa: A002 - the word that users pass
    use_mmap: bool | None = None,
    device: str | torch.device | None = None,
    memory_limit: int | str | None = None,
    schema: Schema | None = None,
    dtype: torch.dtype | None = None,
    describe: Callable[[Sequence[TensorSpec]], Schema] | None = None,
) -> Plan:
    """The plan that :func:`open_store` would follow now; reads headers only. Arguments and errors are the same."""
    limit = check_options(use_mmap=use_mmap, device=device, dtype=dtype, memory_limit=memory_limit)
    schema = schema or Schema()
    located = locate(absolute(path), format, schema)
    if describe is not None:
        schema = describe(located.specs)
    return plan_for(located, schema, use_mmap=use_mmap, device=device, memory_limit=limit, dtype=dtype)


def _reopened(spec: ReopenSpec) -> TensorStore:
    """Open a store where it was unpickled: everything that can be is mapped, and no warning is given twice."""
    located = locate(spec.path, spec.format, spec.schema)
    identities = identities_of(located.specs)
    spec.check(digest_of(located.specs, identities))
    plan = plan_for(located, spec.schema, use_mmap=True, dtype=spec.dtype)
    return TensorStore(spec, located, plan, identities=identities)


def _same(store: TensorStore) -> TensorStore:
    """What a store's pickle calls on what its :class:`ReopenSpec` became."""
    return store


class TensorStore(Mapping[str, StoredTensor]):
    """The tensors of a dataset by name. A :class:`collections.abc.Mapping`; closes as a context manager.

    Reading is safe from several threads. A fork shares everything with its parent. A pickle is a few kilobytes at
    any size, and opens the files again where it arrives: tensors in memory as maps, chunked ones as they are.

    A ragged tensor ``X`` is two tensors, ``X.values`` and ``X.offsets``; :meth:`ragged` joins them.

    Attributes:
        path: the directory or file that was opened.
        format: the format chosen.
        plan: where each tensor lives, and why.
        specs: what the headers say, one per tensor.
        manifest: the directory's manifest as it was on opening, if it had one.
    """

    def __init__(
        self,
        reopen_spec: ReopenSpec,
        located: Located,
        plan: Plan,
        *,
        identities: Mapping[Path, FileIdentity],
        manifest: Manifest | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.path = located.root
        self.format: FormatName = located.format
        self.plan = plan
        self.specs = located.specs
        self.manifest = manifest
        self._reopen_spec = reopen_spec
        self._identities = dict(identities)
        self._closed = False
        self.generation = 0
        self._tensors: dict[str, StoredTensor] = {}
        self._stacks: dict[tuple[str, ...], StoredTensor] = {}
        reopen_spec.on_device = plan.device is not None
        with ExitStack() as undo:
            undo.callback(self.close)
            tensors, self._stacks = Builder(plan, reopen_spec.dtype, progress).build(
                located.specs, reopen_spec.schema.stacks
            )
            for tensor in tensors.values():
                tensor.origin = reopen_spec
            self._tensors = tensors
            undo.pop_all()

    # --- the tensors ------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> StoredTensor:
        """A tensor by name.

        Raises:
            KeyError: no such tensor; the message lists names that are near.
            ClosedError: the store was closed.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            self._require_open()
            raise KeyError(self._unknown(name))
        return tensor

    def _unknown(self, name: str) -> str:
        if f"{name}.values" in self._tensors:
            return f"{name!r} is ragged; use store.ragged({name!r})"
        near = difflib.get_close_matches(str(name), self._tensors, n=3, cutoff=0.5)
        known = f"did you mean {', '.join(map(repr, near))}?" if near else f"there are {', '.join(self._tensors)}"
        return f"no tensor {name!r} in {self.path} ({self.format}); {known}"

    # A store is itself and nothing else; Mapping would compare all tensors.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __iter__(self) -> Iterator[str]:
        self._require_open()
        return iter(self._tensors)

    def __len__(self) -> int:
        self._require_open()
        return len(self._tensors)

    def ragged(self, name: str) -> RaggedTensor:
        """A ragged tensor by its base name: rows of different lengths.

        Raises:
            KeyError: no such ragged tensor.
            ClosedError: the store was closed.
        """
        self._require_open()
        if f"{name}.values" not in self._tensors or f"{name}.offsets" not in self._tensors:
            ragged = sorted({base_name(n) for n in self._tensors if n.endswith(".offsets")})
            msg = f"no ragged tensor {name!r} in {self.path}; there are {', '.join(ragged) or 'none'}"
            raise KeyError(msg)
        return RaggedTensor(name, self._tensors[f"{name}.values"], self._tensors[f"{name}.offsets"])

    def stacked(self, names: tuple[str, ...]) -> StoredTensor | None:
        """Several tensors as one, for gathering each row from one of them: see :mod:`jasper_store.store.concat_buffer`.

        Returns:
            All rows of the tensors in this order, then one row of zeros; ``None`` where they do not lie so, because
            the schema does not ask for it or the plan does not preload all of them to one place.
        """
        return self._stacks.get(names)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are handed out."""
        return self.plan.nbytes

    @property
    def use_mmap(self) -> bool:
        """Whether any tensor is mapped."""
        return self.plan.any_mapped

    @property
    def device(self) -> torch.device:
        """Where what is read in training lives: a CUDA device, or the host."""
        return torch.device(self.plan.device or "cpu")

    # --- trust ------------------------------------------------------------------------------------------------

    def is_verified(self, check: str) -> bool:
        """Whether the manifest says that these very files passed a check before."""
        return self.manifest is not None and self.manifest.is_verified(self.specs, check)

    def record_checks(self, checks: Sequence[str]) -> bool:
        """Record in the manifest that the files passed some checks; a directory that cannot be written is no error.

        Returns:
            Whether it was recorded: not in a directory that cannot be written, and not if a file changed since the
            store was opened (then it is not known which bytes were checked).
        """
        directory = _directory(self.path)
        if isinstance(self._reopen_spec.path, tuple) and any(
            path.parent != directory for path in self._reopen_spec.path
        ):
            return False  # files of several directories are no dataset of the one that holds them all
        try:
            if identities_of(self.specs) != self._identities:
                return False
        except OSError:
            return False
        recorded = manifest_file.record_checks(directory, self.specs, checks)
        if recorded:
            self.manifest = manifest_file.read(directory)
        return recorded

    # --- files that change ------------------------------------------------------------------------------------

    def reopened(self, names: Sequence[str]) -> dict[str, StoredTensor]:
        """These tensors as their files stand now, placed as they are in this store; the store is not touched.

        Raises:
            KeyError: the store has no such tensor.
            DatasetNotFoundError: a file no longer has it.
            CorruptFileError: a file cannot be read.
            ClosedError: the store was closed.
        """
        for name in names:
            self[name]  # unknown names are refused before a file is opened
        found = {
            spec.name: spec for spec in locate(self._reopen_spec.path, self.format, self._reopen_spec.schema).specs
        }
        for name in names:
            if name not in found:
                msg = f"{self.path}: {name} is no longer there ({self.format}); the one in use stays"
                raise DatasetNotFoundError(msg, path=self.path, tensor=name)
        fresh: dict[str, StoredTensor] = {}
        builder = Builder(self.plan, self._reopen_spec.dtype)
        try:
            for name in names:
                fresh[name] = builder.open(found[name])
        except BaseException:
            for tensor in fresh.values():
                tensor.close()
            raise
        return fresh

    def replace(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Replace tensors by reopened ones of the same name, all at once.

        The old ones are not closed here, so that a thread that is reading from one can finish.
        """
        self._require_open()
        self._tensors = {**self._tensors, **tensors}
        self.generation += 1
        self._stacks = {names: stack for names, stack in self._stacks.items() if not tensors.keys() & set(names)}
        self.specs = tuple(self._tensors[spec.name].spec for spec in self.specs)
        for tensor in tensors.values():
            tensor.origin = self._reopen_spec
        self._identities = identities_of(self.specs)
        self._reopen_spec.digest = digest_of(self.specs, self._identities)

    # --- what a person wants to know --------------------------------------------------------------------------

    def residency(self) -> dict[str, int]:
        """Bytes of each tensor's file range that are in the page cache."""
        self._require_open()
        return {name: tensor.residency() for name, tensor in self._tensors.items()}

    def explain(self) -> str:
        """The plan in words, the file system, how rows are prefetched, and which checks the manifest records."""
        self._require_open()
        return explain(self.path, self.format, self.plan, self.manifest, self._tensors)

    def memory_report(self) -> StoreMemory:
        """What this process holds as anonymous, file and shared memory, and each tensor of it and of the page cache.

        Raises:
            ClosedError: the store was closed.
        """
        self._require_open()
        return memory_of(self._tensors)

    def release(self) -> None:
        """Ask the system to take back the page-cache pages of all tensors; they are read again when needed."""
        self._require_open()
        for tensor in self._tensors.values():
            tensor.drop()

    def __repr__(self) -> str:
        if self._closed:
            return f"TensorStore({str(self.path)!r}, closed)"
        return summary(self.path, self.format, self._tensors)

    def _ipython_key_completions_(self) -> list[str]:
        """What a notebook offers after ``store["``."""
        return list(self._tensors)

    # --- end --------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def _require_open(self) -> None:
        if self._closed:
            msg = f"{self.path}: the store is closed; open it again with jasper_store.open"
            raise ClosedError(msg, path=self.path)

    def close(self) -> None:
        """Release maps, handles and memory. May be called twice.

        What ``take`` handed out is owned and stays; views stay valid and hold what they show.
        """
        self._closed = True
        self.generation += 1
        tensors, self._tensors = self._tensors, {}
        stacks, self._stacks = self._stacks, {}
        for tensor in (*tensors.values(), *stacks.values()):
            tensor.close()

    def __enter__(self) -> Self:
        self._require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        self._require_open()
        return (_same, (self._reopen_spec,))
