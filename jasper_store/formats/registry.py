"""Which formats there are, and which files of a directory hold its tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from jasper_store.errors import CorruptFileError, DatasetNotFoundError, UnknownNameError
from jasper_store.formats.base import SupportsSkipped
from jasper_store.formats.flat import stem_of
from jasper_store.formats.hdf5.format import Hdf5Format
from jasper_store.formats.npy import NpyFormat
from jasper_store.formats.pt.format import PtFormat
from jasper_store.formats.safetensors import SafetensorsFormat
from jasper_store.formats.texts import text_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from jasper_store.errors import JasperStoreError
    from jasper_store.formats.base import Format, FormatName, Schema, Skipped, TensorSpec

__all__ = ["AUTO_ORDER", "FORMATS", "Located", "base_name", "format_for", "locate", "skipped_at", "skipped_in"]

FORMATS: Mapping[FormatName, Format] = MappingProxyType(
    {"safetensors": SafetensorsFormat(), "npy": NpyFormat(), "hdf5": Hdf5Format(), "pt": PtFormat()}
)
AUTO_ORDER: tuple[FormatName, ...] = ("safetensors", "npy", "hdf5", "pt")


@dataclass(frozen=True)
class Located:
    """Where the tensors of a dataset lie.

    Attributes:
        format: the format chosen, or the one asked for.
        root: the directory or file that was looked at.
        specs: one per tensor, names unique.
        warnings: what the caller should tell the user, e.g. that a file is older than the one it was made from.
        skipped: what else the files hold, that is no tensor, and of which no other file holds one.
    """

    format: FormatName
    root: Path
    specs: tuple[TensorSpec, ...]
    warnings: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()


def base_name(name: str) -> str:
    """The name of the whole tensor: ``X`` for the parts ``X.values`` and ``X.offsets`` of a ragged one."""
    base, dot, part = name.rpartition(".")
    return base if dot and part in {"values", "offsets"} else name


def format_for(path: Path) -> Format | None:
    """The format that a file name's suffix says, or ``None``."""
    lower = path.name.lower()
    return next((f for f in FORMATS.values() if lower.endswith(f.suffixes)), None)


def skipped_in(fmt: Format, path: Path, schema: Schema) -> list[Skipped]:
    """What a file holds that is no tensor; errors as ``fmt.locate``."""
    return fmt.skipped(path, schema) if isinstance(fmt, SupportsSkipped) else []


def skipped_at(directory: Path, name: FormatName, schema: Schema) -> list[Skipped]:
    """What the files of one format in a directory hold that is no tensor; errors as ``locate``."""
    return [skip for path in _files(directory)[name] for skip in skipped_in(FORMATS[name], path, schema)]


def locate(path: Path | tuple[Path, ...], format: str, schema: Schema) -> Located:  # noqa: A002 - the word that users pass
    """Find the tensors of a dataset directory, of one file or of several; only headers are read.

    Args:
        path: a directory, one file, or several files.
        format: ``"auto"`` or a format's name. In a directory, auto takes the first of :data:`AUTO_ORDER` that is
            complete, else the most complete one, and fills the rest from the others.
        schema: its ``required`` names decide what complete means and which files are only extras. Without
            them, every name that any format has is wanted.

    Raises:
        UnknownNameError: no such format, or a file whose suffix says nothing.
        DatasetNotFoundError: nothing there, or nothing of that format.
        CorruptFileError: a file that is needed cannot be read, or two files hold the same tensor.
    """
    asked = next((name for name in FORMATS if name == format), None)
    if asked is None and format != "auto":
        raise UnknownNameError(f"unknown format {format!r}; use 'auto' or one of {', '.join(map(repr, FORMATS))}.")
    if isinstance(path, tuple):
        return _locate_files(path, asked, schema)
    if path.is_dir():
        return _locate_directory(path, asked, schema)
    return _require_tensors(_locate_file(path, asked, schema))


def _locate_file(path: Path, asked: FormatName | None, schema: Schema) -> Located:
    """The tensors of one file, maybe none beside what is skipped."""
    if not path.exists():
        there = "" if path.parent.is_dir() else f" ({path.parent} does not exist either)"
        raise DatasetNotFoundError(
            f"{path}: no such file or directory{there}; expected a dataset directory or one file.", path=path
        )
    chosen = format_for(path) if asked is None else FORMATS[asked]
    if chosen is None:
        known = ", ".join(suffix for f in FORMATS.values() for suffix in f.suffixes)
        raise UnknownNameError(f"{path}: its name does not say its format; expected one of {known}, or pass format=.")
    specs = tuple(chosen.locate(path, schema))
    return Located(chosen.name, path, specs, skipped=tuple(skipped_in(chosen, path, schema)))


