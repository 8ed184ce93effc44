"""What a conversion will read and write, decided from headers alone, before the first byte is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from jasper_store.conversion.narrow import narrowed
from jasper_store.conversion.texts import kept_texts
from jasper_store.errors import (
    ConversionError,
    CorruptFileError,
    DatasetNotFoundError,
    IncompatibleOptionsError,
    JasperStoreError,
    UnknownNameError,
)
from jasper_store.files.fingerprint import FileIdentity
from jasper_store.formats.files import check_name
from jasper_store.formats.protocols import SupportsRagged
from jasper_store.formats.registry import (
    AUTO_ORDER,
    READ_ONLY,
    base_name,
    format_for,
    locate,
    readable,
    skipped_at,
    skipped_in,
)
from jasper_store.formats.texts import PARTS, text_names

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from pathlib import Path

    from jasper_store.formats.base import FormatName, Schema, TensorSpec
    from jasper_store.formats.protocols import Format
    from jasper_store.formats.registry import Located

__all__ = ["FileTask", "SourceFacts", "Sources", "find_sources", "make_tasks", "select", "target_of"]


_HEADER_NBYTES = 16 << 10


@dataclass(frozen=True)
class Sources:
    """The tensors to convert and where they come from.

    Attributes:
        format: the format of most of them.
        specs: the tensors.
        notes: what the user should know about the choice.
    """

    format: FormatName
    specs: tuple[TensorSpec, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileTask:
    """One file to be written.

    Attributes:
        target: its final name.
        specs: the tensors that go into it, in the source.
        ragged: base name of the ragged tensor that this file is (``.pt``), else ``None``.
        kept: tensors of the file that is replaced which go into the new one as they are.
    """

    target: Path
    specs: tuple[TensorSpec, ...]
    ragged: str | None = None
    kept: tuple[TensorSpec, ...] = ()

    def written(self, wanted: torch.dtype | None) -> Iterator[tuple[TensorSpec, torch.dtype]]:
        """Every tensor that goes into the file, and the dtype it is written in if floats are narrowed to ``wanted``."""
        for spec in self.specs:
            yield spec, narrowed(spec.dtype, wanted)
        for spec in self.kept:
            yield spec, spec.dtype

    def needed(self, wanted: torch.dtype | None) -> int:
        """Upper bound of the file's bytes: values uncompressed, headers, padding and the manifest's entry."""
        values = [spec.nbytes // spec.dtype.itemsize * dtype.itemsize for spec, dtype in self.written(wanted)]
        return sum(values) + _HEADER_NBYTES * (1 + len(values))


class SourceFacts:
    """What the source files were when their headers were read, to notice a change before and after each tensor."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._identities = {path: _identity(path) for path in paths}

    def add(self, paths: Iterable[Path]) -> None:
        """Add files, as they are now."""
        self._identities.update({path: _identity(path) for path in paths})

    def check(self, paths: Iterable[Path]) -> None:
        """Compare files with what they were.

        Raises:
            ConversionError: one of them was changed, replaced or removed.
        """
        for path in paths:
            if _identity(path) != self._identities[path]:
                msg = (
                    f"{path}: expected the file to stay as it is while it is converted, found that it was changed, "
                    "replaced or removed; the target was not published. Run again when no other process writes to the source"
                )
                raise ConversionError(msg, path=path)


def _identity(path: Path) -> FileIdentity | None:
    try:
        return FileIdentity.of(path)
    except OSError:
        return None


def target_of(src: Path, dst: Path | None, fmt: Format) -> tuple[Path, str | None]:
    """Directory to write to, and the name of the one file where ``dst`` names one.

    Raises:
        IncompatibleOptionsError: ``dst`` is a file, and the format has one file per tensor.
    """
    if dst is None:
        return (src if src.is_dir() else src.parent), None
    if fmt.one_file is not None and dst.name.lower().endswith(fmt.suffixes) and not dst.is_dir():
        return dst.parent, dst.name
    if dst.exists() and not dst.is_dir():
        hint = "a directory" if fmt.one_file is None else f"a directory, or a file name ending in {fmt.suffixes[0]}"
        msg = f"dst={str(dst)!r}: expected {hint} for format {fmt.name!r}, found a file; name another destination"
        raise IncompatibleOptionsError(msg, path=dst)
    return dst, None


def find_sources(src: Path, directory: Path, fmt: Format, source_format: str, schema: Schema) -> Sources:
    """Locate the tensors of ``src``.

    When a dataset is converted in its own directory, an earlier result of the same conversion lies there too and
    must not be taken for the source: the other formats are asked, the most complete and then the newest first.

    Raises:
        IncompatibleOptionsError: the only tensors there are the files that would be written.
        DatasetNotFoundError, CorruptFileError, UnknownNameError: as :func:`jasper_store.formats.registry.locate`.
    """
    in_place = src.is_dir() and directory.is_dir() and src.samefile(directory)
    if source_format != "auto" or not in_place:
        try:
            return _with_texts(locate(src, source_format, schema), schema, src)
        except DatasetNotFoundError:
            only = _only_texts(src, source_format, schema)
            if only is None:
                raise
            return only
    candidates: list[Sources] = []
    refused: list[JasperStoreError] = []
    alone: list[TensorSpec] = []  # strings in a format that has no tensors here
    notes: list[str] = []
    for name in (*AUTO_ORDER, *READ_ONLY):
        if name == fmt.name:
            continue
        try:
            found = locate(src, name, schema)
        except DatasetNotFoundError:
            texts, said = kept_texts(skipped_at(src, name, schema), name, schema, src)
            alone.extend(texts)
            notes.extend(said)
        except (CorruptFileError, IncompatibleOptionsError) as exc:
            refused.append(exc)
        else:
            candidates.append(_with_texts(found, schema, src))
    if candidates:
        merged = _merge(candidates, [*notes, *(f"passed over: {exc}" for exc in refused)], schema)
        there = {spec.name for spec in merged.specs}
        return replace(merged, specs=(*merged.specs, *(spec for spec in alone if spec.name not in there)))
    if refused:
        raise refused[0]
    locate(src, "auto", schema)  # raises where there is nothing at all
    msg = (
        f"{src}: expected tensors in another format than {fmt.name!r}, found only that: source and destination would "
        "be the same files. Name another directory as dst, or another format"
    )
    raise IncompatibleOptionsError(msg, path=src)


