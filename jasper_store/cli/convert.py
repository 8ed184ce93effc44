"""``jasper-store convert``: a dataset from one format to another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

import jasper_store as js
from jasper_store.cli.console import print_json, progress, results
from jasper_store.cli.options import Json

__all__ = ["convert", "follow_bytes"]


def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A dataset directory, or one file.")],
    dst: Annotated[
        Path | None,
        typer.Argument(metavar="[DST]", help="Directory to write to; by default beside the source's files."),
    ] = None,
    to: Annotated[
        str, typer.Option("--to", "--format", metavar="FORMAT", help="safetensors, npy, hdf5 or pt.")
    ] = "safetensors",
    compression: Annotated[
        str | None, typer.Option(help="HDF5 only: gzip or lzf; blosc, zstd or lz4 with the hdf5plugin extra.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Narrow embeddings to float16 or bfloat16; by default bits are kept.")
    ] = None,
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that hold other values.")] = False,
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
            compression=compression,
            dtype=dtype,
            overwrite=overwrite,
            progress=follow_bytes(bars, "converting"),
        )
    if json:
        print_json(report.to_dict())
    else:
        results().print(str(report), markup=False, soft_wrap=True)


def follow_bytes(bars: Progress, what: str) -> Callable[[str, int, int], None]:
    """A progress callback that moves one bar and names the tensor at work."""
    task = bars.add_task(what, total=None)

    def moved(tensor: str, done: int, total: int) -> None:
        bars.update(task, description=f"{what} {tensor}", completed=done, total=total)

    return moved