def _require_tensors(located: Located) -> Located:
    """Refuse files that hold nothing but what is no tensor."""
    if located.specs or not located.skipped:
        return located
    found = "; ".join(f"{skip.name!r:.100} in {skip.path.name}: {skip.reason}" for skip in located.skipped[:5])
    more = f"; and {len(located.skipped) - 5} more" if len(located.skipped) > 5 else ""
    raise DatasetNotFoundError(
        f"{located.root}: expected tensors, found none beside what is skipped: {found}{more}.", path=located.root
    )


@dataclass
class _Scan:
    """The files of one format in a directory, located."""

    specs: dict[str, TensorSpec] = field(default_factory=dict)
    errors: dict[str, JasperStoreError] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)

    def names(self) -> set[str]:
        """Base names of all tensors; a file that cannot be read counts by its name, so that it is not passed over."""
        return {base_name(name) for name in self.specs} | self.errors.keys()

    def take(self, wanted: Iterable[str]) -> list[TensorSpec]:
        """The specs of these base names; raises the error of the first that cannot be read."""
        wanted = set(wanted)
        for name in sorted(wanted & self.errors.keys()):
            raise self.errors[name]
        return [spec for spec in self.specs.values() if base_name(spec.name) in wanted]


def _locate_files(paths: tuple[Path, ...], asked: FormatName | None, schema: Schema) -> Located:
    """The tensors of several files, which may lie in several directories."""
    if not paths:
        raise DatasetNotFoundError("expected at least one file, found an empty list")
    root = paths[0].parent
    while not all(path.is_relative_to(root) for path in paths):
        root = root.parent
    found: dict[str, TensorSpec] = {}
    skipped: list[Skipped] = []
    for path in paths:
        if path.is_dir():
            raise DatasetNotFoundError(
                f"{path}: expected files, found a directory in the list; open it alone.", path=path
            )
        # Files of several formats may be named; a suffix says more than the format of one of them.
        located = _locate_file(path, None if format_for(path) else asked, schema)
        skipped += located.skipped
        for spec in located.specs:
            if spec.name in found:
                raise CorruptFileError(
                    f"{path}: holds the tensor {spec.name!r}, and so does {found[spec.name].path}; leave one out.",
                    path=path,
                    tensor=spec.name,
                )
            found[spec.name] = spec
    first = format_for(paths[0])
    name: FormatName = "safetensors" if first is None else first.name
    return _require_tensors(Located(name, root, tuple(found.values()), (), _not_kept(skipped, found.values())))


def _locate_directory(root: Path, asked: FormatName | None, schema: Schema) -> Located:
    files = _files(root)
    order = AUTO_ORDER if asked is None else (asked,)
    scans: dict[FormatName, _Scan] = {}
    known = schema.required | schema.optional
    for name in order:
        if files[name]:
            scans[name] = _scan(FORMATS[name], files[name], schema)
            # The rest need not be opened (and h5py not be imported) once one format is known to be complete.
            if schema.required and known <= scans[name].names():
                break
    skipped = [skip for scan in scans.values() for skip in scan.skipped]
    if not any(scan.names() for scan in scans.values()):
        raise DatasetNotFoundError(_nothing(root, asked, skipped), path=root)
    wanted = set().union(*(scan.names() for scan in scans.values()))
    if schema.required:
        wanted &= known
    chosen = max(scans, key=lambda name: len(wanted & scans[name].names()))
    specs, notes = _gather(root, chosen, scans, wanted, schema)
    if not specs:
        raise DatasetNotFoundError(" ".join([_nothing(root, asked, skipped), *notes]), path=root)
    return Located(chosen, root, tuple(specs), (*notes, *_stale(specs, files["pt"])), _not_kept(skipped, specs))


def _not_kept(skipped: Iterable[Skipped], specs: Iterable[TensorSpec]) -> tuple[Skipped, ...]:
    """What was skipped, without strings that a conversion kept: these are there as tensors of their name."""
    kept = text_names(specs)
    return tuple(skip for skip in skipped if skip.name not in kept)


