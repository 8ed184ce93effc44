"""``pack_splits``: the samples of a dataset's splits, written as a packed dataset, or some of its columns anew."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import xxhash

from jasper_store.conversion.append import clean_parts
from jasper_store.conversion.generations import next_directory, publish as publish_generation, retired
from jasper_store.conversion.narrow import parse_dtype
from jasper_store.conversion.staging import check_target, publish
from jasper_store.errors import ConversionError, IncompatibleOptionsError, UnknownNameError
from jasper_store.files.atomic import (
    make_directory,
    map_os_errors,
    recover_directory,
    remove,
    require_space,
    sync_directory,
    temporary_name,
    untrack,
    write_bytes,
)
from jasper_store.files.fingerprint import FileFingerprint
from jasper_store.files.lock import LOCK_NAME, exclusive
from jasper_store.formats.generation import Generation, PartedTensor, PartFiles
from jasper_store.memory import budget
from jasper_store.packing.block_file import BlockFiles
from jasper_store.packing.columns import ORIGIN, Column, Names, columns_of, declaration_of, packed_fields
from jasper_store.packing.layout import IndexTensor, Layout, block_shape, lay_out
from jasper_store.packing.progress import Progress
from jasper_store.packing.report import PackReport
from jasper_store.packing.split_rows import SplitRows
from jasper_store.packing.writer import Blocks, ColumnWriter
from jasper_store.samples.declaration import CONFIG_KEY, Choice
from jasper_store.samples.expression import closest
from jasper_store.samples.opened import CONFIG_NAME, load_config, packed_at
from jasper_store.samples.packed import PACKED_KEY, Packed
from jasper_store.store.manifest import Manifest, SourceFile
from jasper_store.store.manifest_file import read, write

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from jasper_store.samples.dataset import Dataset

__all__ = ["pack_splits"]

_STEM: Final = "packed"
_SHARE: Final = 0.5
"""Share of the free memory that packing takes where no limit is given."""
_LEAST_ROOM: Final = 8 << 20
_INDEX_STEP: Final = 1 << 18
_INT32_END: Final = 1 << 31


@dataclass(frozen=True)
class _Index:
    """A tensor that is not in blocks, and how its values are made.

    Attributes:
        tensor: what it is.
        values: its values from a row up to another one.
    """

    tensor: IndexTensor
    values: Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class _Work:
    """What is to be written.

    Attributes:
        splits: the samples of each split, in the order of their blocks.
        names: name of each split in the packed dataset to the tensor that lists its rows; none without splits.
        packed: what the configuration says.
        columns: the columns that are written.
        layout: where they lie.
        index: the tensors that are not in blocks.
        config: the whole configuration.
    """

    splits: list[Blocks]
    names: Mapping[str, str]
    packed: Packed
    columns: list[Column]
    layout: Layout
    index: list[_Index]
    config: Mapping[str, Any]


def pack_splits(
    sources: Mapping[str, Dataset],
    dst: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 42,
    memory_limit: int | str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    overwrite: bool = False,
    columns: Sequence[str] | None = None,
    kind: str = "dataset",
    config: Mapping[str, Any] | None = None,
) -> PackReport:
    """Write samples in the order of a fixed permutation, what each reads side by side.

    Args:
        sources: the splits of one dataset, open on the host, by name; ``""`` alone for one without splits.
        dst: directory to make.
        fields: fields to pack; all by default.
        dtype: floating dtype that floating fields of more than one number a sample are narrowed to.
        seed: decides the permutation.
        memory_limit: bytes of memory to take for rows; by default half of what is free.
        progress: called as ``progress(tensor, done_bytes, total_bytes)``.
        overwrite: replace a dataset that is there.
        columns: fields of the packed dataset at ``dst`` to write anew; all others stay as they are.
        kind: what opens it, see :class:`~jasper_store.samples.packed.Packed`.
        config: what else ``config.json`` says.

    Raises:
        ConversionError: the target is there, has another writer, cannot be written, or has no room; the source changed
            meanwhile.
        UnknownNameError, IncompatibleOptionsError: options.
        IntegrityError: ``dtype`` would make a finite value infinite.
        DatasetNotFoundError, CorruptFileError: the source, or the packed dataset whose columns are written anew.
    """
    began = time.perf_counter()
    target = Path(os.path.abspath(dst))  # noqa: PTH100 - links in it are kept
    options = _Options(target, fields, parse_dtype(dtype), seed, kind, config or {}, progress, overwrite)
    for name, dataset in sources.items():
        if dataset.device.type != "cpu":
            raise IncompatibleOptionsError(
                f"packing reads from the host, and {name or 'the dataset'} is on {dataset.device}; open it with device=None"
            )
    measured = budget.measure(memory_limit).nbytes
    room = max(int(measured * (_SHARE if memory_limit is None else 1)), _LEAST_ROOM)
    if columns is None:
        return _pack(sources, options, room, began)
    return _repack(sources, options, columns, room, began)


@dataclass(frozen=True)
class _Options:
    """What the caller asked for."""

    target: Path
    fields: Sequence[str] | None
    dtype: torch.dtype | None
    seed: int
    kind: str
    config: Mapping[str, Any]
    progress: Callable[[str, int, int], None] | None
    overwrite: bool


# --- a whole dataset --------------------------------------------------------------------------------------------------


def _pack(sources: Mapping[str, Dataset], options: _Options, room: int, began: float) -> PackReport:
    target = options.target
    work = _plan(sources, options)
    parent = target.parent
    with map_os_errors(target):
        make_directory(parent)
    with contextlib.ExitStack() as stack:
        stack.enter_context(exclusive(parent / f".{target.name}{LOCK_NAME}", f"packing into {target}"))
        with map_os_errors(target):
            recover_directory(target)
            check_target(target, overwrite=options.overwrite)
            hidden = parent / f".{target.name}.packing"
            try:
                report = _pack_hidden(work, hidden, options, room, began)
            except Exception:
                # A kill, also by the keyboard, leaves it behind for the next run; what failed begins anew.
                remove(hidden)
                raise
            publish(hidden, target, overwrite=options.overwrite)
    return replace(report, path=target, seconds=time.perf_counter() - began)


def _pack_hidden(work: _Work, hidden: Path, options: _Options, room: int, began: float) -> PackReport:
    """Write the whole dataset into a hidden directory."""
    directory = next_directory(hidden, 1)
    report, checksums = _write_parts(work, hidden, directory, options, room, began)
    _refuse_changes(work, options.target)
    _write_generation(work, hidden, directory, checksums)
    write_bytes(hidden / CONFIG_NAME, json.dumps(work.config, indent=1).encode())
    sync_directory(directory)
    sync_directory(hidden)
    return report


def _plan(sources: Mapping[str, Dataset], options: _Options) -> _Work:
    """Decide what is written where; reads ragged lengths, and no other data."""
    first = next(iter(sources.values()))
    declaration, store = first.graph.declaration, first.store
    fields = packed_fields(declaration, options.fields)
    taken = [*fields, ORIGIN, *(f"{name}.{part}" for name in fields for part in ("values", "offsets"))]
    names = Names(taken)
    columns = columns_of(declaration, store, first.split, fields, options.dtype, names)
    listed = {}
    if first.split is not None:
        listed = {name: names.take(declaration.splits[name], f"{name}_rows") for name in sources}
    samples = sum(len(dataset) for dataset in sources.values())
    splits = {name: SplitRows(dataset, options.seed) for name, dataset in sources.items()}
    lengths = {
        column.field: np.concatenate([_lengths(each, column.field) for each in splits.values()])
        for column in columns
        if column.ragged
    }
    mean = {name: float(found.mean()) if len(found) else 0.0 for name, found in lengths.items()}
    sample_nbytes = sum(column.row_nbytes * mean.get(column.field, 1.0) for column in columns)
    shape = block_shape(samples, round(sample_nbytes))
    blocks = _blocks(splits, shape.block)
    counts = _counts(columns, blocks, shape.block, lengths)
    index, key = _index(splits, listed, columns, lengths, declaration.fields, names)
    layout = lay_out(columns, counts, [each.tensor for each in index])
    files = tuple(_source_files(sources, options.target))
    packed = Packed(
        *(options.kind, shape.block, shape.window, options.seed),
        None if options.dtype is None else str(options.dtype).removeprefix("torch."),
        ORIGIN,
        _relative(store.path, options.target),
        {name: dataset.fingerprint() for name, dataset in sources.items()},
        files,
        {column.name: column.of for column in columns},
    )
    made = declaration_of(declaration, fields, columns, listed, key, first.graph)
    config = {**options.config, CONFIG_KEY: made.to_config(), PACKED_KEY: packed.to_config()}
    return _Work(blocks, listed, packed, columns, layout, index, config)


def _blocks(splits: Mapping[str, SplitRows], block: int) -> list[Blocks]:
    found, first = [], 0
    for each in splits.values():
        count = -(-each.samples // block)
        found.append(Blocks(each, first, count))
        first += count
    return found


def _counts(
    columns: Sequence[Column], splits: Sequence[Blocks], block: int, lengths: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Rows of each column in each block."""
    samples = np.concatenate(
        [
            np.full(each.n_blocks, block, np.int64)
            - _missing(each, block) * (np.arange(each.n_blocks) == each.n_blocks - 1)
            for each in splits
        ]
    )
    ends = np.concatenate([[0], samples.cumsum()])
    counts = np.tile(samples, (len(columns), 1))
    for number, column in enumerate(columns):
        if column.ragged:
            sums = np.concatenate([[0], lengths[column.field].cumsum()])
            counts[number] = np.diff(sums[ends])
    return counts


