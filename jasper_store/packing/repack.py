"""Some columns of a packed dataset written anew, as parts of a further file, and published in one step."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from jasper_store.conversion.append import clean_parts
from jasper_store.conversion.generations import next_directory, publish, retired
from jasper_store.conversion.narrow import parse_dtype
from jasper_store.errors import ConversionError, UnknownNameError
from jasper_store.files.atomic import map_os_errors, remove, sync_directory, temporary_name, untrack, write_bytes
from jasper_store.files.lock import LOCK_NAME, exclusive
from jasper_store.formats.generation import Generation
from jasper_store.formats.part_columns import PartFiles
from jasper_store.packing.columns import ORIGIN
from jasper_store.packing.layout import lay_out
from jasper_store.packing.parts import part_files, parted, refuse_changes, write_parts
from jasper_store.packing.plan import INDEX_STEP, plan
from jasper_store.samples.declaration import CONFIG_KEY
from jasper_store.samples.expression import closest
from jasper_store.samples.opened import CONFIG_NAME, load_config, packed_at
from jasper_store.samples.packed import PACKED_KEY, Packed
from jasper_store.store.manifest_file import read

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from jasper_store.packing.plan import Options, Work
    from jasper_store.packing.report import PackReport
    from jasper_store.samples.dataset import Dataset

__all__ = ["repack"]


def repack(
    sources: Mapping[str, Dataset], options: Options, columns: Sequence[str], room: int, began: float
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
    work = plan(sources, replace(options, fields=_fields_of(root), dtype=dtype, seed=packed.seed))
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
            report, checksums = write_parts(work, hidden, hidden, options, room, began)
            refuse_changes(work, root)
            sync_directory(hidden)
            hidden.rename(directory)
        finally:
            remove(hidden)
        untrack(hidden)
        sync_directory(root)
        config = {**load_config(root / CONFIG_NAME), PACKED_KEY: packed.followed_by(work.packed, old.number + 1)}
        write_bytes(root / CONFIG_NAME, json.dumps(config, indent=1).encode())
        publish(root, old, _extended(work, old, root, directory, checksums))
    return replace(report, generation=old.number + 1, seconds=time.perf_counter() - began)


def _extended(
    work: Work, old: Generation, root: Path, directory: Path, checksums: Mapping[str, list[str]]
) -> Generation:
    new, number = part_files(root, directory, work.layout), old.number + 1
    files = PartFiles(
        (*old.files.names, *new.names),
        np.concatenate([old.files.sizes, new.sizes]),
        np.concatenate([old.files.mtimes, new.mtimes]),
        (*old.files.samples, *new.samples),
    )
    tensors = dict(old.tensors)
    for name, tensor in parted(work, checksums, number, len(old.files.names)).items():
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


def _require_same(packed: Packed, work: Work, generation: Generation, root: Path) -> None:
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
    for start in range(0, rows, INDEX_STEP):
        digest.update(origins.values(start, min(start + INDEX_STEP, rows)).numpy().tobytes())
    if first.checksums[int(first.visible(generation.number)[0])] != digest.hexdigest():
        raise ConversionError(
            f"{root}: expected a source whose splits list the rows that were packed, found others; pack the whole dataset"
            " (overwrite)",
            path=root,
        )