def _gather(
    root: Path, chosen: FormatName, scans: Mapping[FormatName, _Scan], wanted: set[str], schema: Schema
) -> tuple[list[TensorSpec], list[str]]:
    """The chosen format's tensors and extras, and what it lacks from the others."""
    notes: list[str] = []
    first = scans[chosen]
    extras = first.names() - wanted
    for name in sorted(extras & first.errors.keys()):
        if not schema.required:
            raise first.errors[name]
        notes.append(f"{name!r} is not part of the dataset and is skipped: {first.errors[name]}")
    specs = first.take((wanted | extras) - (extras & first.errors.keys()))
    missing = wanted - first.names()
    for other, scan in scans.items():
        if other != chosen and (found := missing & scan.names()):
            specs += scan.take(found)
            missing -= found
            notes.append(
                f"{root}: {chosen} lacks {', '.join(sorted(found))}; read from {other} instead. "
                f"Convert the dataset to {chosen} again to have it whole."
            )
    return specs, notes


def _files(root: Path) -> dict[FormatName, dict[Path, str]]:
    """Files of each format with their base names; hidden and temporary ones are passed over."""
    found: dict[FormatName, dict[Path, str]] = {name: {} for name in FORMATS}
    for path in sorted(root.iterdir()):
        chosen = format_for(path)
        if chosen is not None and path.name[0] not in "._" and not path.is_dir():
            found[chosen.name][path] = stem_of(path, chosen.suffixes)
    for name, fmt in FORMATS.items():
        # Where the one file of a dataset is there, others with its suffix are something else.
        if fmt.one_file is not None and root / fmt.one_file in found[name]:
            found[name] = {root / fmt.one_file: found[name][root / fmt.one_file]}
    return found


def _scan(fmt: Format, files: Mapping[Path, str], schema: Schema) -> _Scan:
    scan = _Scan()
    for path, stem in files.items():
        try:
            specs = fmt.locate(path, schema)
            scan.skipped += skipped_in(fmt, path, schema)
        except (CorruptFileError, DatasetNotFoundError) as exc:
            if fmt.one_file == path.name:
                raise
            scan.errors[base_name(stem)] = exc
            continue
        for spec in specs:
            if spec.name in scan.specs:
                raise CorruptFileError(
                    f"{path}: holds the tensor {spec.name!r}, and so does {scan.specs[spec.name].path}; remove one.",
                    path=path,
                    tensor=spec.name,
                )
            scan.specs[spec.name] = spec
    for skip in scan.skipped:
        if skip.name in schema.required and skip.name not in scan.names():
            scan.errors[skip.name] = CorruptFileError(
                f"{skip.path}: expected the tensor {skip.name!r:.100}, found that {skip.reason}.",
                path=skip.path,
                tensor=skip.name,
            )
    for name in [name for name in scan.specs if name != base_name(name) and base_name(name) in scan.specs]:
        raise CorruptFileError(
            f"{scan.specs[name].path}: holds the ragged tensor {name!r}, and {scan.specs[base_name(name)].path} a "
            "plain one of that name; remove one.",
            path=scan.specs[name].path,
            tensor=name,
        )
    return scan


def _stale(specs: Iterable[TensorSpec], pt_files: Mapping[Path, str]) -> list[str]:
    """A text for each file that is older than a ``.pt`` of a tensor in it."""
    sources = {stem: path for path, stem in pt_files.items()}
    older: dict[Path, list[str]] = {}
    for spec in specs:
        source = sources.get(base_name(spec.name))
        if source is None or source == spec.path or spec.path.suffix.lower() in FORMATS["pt"].suffixes:
            continue
        if spec.path.stat().st_mtime_ns < source.stat().st_mtime_ns and source.name not in older.setdefault(
            spec.path, []
        ):
            older[spec.path].append(source.name)
    return [
        f"{path}: is older than {', '.join(sources)}; convert again, or remove what is outdated."
        for path, sources in older.items()
        if sources
    ]


def _nothing(root: Path, asked: FormatName | None, skipped: Sequence[Skipped]) -> str:
    kinds = Counter(path.suffix.lower() or "(no suffix)" for path in root.iterdir() if path.is_file())
    there = (
        ", ".join(f"{n} {suffix}" for suffix, n in sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))[:8])
        or "no files"
    )
    wanted = "tensors in any known format" if asked is None else f"{asked} tensors"
    known = ", ".join(s for name, f in FORMATS.items() if asked in (None, name) for s in f.suffixes)
    more = "".join(f" {skip.path.name}: {skip.name!r:.100} is no tensor, {skip.reason}." for skip in skipped[:5])
    return f"{root}: expected {wanted} ({known}), found {there}.{more}"