def _with_texts(found: Located, schema: Schema, src: Path) -> Sources:
    """Tensors, and strings beside them as tensors that keep them."""
    names = {base_name(spec.name) for spec in found.specs}
    kept, notes = kept_texts(found.skipped, found.format, schema, src, names)
    return Sources(found.format, (*found.specs, *kept), (*found.warnings, *notes))


def _only_texts(src: Path, source_format: str, schema: Schema) -> Sources | None:
    """One file that was named, and that holds nothing but strings; ``None`` for anything else."""
    fmt = next((fmt for name, fmt in readable().items() if name == source_format), None) or format_for(src)
    if fmt is None or not src.is_file():
        return None
    kept, notes = kept_texts(skipped_in(fmt, src, schema), fmt.name, schema, src)
    return Sources(fmt.name, kept, tuple(notes)) if kept else None


def _merge(candidates: list[Sources], notes: list[str], schema: Schema) -> Sources:
    """Each tensor from the most complete format that has it; among equally complete ones from the newest."""

    def rank(sources: Sources) -> tuple[int, int]:
        names = {base_name(spec.name) for spec in sources.specs}
        wanted = names & schema.required if schema.required else names
        return len(wanted), max((path.stat().st_mtime_ns for spec in sources.specs for path in spec.paths), default=0)

    candidates = sorted(candidates, key=rank, reverse=True)
    chosen: dict[str, list[TensorSpec]] = {}
    for sources in candidates:
        missing = {base_name(spec.name) for spec in sources.specs} - chosen.keys()
        if missing and chosen:
            notes.append(f"{', '.join(sorted(missing))}: only there as {sources.format}, read from that")
        for spec in sources.specs:
            if base_name(spec.name) in missing:
                chosen.setdefault(base_name(spec.name), []).append(spec)
    specs = tuple(spec for parts in chosen.values() for spec in parts)
    # A warning that the chosen files are stale holds whatever else is there.
    return Sources(candidates[0].format, specs, (*candidates[0].notes, *notes))


def select(specs: Sequence[TensorSpec], wanted: Collection[str] | None) -> tuple[TensorSpec, ...]:
    """The tensors asked for (ragged ones by their base name), all if ``None``.

    Raises:
        UnknownNameError: a name that is not there.
    """
    if wanted is None:
        return tuple(specs)
    if isinstance(wanted, str):
        wanted = (wanted,)
    known = {name for spec in specs for name in (spec.name, base_name(spec.name))}
    for name in wanted:
        if name not in known:
            msg = f"tensors: no tensor {name!r} in the source, found {', '.join(sorted(known))}"
            raise UnknownNameError(msg, tensor=name)
    # Hashes follow the strings that they belong to.
    texts = {f"{name}.{part}" for name in text_names(specs) if name in wanted for part in PARTS}
    return tuple(spec for spec in specs if {spec.name, base_name(spec.name)} & set(wanted) or spec.name in texts)


def make_tasks(specs: Sequence[TensorSpec], directory: Path, one_file: str | None, fmt: Format) -> list[FileTask]:
    """The files to write.

    Raises:
        IncompatibleOptionsError: a tensor's name cannot be a file name (it would lead elsewhere, or be passed over on
            opening), or a target is the very file that is read.
    """
    for spec in specs:
        check_name(spec.name)
    if fmt.one_file is not None:
        tasks = [FileTask(directory / (one_file or fmt.one_file), tuple(specs))] if specs else []
    else:
        tasks = _file_per_tensor(specs, directory, fmt)
    for task in tasks:
        for spec in task.specs:
            if task.target.exists() and any(map(task.target.samefile, spec.paths)):
                msg = (
                    f"{task.target}: source and destination are the same file; name another directory as dst, "
                    "or another format"
                )
                raise IncompatibleOptionsError(msg, path=task.target, tensor=spec.name)
    return tasks


def _file_per_tensor(specs: Sequence[TensorSpec], directory: Path, fmt: Format) -> list[FileTask]:
    by_name = {spec.name: spec for spec in specs}
    tasks = []
    for spec in specs:
        base = base_name(spec.name)
        parts = (by_name.get(f"{base}.values"), by_name.get(f"{base}.offsets"))
        if base == spec.name or not isinstance(fmt, SupportsRagged) or not _is_ragged(*parts):
            tasks.append(FileTask(directory / f"{spec.name}{fmt.suffixes[0]}", (spec,)))
        elif spec is parts[0]:
            both = tuple(part for part in parts if part is not None)
            tasks.append(FileTask(directory / f"{base}{fmt.suffixes[0]}", both, base))
    return tasks


def _is_ragged(values: TensorSpec | None, offsets: TensorSpec | None) -> bool:
    """Whether two tensors can be written as one list of lists of ints and come back as they are."""
    return (
        values is not None
        and offsets is not None
        and values.dtype == offsets.dtype == torch.int64
        and len(values.shape) == len(offsets.shape) == 1
        and offsets.shape[0] > 0
    )
