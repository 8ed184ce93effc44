"""The files of a layout written, and what a generation says of them."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash

from jasper_store.errors import ConversionError
from jasper_store.files.atomic import remove, require_space
from jasper_store.files.fingerprint import FileFingerprint
from jasper_store.formats.part_columns import PartedTensor, PartFiles
from jasper_store.packing.block_file import BlockFiles
from jasper_store.packing.plan import INDEX_STEP
from jasper_store.packing.progress import Progress
from jasper_store.packing.report import PackReport
from jasper_store.packing.writer import ColumnWriter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from jasper_store.packing.layout import Layout
    from jasper_store.packing.plan import Options, Work

__all__ = ["part_files", "parted", "refuse_changes", "write_parts"]

_STEM: Final = "packed"


def write_parts(
    work: Work, hidden: Path, directory: Path, options: Options, room: int, began: float
) -> tuple[PackReport, dict[str, list[str]]]:
    """Write the files of a layout into a directory, continuing an earlier run of the same."""
    layout = work.layout
    total = sum(column_nbytes(layout).values())
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
        *(column_nbytes(layout), writer.max_error, steps.resumed),
    )
    return report, checksums


def _progress_of(directory: Path, identity: str) -> Progress | None:
    """What an earlier run has done, if it wrote the same."""
    if not directory.is_dir():
        return None
    found = Progress(directory, identity)
    found.close()
    return found if found.resumed else None


def _identity(work: Work) -> str:
    """A digest of all that decides the bytes that are written."""
    layout = work.layout
    facts = [json.dumps(work.config, sort_keys=True), repr(work.columns), layout.sizes, layout.headers]
    return xxhash.xxh3_128_hexdigest(repr(facts).encode())


def _paths(directory: Path, layout: Layout) -> list[Path]:
    if len(layout.sizes) == 1:
        return [directory / f"{_STEM}.safetensors"]
    return [directory / f"{_STEM}-{number:05d}.safetensors" for number in range(len(layout.sizes))]


def column_nbytes(layout: Layout) -> dict[str, int]:
    rows = layout.counts.sum(axis=1)
    return {column.name: int(rows[number]) * column.row_nbytes for number, column in enumerate(layout.columns)}


def _write_index(work: Work, paths: Sequence[Path]) -> dict[str, list[str]]:
    """Write headers and the tensors that are not in blocks; the checksum of each of these."""
    layout, found = work.layout, {}
    for path, header in zip(paths, layout.headers, strict=True):
        with path.open("r+b") as file:
            file.write(header)
    with paths[0].open("r+b") as file:
        for each, (tensor, offset) in zip(work.index, layout.index, strict=True):
            digest = xxhash.xxh3_128()
            file.seek(offset)
            for start in range(0, tensor.rows, INDEX_STEP):
                values = each.values(start, min(start + INDEX_STEP, tensor.rows)).to(tensor.dtype)
                raw = values.numpy().tobytes()
                digest.update(raw)
                file.write(raw)
            found[tensor.name] = [digest.hexdigest()]
    for path in paths:
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    return found


def part_files(root: Path, directory: Path, layout: Layout) -> PartFiles:
    """The files that were written, as a generation names them."""
    paths = _paths(directory, layout)
    prints = [FileFingerprint.of(path) for path in paths]
    return PartFiles(
        tuple(path.relative_to(root).as_posix() for path in paths),
        np.array([each.size for each in prints], np.int64),
        np.array([each.mtime_ns for each in prints], np.int64),
        tuple(each.sample for each in prints),
    )


def parted(work: Work, checksums: Mapping[str, list[str]], number: int, first_file: int) -> dict[str, PartedTensor]:
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


def refuse_changes(work: Work, target: Path) -> None:
    """Refuse to publish what was read from files that have changed meanwhile."""
    changed = work.packed.changes(target)
    if changed:
        raise ConversionError(
            f"{target}: expected the source to stay as it is while it is packed, found that it changed: {changed[0]}."
            " Nothing was published; run again",
            path=target,
        )