def _missing(each: Blocks, block: int) -> int:
    return each.n_blocks * block - each.split.samples


def _lengths(split: SplitRows, field: str) -> np.ndarray:
    """Rows of each packed sample of a ragged field, int64 [samples]."""
    found = [np.zeros(0, np.int64)]
    for start in range(0, split.samples, _INDEX_STEP):
        offsets = split.field(field, start, min(start + _INDEX_STEP, split.samples)).offsets
        assert offsets is not None
        found.append(offsets.diff().numpy())
    return np.concatenate(found)


def _index(
    splits: Mapping[str, SplitRows],
    listed: Mapping[str, str],
    columns: Sequence[Column],
    lengths: Mapping[str, np.ndarray],
    fields: Mapping[str, Any],
    names: Names,
) -> tuple[list[_Index], str]:
    """The tensors that are not in blocks; and the name of the one that variants are drawn by."""
    total = sum(each.samples for each in splits.values())
    number = torch.int32 if total < _INT32_END else torch.int64
    found, first = [], 0
    for name, each in splits.items():
        if name in listed:
            tensor = IndexTensor(listed[name], number, each.samples)
            found.append(_Index(tensor, partial(_arange, first)))
        first += each.samples
    origins = IndexTensor(ORIGIN, torch.int64, total)
    found.append(_Index(origins, lambda start, stop: _across(splits, SplitRows.origins, start, stop)))
    key = ORIGIN
    choice = next((name for name in dict.fromkeys(c.field for c in columns) if isinstance(fields[name], Choice)), None)
    if choice is not None and not (fields[choice].rows == "row" and fields[choice].key is None):
        key = names.take(f"{choice}_key", f"{choice}_key")

        def numbers(split: SplitRows, start: int, stop: int) -> torch.Tensor:
            return split.numbers(choice, start, stop)

        drawn = IndexTensor(key, torch.int64, total)
        found.append(_Index(drawn, lambda start, stop: _across(splits, numbers, start, stop)))
    for name, counts in lengths.items():
        ends = torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int64))
        tensor = IndexTensor(f"{name}.offsets", torch.int64, len(ends))
        found.append(_Index(tensor, partial(_part_of, ends)))
    return found, key


