"""Which formats there are, and which files of a directory hold its tensors."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from jasper_store.errors import CorruptFileError, DatasetNotFoundError, IncompatibleOptionsError, UnknownNameError
from jasper_store.formats.arrow.directory import dataset_files, splits_of
from jasper_store.formats.arrow.format import ArrowFormat
from jasper_store.formats.base import Skipped, Streamed
from jasper_store.formats.files import system_refusals
from jasper_store.formats.flat import stem_of
from jasper_store.formats.found import read_found
from jasper_store.formats.generation import SHARDS, read_generation
from jasper_store.formats.hdf5.format import Hdf5Format
from jasper_store.formats.npy import NpyFormat
from jasper_store.formats.npz import NpzFormat
from jasper_store.formats.numbered import group, merge
from jasper_store.formats.parquet import ParquetFormat
from jasper_store.formats.parts import join
from jasper_store.formats.pickled import PickleFormat
from jasper_store.formats.protocols import SupportsSkipped
from jasper_store.formats.pt.format import PtFormat
from jasper_store.formats.safetensors import SafetensorsFormat
from jasper_store.formats.scan import Scan, base_name, one_error, scan_files, with_stem
from jasper_store.formats.texts import text_names
from jasper_store.formats.vectors import BinFormat, FaissFormat

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from jasper_store.errors import JasperStoreError
    from jasper_store.formats.base import FileFacts, FormatName, Schema, TensorSpec
    from jasper_store.formats.protocols import Format, ReadFormat

__all__ = [
    "AUTO_ORDER",
    "FORMATS",
    "READ_ONLY",
    "Located",
    "base_name",
    "files_of",
    "format_for",
    "locate",
    "readable",
    "skipped_at",
    "skipped_in",
    "writable",
]

FORMATS: Mapping[FormatName, Format] = MappingProxyType(
    {"safetensors": SafetensorsFormat(), "npy": NpyFormat(), "hdf5": Hdf5Format(), "pt": PtFormat()}
)
AUTO_ORDER: tuple[FormatName, ...] = ("safetensors", "npy", "hdf5", "pt")
READ_ONLY: Mapping[FormatName, ReadFormat] = MappingProxyType(
    {
        "arrow": ArrowFormat(),
        "faiss": FaissFormat(),
        "bin": BinFormat(),
        "npz": NpzFormat(),
        "pickle": PickleFormat(),
        "parquet": ParquetFormat(),
    }
)
"""Formats that others write, in the order in which ``"auto"`` asks them after those of :data:`AUTO_ORDER`."""


@dataclass(frozen=True)
class Located:
    """Where the tensors of a dataset lie.

    Attributes:
        format: the format chosen, or the one asked for.
        root: the directory or file that was looked at.
        specs: one per tensor, names unique.
        warnings: what the caller should tell the user, e.g. that a file is older than the one it was made from.
        generation: number of the generation, where a manifest names the parts; 0 for files as they lie.
        facts: what the system said of the files, by their paths as texts, where it was asked.
        skipped: what lies in the files or beside them and is no tensor, or none that is read.
    """

    format: FormatName
    root: Path
    specs: tuple[TensorSpec, ...]
    warnings: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    generation: int = 0
    facts: Mapping[str, FileFacts] = field(default_factory=dict)


def readable() -> Mapping[FormatName, ReadFormat]:
    """All formats by name, those that are written first."""
    return {**FORMATS, **READ_ONLY}


def writable(format: str) -> Format:  # noqa: A002 - the word that users pass
    """The format of this name, to write it.

    Raises:
        UnknownNameError: there is none of this name, or it is only read.
    """
    for name, fmt in FORMATS.items():
        if name == format:
            return fmt
    only = f"; {format} is read and never written" if format in READ_ONLY else ""
    raise UnknownNameError(f"format={format!r}: expected one of {', '.join(map(repr, FORMATS))}{only}")


def format_for(path: Path) -> ReadFormat | None:
    """The format that a file name's suffix says, or ``None``."""
    lower = path.name.lower()
    return next((f for f in readable().values() if lower.endswith(f.suffixes)), None)


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
            complete, else the most complete one, and fills the rest from the others; the formats of :data:`READ_ONLY` fill
            what none of these has, and what they hold that is unreadable or no tensor is then skipped.
        schema: its ``required`` names decide what complete means and which files are only extras. Without
            them, every name that any format has is wanted.
        generation: of a directory whose manifest names parts, the generation to find; the newest by default. 0
            passes over what the manifest says: the dataset before it grew.

    Raises:
        UnknownNameError: no such format, or a file whose suffix says nothing.
        DatasetNotFoundError: nothing there, or nothing of that format.
        CorruptFileError: a file that is needed cannot be read, or two files hold the same tensor.
        InsufficientMemoryError: the system refused the memory that headers need.
    """
    with system_refusals(path if isinstance(path, Path) else next(iter(path), Path())):
        return _locate(path, format, schema, generation)


def _locate(path: Path | tuple[Path, ...], format: str, schema: Schema, generation: int | None) -> Located:  # noqa: A002
    known = readable()
    asked = next((name for name in known if name == format), None)
    if asked is None and format != "auto":
        raise UnknownNameError(f"unknown format {format!r}; use 'auto' or one of {', '.join(map(repr, known))}.")
    if isinstance(path, tuple):
        return _locate_files(path, format, schema)
    if path.is_dir():
        known_parts = None if generation == 0 else _locate_generation(path, asked, schema, generation)
        return known_parts or _locate_found(path, asked) or _locate_directory(path, asked, schema)
    if not path.exists():
        there = "" if path.parent.is_dir() else f" ({path.parent} does not exist either)"
        raise DatasetNotFoundError(
            f"{path}: no such file or directory{there}; expected a dataset directory or one file.", path=path
        )
    chosen = _format_of(path, format)
    specs = tuple(chosen.locate(path, schema))
    return _require_tensors(Located(chosen.name, path, specs, skipped=tuple(skipped_in(chosen, path, schema))))


def _format_of(path: Path, format: str) -> ReadFormat:  # noqa: A002
    """The format asked for, or the one that a file's name says."""
    chosen = format_for(path) if format == "auto" else readable()[cast("FormatName", format)]
    if chosen is None:
        known = ", ".join(suffix for f in readable().values() for suffix in f.suffixes)
        raise UnknownNameError(f"{path}: its name does not say its format; expected one of {known}, or pass format=.")
    return chosen


