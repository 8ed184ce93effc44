"""A directory of tensors, opened and checked against a declaration once, and shared by the splits served from it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jasper_store.errors import CorruptFileError, DeclarationError, StaleDataWarning, UnknownNameError
from jasper_store.formats.base import Schema
from jasper_store.formats.files import read_file
from jasper_store.formats.generation import read_generation
from jasper_store.samples.compiler import build_graph
from jasper_store.samples.declaration import Choice, Declaration, everything
from jasper_store.samples.integrity import Nouns, check_bounds_once
from jasper_store.samples.packed import PACKED_KEY, Packed
from jasper_store.store.guard import check_options
from jasper_store.store.opening import FileOrFiles, absolute, open_store
from jasper_store.store.planning import target_dtype
from jasper_store.store.store import TensorStore

if TYPE_CHECKING:
    import torch

    from jasper_store.formats.base import TensorSpec
    from jasper_store.samples.graph import Bound, SampleGraph
    from jasper_store.store.placement import Plan
    from jasper_store.store.tensors import StoredTensor

__all__ = ["CONFIG_NAME", "OpenedDataset", "declaration_at", "describe", "load_config", "open_dataset", "packed_at"]

CONFIG_NAME = "config.json"


@dataclass(slots=True)
class OpenedDataset:
    """A checked store with what its samples read.

    Attributes:
        store: the tensors.
        declaration: what samples read.
        packed: how they were packed, if they were.
        users: datasets that are served from it; the store closes with the last of them.
    """

    store: TensorStore
    declaration: Declaration
    packed: Packed | None = None
    users: int = 0

    def acquire(self) -> OpenedDataset:
        """Count one more user."""
        self.users += 1
        return self

    def release(self) -> None:
        """Count one user less, and close the store after the last."""
        self.users -= 1
        if self.users <= 0:
            self.store.close()

    def __getstate__(self) -> tuple[TensorStore, Declaration, Packed | None]:
        return self.store, self.declaration, self.packed

    def __setstate__(self, state: tuple[TensorStore, Declaration, Packed | None]) -> None:
        # One dataset travels to a worker, so what arrives has one user.
        self.store, self.declaration, self.packed = state
        self.users = 1


def open_dataset(
    path: FileOrFiles,
    declaration: Declaration | None,
    splits: Sequence[str | None],
    *,
    schema: Schema | None = None,
    format: str = "auto",  # noqa: A002 - the word that users pass
    use_mmap: bool | None = None,
    device: torch.device | str | None = None,
    memory_limit: int | str | None = None,
    dtype: torch.dtype | None = None,
    inspect: Callable[[Mapping[str, TensorSpec]], None] | None = None,
    admit: Callable[[Plan], None] | None = None,
    nouns: Nouns | None = None,
    bounds: Callable[[Mapping[str, StoredTensor]], Iterable[Bound]] | None = None,
    packed: Packed | None = None,
) -> OpenedDataset:
    """Open a directory or a file and check that its samples may be served.

    Options are checked first, from themselves alone; then headers against the declaration, the plan, and last the
    values of index tensors, unless the manifest says that these files were checked before.

    Args:
        path: directory, file, or several files.
        declaration: what samples read; ``None`` takes what ``config.json`` declares, else every tensor.
        splits: the splits that will be served; ``None`` is all rows.
        schema: what is known of the names, but for the rows that a sample reads.
        format: as ``jasper_store.open``.
        use_mmap: as ``jasper_store.open``.
        device: as ``jasper_store.open``.
        memory_limit: as ``jasper_store.open``.
        dtype: as ``jasper_store.open``.
        inspect: called with what the headers say, before anything is planned; raises what is wrong with it.
        admit: called with the plan before anything is loaded; raises what forbids it.
        nouns: what rows are called in errors.
        bounds: more values to check than the samples read.
        packed: how the declaration's samples were packed; of a declaration in ``config.json`` it is found there.

    Raises:
        IncompatibleOptionsError: options that are incompatible.
        DatasetNotFoundError, CorruptFileError, DeclarationError, IntegrityError: what is wrong with the dataset.
        InsufficientMemoryError: what should be preloaded does not fit.
    """
    check_options(use_mmap=use_mmap, device=device, dtype=dtype, memory_limit=memory_limit)
    where = absolute(path)
    declared = declaration
    if declaration is None and isinstance(where, Path):
        declared = declaration_at(where)
        packed = packed_at(where)
    found: list[Declaration] = []

    def describing(specs: Sequence[TensorSpec]) -> Schema:
        by_name = {spec.name: spec for spec in specs}
        if inspect is not None:
            inspect(by_name)
        found.append(declared if declared is not None else everything(specs))
        try:
            return describe(found[0], by_name, splits, base=schema, dtype=dtype, packed=packed)
        except (DeclarationError, UnknownNameError) as exc:
            if declaration is not None or declared is None:
                raise
            raise type(exc)(
                f'{path}: what {CONFIG_NAME} declares of "samples" does not fit: {exc}', path=exc.path
            ) from exc

    known = schema or Schema(required=frozenset(declared.tensors) if declared is not None else frozenset())
    store = open_store(
        path,
        format=format,
        use_mmap=use_mmap,
        device=device,
        memory_limit=memory_limit,
        schema=known,
        dtype=dtype,
        describe=describing,
        admit=admit,
    )
    try:
        wanted = [bound for split in splits for bound in build_graph(found[0], store, split).bounds]
        check_bounds_once(store, [*wanted, *(bounds(store) if bounds is not None else ())], nouns)
    except BaseException:
        store.close()
        raise
    if packed is not None:
        for text in packed.changes(store.path):
            warnings.warn(text, StaleDataWarning, stacklevel=4)
    return OpenedDataset(store, found[0], packed)


def describe(
    declaration: Declaration,
    specs: Mapping[str, TensorSpec],
    splits: Sequence[str | None],
    *,
    base: Schema | None = None,
    dtype: torch.dtype | None = None,
    packed: Packed | None = None,
) -> Schema:
    """What the storage layers are told of a declared dataset: which tensors are read, how often, which together.

    Args:
        declaration: what samples read.
        specs: the tensors that are there, by name.
        splits: the splits that are served.
        base: what is known besides.
        dtype: dtype that floating tensors are opened with.
        packed: how the samples were packed, if they were.

    Raises:
        DeclarationError, UnknownNameError: the declaration does not fit the tensors.
    """
    tensors = {name: replace(spec, dtype=target_dtype(spec, dtype)) for name, spec in specs.items()}
    graphs: list[SampleGraph] = [build_graph(declaration, tensors, split) for split in splits]
    reads = {name: max(graph.reads.get(name, 0.0) for graph in graphs) for name in tensors}
    stacks = tuple(value.tensors for value in declaration.fields.values() if isinstance(value, Choice))
    together = frozenset() if packed is None else frozenset(packed.columns)
    known = base or Schema(required=frozenset(declaration.tensors))
    return replace(known, reads_per_sample=reads, stacks=stacks, together=together)


def declaration_at(path: Path) -> Declaration | None:
    """The declaration in the ``config.json`` of a directory, or of the directory of a file; ``None`` without one.

    Raises:
        CorruptFileError: the file is no JSON object.
        DeclarationError: what it declares cannot be understood.
    """
    config = (path if path.is_dir() else path.parent) / CONFIG_NAME
    if not config.is_file():
        return None
    return Declaration.from_config(load_config(config), config)


def packed_at(path: Path) -> Packed | None:
    """How the samples of a directory were packed; ``None`` if they were not.

    Raises:
        CorruptFileError: ``config.json`` is no JSON object, or what it says of it makes no sense; or the manifest does.
    """
    config = path / CONFIG_NAME
    if not path.is_dir() or not config.is_file():
        return None
    values = load_config(config)

    def generation() -> int:
        published = read_generation(path)
        return published.number if published is not None else 0

    return Packed.from_config(values[PACKED_KEY], config, generation) if PACKED_KEY in values else None


def load_config(path: Path) -> Mapping[str, Any]:
    """The JSON object in a configuration file.

    Raises:
        CorruptFileError: it is none, or cannot be read.
        DatasetNotFoundError: there is no such file, or it may not be read.
    """
    content = read_file(path)
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise CorruptFileError(f"{path} is not valid JSON ({exc}); restore it or write it anew", path=path) from exc
    if not isinstance(values, Mapping):
        raise CorruptFileError(f"{path} should hold a JSON object, found {type(values).__name__}", path=path)
    return values
