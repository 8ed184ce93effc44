"""Which formats there are, and which files of a directory hold its tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from jasper_store.errors import CorruptFileError, DatasetNotFoundError, UnknownNameError
from jasper_store.formats.base import SupportsKeys
from jasper_store.formats.flat import stem_of
from jasper_store.formats.generation import read_generation
from jasper_store.formats.hdf5.format import Hdf5Format
from jasper_store.formats.npy import NpyFormat
from jasper_store.formats.numbered import INDEX_SUFFIX, Numbered, group, merge, pick, read_index
from jasper_store.formats.parts import join
from jasper_store.formats.pt.format import PtFormat
from jasper_store.formats.safetensors import SafetensorsFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from jasper_store.errors import JasperStoreError
    from jasper_store.formats.base import Format, FormatName, Schema, TensorSpec

__all__ = ["AUTO_ORDER", "FORMATS", "Located", "base_name", "format_for", "locate"]

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
        generation: number of the generation, where a manifest names the parts; 0 for files as they lie.
    """

    format: FormatName
    root: Path
    specs: tuple[TensorSpec, ...]
    warnings: tuple[str, ...] = ()
    generation: int = 0


def base_name(name: str) -> str:
    """The name of the whole tensor: ``X`` for the parts ``X.values`` and ``X.offsets`` of a ragged one."""
    base, dot, part = name.rpartition(".")
    return base if dot and part in {"values", "offsets"} else name


def format_for(path: Path) -> Format | None:
    """The format that a file name's suffix says, or ``None``."""
    lower = path.name.lower()
    return next((f for f in FORMATS.values() if lower.endswith(f.suffixes)), None)


def locate(
    path: Path | tuple[Path, ...],
    format: str,  # noqa: A002 - the word that users pass
    schema: Schema,
    *,
    generation: int | None = None,
) -> Located:
    """Find the tensors of a dataset directory, of one file or of several; only headers are read.

    Args:
        path: a directory, one file, or several files.
        format: ``"auto"`` or a format's name. In a directory, auto takes the first of :data:`AUTO_ORDER` that is
            complete, else the most complete one, and fills the rest from the others.
        schema: its ``required`` names decide what complete means and which files are only extras. Without
            them, every name that any format has is wanted.
        generation: of a directory whose manifest names parts, the generation to find; the newest by default. 0
            passes over what the manifest says: the dataset before it grew.

    Raises:
        UnknownNameError: no such format, or a file whose suffix says nothing.
        DatasetNotFoundError: nothing there, or nothing of that format.
        CorruptFileError: a file that is needed cannot be read, or two files hold the same tensor.
    """
    asked = next((name for name in FORMATS if name == format), None)
    if asked is None and format != "auto":
        raise UnknownNameError(f"unknown format {format!r}; use 'auto' or one of {', '.join(map(repr, FORMATS))}.")
    if isinstance(path, tuple):
        return _locate_files(path, format, schema)
    if path.is_dir():
        grown = None if generation == 0 else _locate_generation(path, asked, schema, generation)
        return grown or _locate_directory(path, asked, schema)
    if not path.exists():
        there = "" if path.parent.is_dir() else f" ({path.parent} does not exist either)"
        raise DatasetNotFoundError(
            f"{path}: no such file or directory{there}; expected a dataset directory or one file.", path=path
        )
    chosen = _format_of(path, format)
    return Located(chosen.name, path, tuple(chosen.locate(path, schema)))


def _format_of(path: Path, format: str) -> Format:  # noqa: A002
    """The format asked for, or the one that a file's name says."""
    chosen = format_for(path) if format == "auto" else FORMATS.get(format)  # type: ignore[call-overload]
    if chosen is None:
        known = ", ".join(suffix for f in FORMATS.values() for suffix in f.suffixes)
        raise UnknownNameError(f"{path}: its name does not say its format; expected one of {known}, or pass format=.")
    return cast("Format", chosen)


@dataclass
class _Scan:
    """The files of one format in a directory, located."""

    specs: dict[str, TensorSpec] = field(default_factory=dict)
    errors: dict[str, JasperStoreError] = field(default_factory=dict)

    def names(self) -> set[str]:
        """Base names of all tensors; a file that cannot be read counts by its name, so that it is not passed over."""
        return {base_name(name) for name in self.specs} | self.errors.keys()

    def take(self, wanted: Iterable[str]) -> list[TensorSpec]:
        """The specs of these base names; raises the error of the first that cannot be read."""
        wanted = set(wanted)
        for name in sorted(wanted & self.errors.keys()):
            raise self.errors[name]
        return [spec for spec in self.specs.values() if base_name(spec.name) in wanted]


def _locate_files(paths: tuple[Path, ...], format: str, schema: Schema) -> Located:  # noqa: A002
    """The tensors of several files, which may lie in several directories.

    Files that are numbered alike, and files that hold a tensor of the same name, are parts, in the order given.
    """
    if not paths:
        raise DatasetNotFoundError("expected at least one file, found an empty list")
    root = paths[0].parent
    while not all(path.is_relative_to(root) for path in paths):
        root = root.parent
    found: dict[str, list[TensorSpec]] = {}
    for path in dict.fromkeys(paths):
        if path.is_dir():
            raise DatasetNotFoundError(
                f"{path}: expected files, found a directory in the list; open it alone.", path=path
            )
    # Files of several formats may be named; a suffix says more than the format of one of them.
    formats = {path: format_for(path) or _format_of(path, format) for path in dict.fromkeys(paths)}
    groups, rest = group({path: stem_of(path, fmt.suffixes) for path, fmt in formats.items()}, whole=False)
    for numbered in groups:
        for spec in merge(numbered, [_with_stem(formats[path], path, schema) for path in numbered.files]):
            found.setdefault(spec.name, []).append(spec)
    for path in rest:
        for spec in formats[path].locate(path, schema):
            found.setdefault(spec.name, []).append(spec)
    specs = tuple(same[0] if len(same) == 1 else join(name, same) for name, same in found.items())
    return Located(formats[paths[0]].name, root, specs)