def skipped_in(fmt: ReadFormat, path: Path, schema: Schema) -> list[Skipped]:
    """What a file holds that is no tensor; errors as ``fmt.locate``."""
    return fmt.skipped(path, schema) if isinstance(fmt, SupportsSkipped) else []


def skipped_at(directory: Path, name: FormatName, schema: Schema) -> list[Skipped]:
    """What the files of one format in a directory hold that is no tensor; errors as ``locate``."""
    files = _files(directory)[name]
    passed: list[Skipped] = []
    if name == "arrow":
        files, passed = dataset_files(directory, files)
    return [*passed, *(skip for path in files for skip in skipped_in(readable()[name], path, schema))]


def files_of(directory: Path, name: FormatName) -> Mapping[Path, str]:
    """The files of one format in a directory that hold its dataset, in order, each with its name without suffix."""
    files = _files(directory)[name]
    return dataset_files(directory, files)[0] if name == "arrow" else files


def _require_tensors(located: Located) -> Located:
    """Refuse files that hold nothing but what is no tensor."""
    if not located.specs and located.skipped:
        raise DatasetNotFoundError(
            f"{located.root}: expected tensors, found {_told(located.skipped)}.", path=located.root
        )
    return located


def _not_kept(skipped: Iterable[Skipped], specs: Iterable[TensorSpec]) -> tuple[Skipped, ...]:
    """What was skipped, without strings that a conversion kept: these are there as tensors of their name."""
    kept = text_names(specs)
    return tuple(skip for skip in skipped if skip.name not in kept)


