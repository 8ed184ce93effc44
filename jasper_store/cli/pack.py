"""``jasper-store pack``: samples in the order in which they are served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import jasper_store as js
from jasper_store.cli.console import print_json, progress, results
from jasper_store.cli.convert import follow_bytes
from jasper_store.cli.options import Directory, Json, MemoryLimit

__all__ = ["pack"]


def pack(
    path: Directory,
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Directory to make.")],
    fields: Annotated[
        str | None, typer.Option(help="Fields to pack, with commas between them; all by default.")
    ] = None,
    splits: Annotated[
        str | None, typer.Option(help="Splits to pack, with commas between them; all by default.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Narrow embeddings to float16 or bfloat16.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the order in which samples lie.")] = 42,
    memory_limit: MemoryLimit = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Fields of the packed dataset at DST to write anew, such as new negatives; the rest stays."),
    ] = None,
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset that is there.")] = False,
    json: Json = False,
) -> None:
    """Write what each sample reads side by side, so that data larger than memory is read in long runs.

    Takes bounded memory; a run that was killed is continued by the same command.

    Examples:
      jasper-store pack data/ packed/
      jasper-store pack data/ packed/ --dtype float16 --splits train
      jasper-store pack data/ packed/ --columns negative_embs,negative_tiers
    """
    with progress() as bars:
        report = js.pack(
            path,
            dst,
            fields=_names(fields),
            splits=_names(splits),
            dtype=dtype,
            seed=seed,
            memory_limit=memory_limit,
            overwrite=overwrite,
            columns=_names(columns),
            progress=follow_bytes(bars, "packing"),
        )
    if json:
        print_json(report.to_dict())
    else:
        results().print(str(report), markup=False, soft_wrap=True)


def _names(text: str | None) -> list[str] | None:
    """Names with commas between them."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
