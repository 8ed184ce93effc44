"""``jasper-store inspect``: what a dataset holds, without reading its data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from jasper_store.cli.console import bar, print_json, results, table
from jasper_store.cli.errors import AlreadyShown, error_entry
from jasper_store.cli.options import Directory, FormatOption, Json
from jasper_store.memory.sizes import format_bytes

if TYPE_CHECKING:
    from jasper_store.formats.base import TensorSpec
    from jasper_store.formats.registry import Located
    from jasper_store.report.sample import SampleView

__all__ = ["inspect"]


@dataclass(frozen=True)
class _Row:
    spec: TensorSpec
    resident: int | None

    @property
    def lies(self) -> str:
        from jasper_store.formats.base import Chunked, Extent, Parts, Streamed

        location = self.spec.location
        if isinstance(location, Extent):
            return f"{location.path.name} at {location.offset}"
        if isinstance(location, Parts):
            files = f"{len(location.files):,} files from " if len(location.files) > 1 else ""
            return f"{len(location):,} parts in {files}{location.path.name}"
        if isinstance(location, Chunked):
            chunks = f"chunks {list(location.chunk_shape)}" if location.chunk_shape else "external"
            return f"{location.path.name}:{location.key}, {chunks} {location.filters}".rstrip()
        if isinstance(location, Streamed):
            more = f" and {len(location.files) - 1:,} more" if len(location.files) > 1 else ""
            return f"{location.path.name}:{location.key}{more}, compressed"
        return f"{location.path.name}, with its header"

    def to_dict(self) -> dict[str, Any]:
        from jasper_store.formats.base import Extent, Parts

        return {
            "name": self.spec.name,
            "dtype": _dtype(self.spec),
            "shape": list(self.spec.shape),
            "nbytes": self.spec.nbytes,
            "file": str(self.spec.path),
            "lies": self.lies,
            "files": [str(path) for path in self.spec.paths],
            "mappable": isinstance(self.spec.location, (Extent, Parts)),
            "resident_nbytes": self.resident,
        }


def inspect(path: Directory, storage_format: FormatOption = "auto", *, json: Json = False) -> None:
    """Show tensors, sizes, dtypes, where they lie, and how much of each is in memory now.

    Reads headers only, whatever the size of the data. After the tensors come the fields of a sample, if the directory
    is a dataset; if its declaration does not fit the tensors, or tensors are missing, the exit code says so.

    Examples:
      jasper-store inspect data/
      jasper-store inspect data/dataset.h5 --json | jq '.tensors[].name'
    """
    from jasper_store.cli.known import manifest_says, samples_of
    from jasper_store.formats.registry import locate
    from jasper_store.jasper.recognise import known_at
    from jasper_store.store.tensors import resident_nbytes

    located = locate(path, storage_format, known_at(path).schema)
    rows = [_Row(spec, resident_nbytes(spec)) for spec in located.specs]
    facts = _facts(path)
    warnings = [*located.warnings, *manifest_says(path, located)]
    samples, problem = samples_of(path, located.specs)
    if json:
        print_json(
            {
                "path": str(path),
                "format": located.format,
                "nbytes": sum(row.spec.nbytes for row in rows),
                "config": facts,
                "tensors": [row.to_dict() for row in rows],
                "samples": None if samples is None else samples.to_dict(),
                "skipped": [
                    {"name": skip.name, "file": str(skip.path), "reason": skip.reason} for skip in located.skipped
                ],
                "warnings": warnings,
                "error": None if problem is None else error_entry(problem),
            }
        )
    else:
        _show(path, located, rows, facts, warnings)
        if samples is not None:
            _show_fields(samples)
    if problem is not None:
        raise AlreadyShown(problem) if json else problem


def _dtype(spec: TensorSpec) -> str:
    return str(spec.dtype).removeprefix("torch.")


def _facts(path: Path) -> dict[str, Any]:
    """What the dataset says of itself; nothing for a directory that is no JASPER dataset."""
    from jasper_store.jasper.config import read_config
    from jasper_store.jasper.recognise import is_jasper
    from jasper_store.samples.opened import CONFIG_NAME, load_config

    if not (path / CONFIG_NAME).is_file():
        return {}
    if not is_jasper(path):
        return dict(load_config(path / CONFIG_NAME))
    config = read_config(path)
    return {
        **config.values,
        "curriculum_by_epoch": {epoch: config.curriculum.probabilities(epoch) for epoch in (0, 10, 20, 30, 40)},
    }


def _show(path: Path, located: Located, rows: list[_Row], facts: dict[str, Any], warnings: list[str]) -> None:
    out = results()
    files = len({path for row in rows for path in row.spec.paths})
    size = format_bytes(sum(row.spec.nbytes for row in rows))
    cells = [
        (
            row.spec.name,
            _dtype(row.spec),
            "x".join(map(str, row.spec.shape)) or "scalar",
            format_bytes(row.spec.nbytes),
            _residency_cell(row),
            escape(row.lies),
        )
        for row in rows
    ]
    title = f"{path}: {located.format}, {len(rows)} tensors in {files} files, {size}"
    out.print(
        table(title, ("tensor", "dtype", "shape", "size", "in memory", "lies in"), cells, right=("shape", "size"))
    )
    known = ("dataset_name", "embedding_dim", "n_neg", "n_clusters", "split_sizes")
    if facts:
        out.print(", ".join(f"{key} {facts[key]}" for key in known if key in facts), markup=False)
    for skip in located.skipped:
        out.print(f"skipped: {skip.name} in {skip.path.name}: {skip.reason}", markup=False, soft_wrap=True)
    for warning in warnings:
        out.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)


def _show_fields(found: SampleView) -> None:
    """The fields of a sample, as ``Dataset`` would serve them."""
    counts = ", ".join(f"{split} {count:,}" for split, count in found.splits.items()) or f"{found.length:,}"
    how = "" if found.declared else "; nothing is declared, so every tensor of the common number of rows is one"
    cells = [
        (escape(field.name), field.dtype, escape(field.shape_text), escape(field.expression)) for field in found.fields
    ]
    count = f"{len(found.fields)} field{'s' * (len(found.fields) != 1)}"
    title = f"samples: {counts}; {count}, {format_bytes(found.nbytes)} each{how}"
    results().print(table(title, ("field", "dtype", "shape per sample", "read by"), cells))


def _residency_cell(row: _Row) -> str:
    if row.resident is None:
        return "-"
    share = row.resident / row.spec.nbytes if row.spec.nbytes else 1.0
    return f"{bar(share)} {share:4.0%}"
