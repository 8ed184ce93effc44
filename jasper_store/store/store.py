"""``TensorStore``: the tensors of a dataset by name, wherever each of them lives."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jasper_store.errors import (
    ClosedError,
    DatasetNotFoundError,
    InsufficientMemoryError,
)
from jasper_store.formats.registry import Located, base_name, locate
from jasper_store.formats.texts import PARTS, is_text, text_names
from jasper_store.memory.budget import format_bytes, measure
from jasper_store.store import manifest_file
from jasper_store.store.build import Builder, Progress
from jasper_store.store.explain import explain, memory_of, summary
from jasper_store.store.ids import Ids
from jasper_store.store.ragged import RaggedTensor
from jasper_store.store.reopen import ReopenSpec, digest_of, identities_of
from jasper_store.store.resident import give_back
from jasper_store.store.tensors import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from jasper_store.formats.base import FileFacts, FormatName
    from jasper_store.store.explain import StoreMemory
    from jasper_store.store.manifest import Manifest
    from jasper_store.store.placement import Plan

__all__ = ["Progress", "TensorStore", "directory_of"]


def directory_of(path: Path) -> Path:
    """The directory that a manifest of what lies at a path belongs to."""
    return path if path.is_dir() else path.parent


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
        skipped: what else the files hold, which is no tensor.
        manifest: the directory's manifest as it was on opening, if it had one.
    """

    def __init__(
        self,
        reopen_spec: ReopenSpec,
        located: Located,
        plan: Plan,
        *,
        identities: Mapping[str, FileFacts],
        manifest: Manifest | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.path = located.root
        self.format: FormatName = located.format
        self.plan = plan
        self.specs = located.specs
        self.skipped = located.skipped
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
        skip = next((skip for skip in self.skipped if skip.name == name), None)
        if skip is not None:
            return str(skip)
        if name in text_names(self.specs):
            return f"{name!r} holds strings; use store.ids({name!r})"
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

    def ids(self, name: str) -> Ids:
        """The string ids in this store by their base name: rows for ids, and ids for rows.

        Raises:
            KeyError: no strings of this name; says whether the files hold some that a conversion would keep.
            IntegrityError: bytes and offsets do not fit together.
            ClosedError: the store was closed.
        """
        self._require_open()
        parts = [self._tensors.get(f"{name}.{part}") for part in PARTS]
        values, offsets, hashes, order = parts
        if values is None or offsets is None or not is_text(values.spec, offsets.spec):
            skip = next((skip for skip in self.skipped if skip.name == name), None)
            known = ", ".join(sorted(text_names(self.specs))) or "none"
            found = f"{skip}; jasper-store convert keeps strings" if skip else f"there are {known}"
            msg = f"no strings {name!r} in {self.path}; {found}"
            raise KeyError(msg)
        return Ids(name, values, offsets, hashes, order)

    def stacked(self, names: tuple[str, ...]) -> StoredTensor | None:
        """Several tensors as one, for gathering each row from one of them: see :mod:`jasper_store.store.concat_buffer`.

        Returns:
            All rows of the tensors in this order, then one row of zeros; ``None`` where they do not lie so, because
            the schema does not ask for it or the plan does not preload all of them to one place.
        """
        return self._stacks.get(names)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are served."""
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

    @property
    def digest(self) -> str:
        """A short text that changes whenever one of the files does, or where a tensor lies in it."""
        return self._reopen_spec.digest

    def is_verified(self, check: str) -> bool:
        """Whether the manifest says that these very files passed a check before."""
        return self.manifest is not None and self.manifest.is_verified(self.specs, check)

    def record_checks(self, checks: Sequence[str]) -> bool:
        """Record in the manifest that the files passed some checks; a directory that cannot be written is no error.

        Returns:
            Whether it was recorded: not in a directory that cannot be written, and not if a file changed since the
            store was opened (then it is not known which bytes were checked).
        """
        directory = directory_of(self.path)
        if isinstance(self._reopen_spec.path, tuple) and any(
            path.parent != directory for path in self._reopen_spec.path
        ):
            return False  # files of several directories are no dataset of the one that holds them all
        try:
            if identities_of(self.specs) != self._identities:
                return False
        except OSError:
            return False
        recorded = manifest_file.record_checks(directory, self.specs, checks, self.format)
        if recorded:
            self.manifest = manifest_file.read(directory)
        return recorded

    # --- files that change ------------------------------------------------------------------------------------

    def reopened(self, names: Sequence[str]) -> dict[str, StoredTensor]:
        """These tensors as the dataset's files stand now, placed as they are in this store; the store is not touched.

        Of a dataset in parts they are those of the newest generation.

        Raises:
            KeyError: the store has no such tensor.
            DatasetNotFoundError: a file no longer has it.
            CorruptFileError: a file cannot be read.
            ClosedError: the store was closed.
        """
        for name in names:
            self[name]  # unknown names are refused before a file is opened
        known = self._reopen_spec
        located = locate(known.path, self.format, known.schema)
        found = {spec.name: spec for spec in located.specs}
        for name in names:
            if name not in found:
                msg = f"{self.path}: {name} is no longer there ({self.format}); the one in use stays"
                raise DatasetNotFoundError(msg, path=self.path, tensor=name)
        fresh: dict[str, StoredTensor] = {}
        builder = Builder(self.plan, self._reopen_spec.dtype)
        try:
            for name in names:
                fresh[name] = builder.open(found[name])
                fresh[name].origin = known.of_generation(located.generation)
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
            if tensor.origin is not None:
                self._reopen_spec.take(tensor.name, tensor.origin)
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

        What ``take`` returned is owned and stays; views stay valid and hold what they show.
        """
        self._closed = True
        self.generation += 1
        tensors, self._tensors = self._tensors, {}
        stacks, self._stacks = self._stacks, {}
        for tensor in (*tensors.values(), *stacks.values()):
            tensor.close()
        give_back()

    def __enter__(self) -> Self:
        self._require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __copy__(self) -> Self:
        return self.__deepcopy__({})

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A separate store in this process, by the same plan: what is preloaded here is preloaded there, again.

        Raises:
            CorruptFileError: the files changed since this store was opened.
            InsufficientMemoryError: a second copy of what is preloaded does not fit.
            ClosedError: the store was closed.
        """
        self._require_open()
        needed = self.plan.preloaded_nbytes
        budget = measure()
        if self.plan.device is None and needed > budget.nbytes:
            msg = (
                f"{self.path}: a copy of the store would preload {format_bytes(needed)} again, and the budget is "
                f"{format_bytes(budget.nbytes)}; use this store, which may be read from several threads"
            )
            raise InsufficientMemoryError(msg, path=self.path, needed=needed, available=budget.nbytes)
        identities = identities_of(self.specs)
        self._reopen_spec.check(digest_of(self.specs, identities))
        located = Located(self.format, self.path, self.specs)
        made = type(self)(self._reopen_spec.copy(), located, self.plan, identities=identities, manifest=self.manifest)
        memo[id(self)] = made
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        self._require_open()
        return (_same, (self._reopen_spec,))