def _with_stem(fmt: Format, path: Path, schema: Schema) -> tuple[str, list[TensorSpec]]:
    """A numbered file's name without suffix, and its tensors by the names that it has for them."""
    stem = stem_of(path, fmt.suffixes)
    return stem, fmt.locate_keys(path) if isinstance(fmt, SupportsKeys) else fmt.locate(path, schema)


def _locate_generation(root: Path, asked: FormatName | None, schema: Schema, number: int | None) -> Located | None:
    """The tensors of a directory whose manifest names their parts; other files in it are passed over."""
    published = read_generation(root)
    if published is None:
        return None
    if asked not in (None, published.format):
        msg = (
            f"{root}: expected {asked} tensors, found a dataset in parts, most of them {published.format}; open it "
            "with format='auto'"
        )
        raise DatasetNotFoundError(msg, path=root)
    number = published.number if number is None else number
    specs = published.locate(root, schema, format_for, number)
    return Located(published.format, root, tuple(specs), generation=number)


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
    if not any(scan.names() for scan in scans.values()):
        raise DatasetNotFoundError(_nothing(root, asked), path=root)
    wanted = set().union(*(scan.names() for scan in scans.values()))
    if schema.required:
        wanted &= known
    chosen = max(scans, key=lambda name: len(wanted & scans[name].names()))
    specs, notes = _gather(root, chosen, scans, wanted, schema)
    return Located(chosen, root, tuple(specs), (*notes, *_stale(specs, files["pt"])))


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
    for stem, located in _units(fmt, files, schema):
        try:
            specs = located()
        except (CorruptFileError, DatasetNotFoundError) as exc:
            if exc.path is not None and fmt.one_file == Path(exc.path).name:
                raise
            scan.errors[base_name(stem)] = exc
            continue
        for spec in specs:
            if spec.name in scan.specs:
                raise CorruptFileError(
                    f"{spec.path}: holds the tensor {spec.name!r}, and so does {scan.specs[spec.name].path}; remove one.",
                    path=spec.path,
                    tensor=spec.name,
                )
            scan.specs[spec.name] = spec
    for name in [name for name in scan.specs if name != base_name(name) and base_name(name) in scan.specs]:
        raise CorruptFileError(
            f"{scan.specs[name].path}: holds the ragged tensor {name!r}, and {scan.specs[base_name(name)].path} a "
            "plain one of that name; remove one.",
            path=scan.specs[name].path,
            tensor=name,
        )
    return scan


def _units(
    fmt: Format, files: Mapping[Path, str], schema: Schema
) -> Iterator[tuple[str, Callable[[], Sequence[TensorSpec]]]]:
    """What is read as one: a name, and what locates its tensors. A file, numbered files, or what an index names."""
    files = dict(files)
    if fmt.name == "safetensors":
        for index in sorted({path.parent for path in files}):
            for path in sorted(index.glob(f"*{INDEX_SUFFIX}")):
                named = read_index(path)
                shards = list(dict.fromkeys(named.values()))
                for shard in shards:
                    files.pop(shard, None)
                yield path.name.removesuffix(INDEX_SUFFIX), partial(_indexed, path, named, shards)
    groups, rest = group(files)
    for numbered in groups:
        yield numbered.base, partial(_numbered, fmt, numbered, schema)
    for path, stem in rest.items():
        yield stem, partial(fmt.locate, path, schema)


def _numbered(fmt: Format, numbered: Numbered, schema: Schema) -> list[TensorSpec]:
    return merge(numbered, [_with_stem(fmt, path, schema) for path in numbered.files])


def _indexed(index: Path, named: Mapping[str, Path], shards: Sequence[Path]) -> list[TensorSpec]:
    fmt = FORMATS["safetensors"]
    assert isinstance(fmt, SupportsKeys)
    return pick(index, named, [spec for shard in shards for spec in fmt.locate_keys(shard)])


def _stale(specs: Iterable[TensorSpec], pt_files: Mapping[Path, str]) -> list[str]:
    """A text for each file that is older than a ``.pt`` of a tensor in it."""
    sources = {stem: path for path, stem in pt_files.items()}
    older: dict[Path, list[str]] = {}
    for spec in specs:
        source = sources.get(base_name(spec.name))
        if source is None or source in spec.paths or spec.path.suffix.lower() in FORMATS["pt"].suffixes:
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


def _nothing(root: Path, asked: FormatName | None) -> str:
    kinds = Counter(path.suffix.lower() or "(no suffix)" for path in root.iterdir() if path.is_file())
    there = (
        ", ".join(f"{n} {suffix}" for suffix, n in sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))[:8])
        or "no files"
    )
    wanted = "tensors in any known format" if asked is None else f"{asked} tensors"
    known = ", ".join(s for name, f in FORMATS.items() if asked in (None, name) for s in f.suffixes)
    return f"{root}: expected {wanted} ({known}), found {there}."
