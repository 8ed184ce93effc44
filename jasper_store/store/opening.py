"""``open_store``: find the tensors, plan where they live, and open them."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from jasper_store.errors import JasperStoreWarning, PerformanceWarning, StaleDataWarning
from jasper_store.files.hub import local_path
from jasper_store.formats.base import Schema
from jasper_store.formats.registry import locate
from jasper_store.store import manifest_file
from jasper_store.store.build import Progress
from jasper_store.store.guard import check_options
from jasper_store.store.planning import plan_for
from jasper_store.store.reopen import ReopenSpec, digest_of, identities_of
from jasper_store.store.store import TensorStore, directory_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jasper_store.formats.base import TensorSpec
    from jasper_store.store.placement import Plan

__all__ = ["FileOrFiles", "absolute", "open_store", "plan_store"]

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
        path: a directory, a file, several files, or a dataset of the Hub as ``"hf://owner/name"``.
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
        JasperStoreWarning: a file holds strings, or what else is no tensor; it is skipped.
        PerformanceWarning: what was asked for works, but slowly; says what would make it fast.
        StaleDataWarning: a file is older than what it was made from.
    """
    limit = check_options(use_mmap=use_mmap, device=device, dtype=dtype, memory_limit=memory_limit)
    schema = schema or Schema()
    # Absolute from here on: what a store pickles as is opened in another process, maybe in another directory.
    where = absolute(path)
    located = locate(where, format, schema)
    manifest, stale = manifest_file.read_and_check(directory_of(located.root), located)
    identities = identities_of(located.specs, located.facts)
    if describe is not None:
        schema = describe(located.specs)
    plan = plan_for(located, schema, use_mmap=use_mmap, device=device, memory_limit=limit, dtype=dtype)
    if admit is not None:
        admit(plan)
    if located.skipped:
        more = f"; and {len(located.skipped) - 5} more" if len(located.skipped) > 5 else ""
        text = f"{'; '.join(map(str, located.skipped[:5]))}{more}. jasper-store convert keeps strings"
        warnings.warn(text, JasperStoreWarning, stacklevel=3)
    for text in stale:
        warnings.warn(text, StaleDataWarning, stacklevel=3)
    for text in plan.warnings:
        warnings.warn(text, PerformanceWarning, stacklevel=3)
    digest = digest_of(located.specs, identities)
    reopen_spec = ReopenSpec(
        where, located.format, schema, dtype, digest, generation=located.generation, opener=_reopened
    )
    return TensorStore(reopen_spec, located, plan, manifest=manifest, identities=identities, progress=progress)


def absolute(path: FileOrFiles) -> Path | tuple[Path, ...]:
    """A path, or several, as they are named from any directory; of a dataset of the Hub, where it was downloaded to."""
    if isinstance(path, (str, os.PathLike)):
        return local_path(path).absolute()
    return tuple(Path(each).absolute() for each in path)


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
    located = locate(spec.path, spec.format, spec.schema, generation=spec.generation)
    for generation in sorted(set(spec.newer.values())):
        names = {name for name, of in spec.newer.items() if of == generation}
        others = locate(spec.path, spec.format, spec.schema, generation=generation)
        specs = {each.name: each for each in (*located.specs, *(each for each in others.specs if each.name in names))}
        located = replace(located, specs=tuple(specs.values()), facts={**others.facts, **located.facts})
    identities = identities_of(located.specs, located.facts)
    spec.check(digest_of(located.specs, identities))
    plan = plan_for(located, spec.schema, use_mmap=True, dtype=spec.dtype)
    return TensorStore(spec, located, plan, identities=identities)
