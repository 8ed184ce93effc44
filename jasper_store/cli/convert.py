"""``jasper-store convert``: a dataset from one format to another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import Progress

import jasper_store as js
from jasper_store.cli.console import print_json, progress, results, table
from jasper_store.cli.options import Json
from jasper_store.memory.sizes import format_bytes

if TYPE_CHECKING:
    from jasper_store.conversion.report import ConversionReport, TensorReport

__all__ = ["convert", "follow_bytes"]


def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A dataset directory, one file, or hf://owner/name.")],
    dst: Annotated[
        Path | None,
        typer.Argument(metavar="[DST]", help="Directory to write to; by default beside the source's files."),
    ] = None,
    to: Annotated[
        str, typer.Option("--to", "--format", metavar="FORMAT", help="safetensors, npy, hdf5 or pt.")
    ] = "safetensors",
    source_format: Annotated[
        str,
        typer.Option("--from", metavar="FORMAT", help="Format to read, where the source has several or none shows."),
    ] = "auto",
    compression: Annotated[
        str | None, typer.Option(help="HDF5 only: gzip or lzf; blosc, zstd or lz4 with the hdf5plugin extra.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Narrow embeddings to float16 or bfloat16; by default bits are kept.")
    ] = None,
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that hold other values.")] = False,
    checksums: Annotated[bool, typer.Option("--checksums", help="Show the checksum of each tensor, too.")] = False,
    json: Json = False,
) -> None:
    """Convert a dataset to another format: file by file, atomically, in bounded memory, proven by checksums.

    Examples:
      jasper-store convert data/ data-st/
      jasper-store convert data/ --to hdf5 --compression gzip
      jasper-store convert data/ data-half/ --dtype bfloat16
    """
    with progress() as bars:
        report = js.convert(
            src,
            dst,
            format=to,
            source_format=source_format,
            compression=compression,
            dtype=dtype,
            overwrite=overwrite,
            progress=follow_bytes(bars, "converting"),
        )
    if json:
        print_json(report.to_dict())
    else:
        _show(report, checksums=checksums)


def _show(report: ConversionReport, *, checksums: bool) -> None:
    columns = ["tensor", "dtype", "shape", "in", "out", "seconds", "largest error"]
    cells = [_cells(row) for row in report.tensors]
    if checksums:
        columns.append("xxh3-128")
        cells = [(*row, tensor.checksum) for row, tensor in zip(cells, report.tensors, strict=True)]
    out = results()
    out.print(table("Tensors written", columns, cells, right=columns[2:7]))
    out.print(report.summary(), markup=False, soft_wrap=True)


def _cells(tensor: TensorReport) -> tuple[str, ...]:
    return (
        escape(tensor.name),
        tensor.dtype if tensor.dtype == tensor.written_as else f"{tensor.dtype} -> {tensor.written_as}",
        "x".join(map(str, tensor.shape)) or "scalar",
        format_bytes(tensor.bytes_in),
        format_bytes(tensor.bytes_out),
        "skipped" if tensor.skipped else f"{tensor.seconds:.2f}",
        "" if tensor.max_error is None else f"{tensor.max_error:.3g}",
    )


def follow_bytes(bars: Progress, what: str) -> Callable[[str, int, int], None]:
    """A progress callback that moves one bar and names the tensor at work."""
    task = bars.add_task(what, total=None)

    def moved(tensor: str, done: int, total: int) -> None:
        bars.update(task, description=f"{what} {tensor}", completed=done, total=total)

    return moved