def _told(skipped: Iterable[Skipped]) -> str:
    """What was skipped, in words, the first of many."""
    texts = [f"{one.name} ({one.reason})" for one in skipped]
    return "; ".join(texts[:5]) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")


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
    if len(set(paths)) < len(paths):
        path = next(path for number, path in enumerate(paths) if path in paths[:number])
        raise CorruptFileError(f"{path}: expected each file once in the list, found it twice.", path=path)
    for path in paths:
        if path.is_dir():
            raise DatasetNotFoundError(
                f"{path}: expected files, found a directory in the list; open it alone.", path=path
            )
    # Files of several formats may be named; a suffix says more than the format of one of them.
    formats = {path: format_for(path) or _format_of(path, format) for path in paths}
    groups, rest = group({path: stem_of(path, fmt.suffixes) for path, fmt in formats.items()}, whole=False)
    for numbered in groups:
        for spec in merge(numbered, [with_stem(formats[path], path, schema) for path in numbered.files]):
            found.setdefault(spec.name, []).append(spec)
    for path in rest:
        for spec in formats[path].locate(path, schema):
            found.setdefault(spec.name, []).append(spec)
    specs = tuple(same[0] if len(same) == 1 else join(name, same) for name, same in found.items())
    skipped = [skip for path, fmt in formats.items() for skip in skipped_in(fmt, path, schema)]
    return _require_tensors(Located(formats[paths[0]].name, root, specs, (), _not_kept(skipped, specs)))


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


def _locate_found(root: Path, asked: FormatName | None) -> Located | None:
    """The tensors of a directory that was verified before and has not changed since, without reading a header."""
    found = read_found(root)
    if found is None or asked not in (None, found.layout.format):
        return None
    suffixes = tuple(suffix for fmt in readable().values() for suffix in fmt.suffixes)
    facts = found.current_facts(root, suffixes)
    if facts is None:
        return None
    paths = found.paths(root)
    return Located(
        found.layout.format, root, tuple(found.locate(root, paths)), facts=dict(zip(paths, facts, strict=True))
    )


def _locate_directory(root: Path, asked: FormatName | None, schema: Schema) -> Located:
    files = _files(root)
    order = AUTO_ORDER if asked is None else (asked,)
    scans: dict[FormatName, Scan] = {}
    skipped: list[Skipped] = []
    if asked == "arrow":
        files["arrow"], skipped = dataset_files(root, files["arrow"])
    known = schema.required | schema.optional
    for name in order:
        if files[name]:
            scans[name] = scan_files(readable()[name], files[name], schema)
            # The rest need not be opened (and h5py not be imported) once one format is known to be complete.
            if schema.required and known <= scans[name].names():
                break
    else:
        if asked is None:
            skipped = _add_read_only(root, scans, files, schema)
    skipped += _skipped_in(scans, files, schema)
    if not any(scan.names() for scan in scans.values()):
        raise DatasetNotFoundError(_nothing(root, asked, skipped), path=root)
    _require_numbers(skipped, scans.values(), schema)
    if not any(scan.specs for scan in scans.values()):
        # Also where none of them would be part of the dataset: there is nothing else.
        raise one_error([error for scan in scans.values() for error in scan.errors.values()])
    whole = set().union(*(scan.names() for scan in scans.values()))
    for scan in scans.values():
        scan.drop_halves(whole)
    wanted = set().union(*(scan.names() for scan in scans.values()))
    if schema.required:
        wanted &= known
    chosen = max(scans, key=lambda name: len(wanted & scans[name].names()))
    if chosen in READ_ONLY:
        # What this library writes is the dataset, if there is any of it.
        chosen = max(scans, key=lambda name: (name in FORMATS and bool(scans[name].names()), len(scans[name].names())))
    specs, notes = _gather(root, chosen, scans, wanted)
    if not specs:
        raise DatasetNotFoundError(" ".join([_nothing(root, asked, skipped), *notes]), path=root)
    return Located(chosen, root, tuple(specs), (*notes, *_stale(specs, files["pt"])), _not_kept(skipped, specs))


def _require_numbers(skipped: Iterable[Skipped], scans: Iterable[Scan], schema: Schema) -> None:
    """Refuse a required tensor that is there as what is none."""
    there = set().union(*(scan.names() for scan in scans))
    for skip in skipped:
        if skip.name in schema.required - there:
            raise CorruptFileError(
                f"{skip.path}: expected the tensor {skip.name!r:.100}, found that {skip.reason}.",
                path=skip.path,
                tensor=skip.name,
            )