def _arange(first: int, start: int, stop: int) -> torch.Tensor:
    return torch.arange(first + start, first + stop)


def _part_of(values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return values[start:stop]


def _across(
    splits: Mapping[str, SplitRows], make: Callable[[SplitRows, int, int], torch.Tensor], start: int, stop: int
) -> torch.Tensor:
    """Values of packed samples ``start`` to ``stop``, counted over all splits."""
    found, first = [torch.empty(0, dtype=torch.int64)], 0
    for each in splits.values():
        low, high = max(start - first, 0), min(stop - first, each.samples)
        if low < high:
            found.append(make(each, low, high))
        first += each.samples
    return torch.cat(found)


# --- writing ----------------------------------------------------------------------------------------------------------


def _write_parts(
    work: _Work, hidden: Path, directory: Path, options: _Options, room: int, began: float
) -> tuple[PackReport, dict[str, list[str]]]:
    """Write the files of a layout into a directory, continuing an earlier run of the same."""
    layout = work.layout
    total = sum(_column_nbytes(layout).values())
    identity = _identity(work)
    if _progress_of(directory, identity) is None and hidden.exists():
        remove(hidden)
    directory.mkdir(parents=True, exist_ok=True)
    paths = _paths(directory, layout)
    there = sum(
        path.stat().st_blocks * 512 if hasattr(os.stat_result, "st_blocks") else path.stat().st_size
        for path in paths
        if path.exists()
    )
    require_space(directory, max(sum(layout.sizes) - there, 0), what="packing")
    done = 0

    def advance(name: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if options.progress is not None:
            options.progress(name, done, total)

    steps = Progress(directory, identity)
    try:
        files = BlockFiles(paths, layout.sizes)
        try:
            writer = ColumnWriter(layout, work.splits, work.packed.block, files, room, advance)
            writer.run(steps)
        finally:
            files.close()
        checksums = writer.checksums | _write_index(work, paths)
    except BaseException:
        steps.close()
        raise
    steps.remove()
    samples = {name: each.split.samples for name, each in zip(work.packed.fingerprints, work.splits, strict=True)}
    report = PackReport(
        *(options.target, 1, samples, work.packed.block, work.packed.window),
        *(total / max(sum(samples.values()), 1), sum(layout.sizes), writer.nbytes_read, time.perf_counter() - began),
        *(_column_nbytes(layout), writer.max_error, steps.resumed),
    )
    return report, checksums


def _progress_of(directory: Path, identity: str) -> Progress | None:
    """What an earlier run has done, if it wrote the same."""
    if not directory.is_dir():
        return None
    found = Progress(directory, identity)
    found.close()
    return found if found.resumed else None


def _identity(work: _Work) -> str:
    """A digest of all that decides the bytes that are written."""
    layout = work.layout
    facts = [json.dumps(work.config, sort_keys=True), repr(work.columns), layout.sizes, layout.headers]
    return xxhash.xxh3_128_hexdigest(repr(facts).encode())


def _paths(directory: Path, layout: Layout) -> list[Path]:
    if len(layout.sizes) == 1:
        return [directory / f"{_STEM}.safetensors"]
    return [directory / f"{_STEM}-{number:05d}.safetensors" for number in range(len(layout.sizes))]


def _column_nbytes(layout: Layout) -> dict[str, int]:
    rows = layout.counts.sum(axis=1)
    return {column.name: int(rows[number]) * column.row_nbytes for number, column in enumerate(layout.columns)}


def _write_index(work: _Work, paths: Sequence[Path]) -> dict[str, list[str]]:
    """Write headers and the tensors that are not in blocks; the checksum of each of these."""
    layout, found = work.layout, {}
    for path, header in zip(paths, layout.headers, strict=True):
        with path.open("r+b") as file:
            file.write(header)
    with paths[0].open("r+b") as file:
        for each, (tensor, offset) in zip(work.index, layout.index, strict=True):
            digest = xxhash.xxh3_128()
            file.seek(offset)
            for start in range(0, tensor.rows, _INDEX_STEP):
                values = each.values(start, min(start + _INDEX_STEP, tensor.rows)).to(tensor.dtype)
                raw = values.numpy().tobytes()
                digest.update(raw)
                file.write(raw)
            found[tensor.name] = [digest.hexdigest()]
    for path in paths:
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    return found


def _write_generation(work: _Work, root: Path, directory: Path, checksums: Mapping[str, list[str]]) -> None:
    """Write the manifest of a new dataset."""
    generation = Generation(1, "safetensors", _part_files(root, directory, work.layout))
    tensors = _parted(work, checksums, 1, 0)
    write(Manifest(root, {}, {}, replace(generation, tensors=tensors), {}))


def _part_files(root: Path, directory: Path, layout: Layout) -> PartFiles:
    paths = _paths(directory, layout)
    prints = [FileFingerprint.of(path) for path in paths]
    return PartFiles(
        tuple(path.relative_to(root).as_posix() for path in paths),
        np.array([each.size for each in prints], np.int64),
        np.array([each.mtime_ns for each in prints], np.int64),
        tuple(each.sample for each in prints),
    )


def _parted(work: _Work, checksums: Mapping[str, list[str]], number: int, first_file: int) -> dict[str, PartedTensor]:
    """What a generation says of the columns and the index tensors."""
    layout, found = work.layout, {}
    for at, column in enumerate(layout.columns):
        blocks = layout.n_blocks
        if not blocks:  # no samples at all: a part without rows
            found[column.name] = _one_part(column.dtype, column.row_shape, 0, 0, None, number, first_file)
            continue
        found[column.name] = PartedTensor(
            *(column.dtype, column.row_shape, layout.file_of + first_file, layout.offsets[at], layout.counts[at]),
            *(np.full(blocks, number, np.int64), np.zeros(blocks, np.int64), tuple(checksums[column.name])),
        )
    for tensor, offset in layout.index:
        found[tensor.name] = _one_part(
            tensor.dtype, (), tensor.rows, offset, checksums[tensor.name][0], number, first_file
        )
    return found


def _one_part(
    dtype: torch.dtype,
    row_shape: tuple[int, ...],
    rows: int,
    offset: int,
    checksum: str | None,
    number: int,
    file: int,
) -> PartedTensor:
    def one(value: int) -> np.ndarray:
        return np.array([value], np.int64)

    return PartedTensor(dtype, row_shape, one(file), one(offset), one(rows), one(number), one(0), (checksum,))


# --- some columns anew ------------------------------------------------------------------------------------------------


def _repack(
    sources: Mapping[str, Dataset], options: _Options, columns: Sequence[str], room: int, began: float
) -> PackReport:
    """Write some fields of a packed dataset anew, as parts of a further file, and publish them in one step."""
    root = options.target
    packed = packed_at(root)
    manifest = read(root)
    if packed is None or manifest is None or manifest.generation is None:
        raise ConversionError(
            f"{root}: expected a packed dataset whose columns are written anew, found none", path=root
        )
    known = sorted({of.partition(":")[0] for of in packed.columns.values()})
    for name in columns:
        if name not in known:
            raise UnknownNameError(f"columns: {root} has no packed field {name!r}; {closest(name, known)}")
    dtype = parse_dtype(packed.dtype)
    # The fields in the order of the first time, so that names come out the same.
    work = _plan(sources, replace(options, fields=_fields_of(root), dtype=dtype, seed=packed.seed))
    _require_same(packed, work, manifest.generation, root)
    wanted = [column for column in work.columns if column.field in columns]
    numbers = [number for number, column in enumerate(work.layout.columns) if column in wanted]
    layout = lay_out([work.layout.columns[n] for n in numbers], work.layout.counts[numbers], [])
    work = replace(work, columns=wanted, layout=layout, index=[])
    with map_os_errors(root), exclusive(root / LOCK_NAME, f"packing into {root}"):
        clean_parts(root)
        old = manifest.generation
        directory = next_directory(root, old.number + 1)
        hidden = temporary_name(directory, "staging")
        try:
            report, checksums = _write_parts(work, hidden, hidden, options, room, began)
            _refuse_changes(work, root)
            sync_directory(hidden)
            hidden.rename(directory)
        finally:
            remove(hidden)
        untrack(hidden)
        sync_directory(root)
        publish_generation(root, old, _extended(work, old, root, directory, checksums))
        config = load_config(root / CONFIG_NAME)
        config = {
            **config,
            PACKED_KEY: replace(packed, files=work.packed.files, fingerprints=work.packed.fingerprints).to_config(),
        }
        write_bytes(root / CONFIG_NAME, json.dumps(config, indent=1).encode())
    return replace(report, generation=old.number + 1, seconds=time.perf_counter() - began)


def _extended(
    work: _Work, old: Generation, root: Path, directory: Path, checksums: Mapping[str, list[str]]
) -> Generation:
    new, number = _part_files(root, directory, work.layout), old.number + 1
    files = PartFiles(
        (*old.files.names, *new.names),
        np.concatenate([old.files.sizes, new.sizes]),
        np.concatenate([old.files.mtimes, new.mtimes]),
        (*old.files.samples, *new.samples),
    )
    tensors = dict(old.tensors)
    for name, tensor in _parted(work, checksums, number, len(old.files.names)).items():
        before = retired(tensors[name], number)
        tensors[name] = replace(
            before,
            file_of=np.concatenate([before.file_of, tensor.file_of]),
            offsets=np.concatenate([before.offsets, tensor.offsets]),
            rows=np.concatenate([before.rows, tensor.rows]),
            since=np.concatenate([before.since, tensor.since]),
            until=np.concatenate([before.until, tensor.until]),
            checksums=(*before.checksums, *tensor.checksums),
        )
    return replace(old, number=number, files=files, tensors=tensors)


def _fields_of(root: Path) -> list[str]:
    """The fields of a packed dataset that are served."""
    return [name for name in load_config(root / CONFIG_NAME)[CONFIG_KEY]["fields"] if not name.startswith("_")]


def _require_same(packed: Packed, work: _Work, generation: Generation, root: Path) -> None:
    """Refuse a source whose samples are not those that were packed, but for the values of the columns."""
    for column in work.columns:
        there = generation.tensors.get(column.name)
        if there is None or (there.dtype, there.row_shape) != (column.dtype, column.row_shape) or column.ragged:
            found = "none" if there is None else f"{there.dtype} {list(there.row_shape)}"
            if column.ragged:
                found = "rows whose number differs from sample to sample"
            raise ConversionError(
                f"{root}: expected {column.name} of {column.dtype} {list(column.row_shape)} as the source has it, found"
                f" {found}; pack the whole dataset (overwrite)",
                path=root,
            )
    samples = {name: each.split.samples for name, each in zip(work.packed.fingerprints, work.splits, strict=True)}
    rows = sum(samples.values())
    first = generation.tensors[ORIGIN]
    if (packed.block, packed.kind) != (work.packed.block, work.packed.kind) or first.n_rows(generation.number) != rows:
        raise ConversionError(
            f"{root}: expected a source with the samples that were packed, found {rows:,} samples where"
            f" {first.n_rows(generation.number):,} are packed, or others; pack the whole dataset (overwrite)",
            path=root,
        )
    digest = xxhash.xxh3_128()
    origins = next(each for each in work.index if each.tensor.name == ORIGIN)
    for start in range(0, rows, _INDEX_STEP):
        digest.update(origins.values(start, min(start + _INDEX_STEP, rows)).numpy().tobytes())
    if first.checksums[int(first.visible(generation.number)[0])] != digest.hexdigest():
        raise ConversionError(
            f"{root}: expected a source whose splits list the rows that were packed, found others; pack the whole dataset"
            " (overwrite)",
            path=root,
        )


# --- the source -------------------------------------------------------------------------------------------------------


def _source_files(sources: Mapping[str, Dataset], target: Path) -> list[SourceFile]:
    """The files that samples are read from, as they are now."""
    paths: dict[Path, None] = {}
    for dataset in sources.values():
        for node in dataset.graph.nodes:
            for name in node.tensors:
                paths |= dict.fromkeys(dataset.store[name].spec.paths)
    return [SourceFile(_relative(path, target), FileFingerprint.of(path)) for path in paths]


def _relative(path: Path, target: Path) -> str:
    """A path as seen from the packed dataset's directory."""
    try:
        return Path(os.path.relpath(os.path.realpath(path), os.path.realpath(target))).as_posix()
    except ValueError:  # another drive
        return Path(os.path.realpath(path)).as_posix()


def _refuse_changes(work: _Work, target: Path) -> None:
    """Refuse to publish what was read from files that have changed meanwhile."""
    changed = work.packed.changes(target)
    if changed:
        raise ConversionError(
            f"{target}: expected the source to stay as it is while it is packed, found that it changed: {changed[0]}."
            " Nothing was published; run again",
            path=target,
        )