def _add_read_only(
    root: Path, scans: dict[FormatName, Scan], files: dict[FormatName, dict[Path, str]], schema: Schema
) -> list[Skipped]:
    """Scan the formats that are only read, and return what of them is passed over.

    A directory of tensors may hold any other file. So where there are tensors in another format, a file that cannot be
    read is skipped, and so are values that cannot be read in place.
    """
    added: dict[FormatName, Scan] = {}
    skipped: list[Skipped] = []
    for name, fmt in READ_ONLY.items():
        if not files[name]:
            continue
        try:
            if name == "arrow":
                files[name], passed = dataset_files(root, files[name])
                skipped += passed
            added[name] = scan_files(fmt, files[name], schema)
        except (CorruptFileError, DatasetNotFoundError) as exc:  # files that contradict each other
            added[name] = Scan(errors={name: exc}, failed={str(path) for path in files[name]})
    main = max(added, key=lambda name: len(added[name].specs), default=None)
    written = any(scan.names() for scan in scans.values())
    for name, scan in added.items():
        if written or (name != main and main is not None and added[main].specs):
            skipped += [Skipped(stem, _path_of(exc, files[name]), str(exc)) for stem, exc in scan.errors.items()]
            scan.errors.clear()
            for spec in [spec for spec in scan.specs.values() if isinstance(spec.location, Streamed)]:
                del scan.specs[spec.name]
                skipped.append(Skipped(spec.name, spec.path, "compressed; open or convert its file alone to have it"))
    scans.update(added)
    return skipped


def _path_of(error: JasperStoreError, files: Mapping[Path, str]) -> Path:
    return next((path for path in files if str(path) == str(error.path)), next(iter(files)))


def _skipped_in(
    scans: Mapping[FormatName, Scan], files: Mapping[FormatName, Mapping[Path, str]], schema: Schema
) -> list[Skipped]:
    """What the files that were scanned hold besides tensors; a column that every shard holds is named once."""
    skipped: dict[tuple[str, str], Skipped] = {}
    for name, scan in scans.items():
        fmt = readable()[name]
        if not isinstance(fmt, SupportsSkipped):
            continue
        for path in files[name]:
            if str(path) in scan.failed:
                continue
            # What is wrong with a file that others make unreadable was reported where they were located.
            with contextlib.suppress(CorruptFileError, DatasetNotFoundError, IncompatibleOptionsError):
                for skip in fmt.skipped(path, schema):
                    skipped.setdefault((skip.name, skip.reason), skip)
    return list(skipped.values())


def _gather(
    root: Path, chosen: FormatName, scans: Mapping[FormatName, Scan], wanted: set[str]
) -> tuple[list[TensorSpec], list[str]]:
    """The chosen format's tensors and extras, and what it lacks from the others."""
    notes: list[str] = []
    first = scans[chosen]
    extras = first.names() - wanted
    for scan in scans.values():
        # Without required names everything is wanted, so there are none of these.
        skipped = sorted(scan.errors.keys() - wanted)
        notes += [f"{name!r} is not part of the dataset and is skipped: {scan.errors[name]}" for name in skipped]
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
    found: dict[FormatName, dict[Path, str]] = {name: {} for name in readable()}
    for path in sorted(root.iterdir()):
        chosen = format_for(path)
        if chosen is not None and path.name[0] not in "._" and not path.is_dir():
            found[chosen.name][path] = stem_of(path, chosen.suffixes)
    for name, fmt in FORMATS.items():
        # Where the one file of a dataset is there, others with its suffix are something else.
        if fmt.one_file is not None and root / fmt.one_file in found[name]:
            found[name] = {root / fmt.one_file: found[name][root / fmt.one_file]}
    return found


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


def _nothing(root: Path, asked: FormatName | None, skipped: Sequence[Skipped]) -> str:
    kinds = Counter(path.suffix.lower() or "(no suffix)" for path in root.iterdir() if path.is_file())
    there = (
        ", ".join(f"{n} {suffix}" for suffix, n in sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))[:8])
        or "no files"
    )
    wanted = "tensors in any known format" if asked is None else f"{asked} tensors"
    known = ", ".join(s for name, f in readable().items() if asked in (None, name) for s in f.suffixes)
    splits = splits_of(root)
    if splits:
        there += f", and the splits of a datasets.DatasetDict; open one of them: {', '.join(str(root / s) for s in splits[:8])}"
    if (root / SHARDS).is_dir():
        there += ", and shards that were not committed; when all are written, run js.commit(path)"
    more = f" It holds what is no tensor: {_told(skipped)}." if skipped else ""
    return f"{root}: expected {wanted} ({known}), found {there}.{more}"
