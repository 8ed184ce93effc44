"""Options that several commands share, so that each is spelt and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from jasper_store.cli.sizes import parse_size
from jasper_store.errors import IncompatibleOptionsError
from jasper_store.files.hub import is_hub_path, local_path

__all__ = [
    "TRAIN_BATCH",
    "Device",
    "Directory",
    "FormatOption",
    "Json",
    "LocalDirectory",
    "MemoryLimit",
    "Mmap",
    "Preload",
    "Seed",
    "downloaded",
    "use_mmap",
]

TRAIN_BATCH = 32
"""Samples per step of ``train``, unless asked for otherwise."""


def downloaded(path: Path) -> Path:
    """Where a path lies on this machine; a dataset of the Hub is downloaded."""
    return local_path(path) if is_hub_path(path) else path


Directory: TypeAlias = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        callback=downloaded,
        help="A dataset directory, any directory of tensor files, one file, or hf://owner/name.",
    ),
]
LocalDirectory: TypeAlias = Annotated[Path, typer.Argument(metavar="DIR", help="A dataset directory.")]
FormatOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="auto, safetensors, npy, hdf5, pt, or one that is only read: arrow, faiss, bin, npz, pickle, parquet.",
    ),
]
MemoryLimit: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--memory-limit", parser=parse_size, metavar="SIZE", help="Upper bound on what may be preloaded, e.g. 8GiB."
    ),
]
Mmap: TypeAlias = Annotated[
    bool, typer.Option("--mmap", help="Map everything that can be; by default the planner decides.")
]
Preload: TypeAlias = Annotated[
    bool, typer.Option("--preload", help="Preload everything; by default the planner decides.")
]
Device: TypeAlias = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:N or auto; by default host memory.")
]
Seed: TypeAlias = Annotated[
    int, typer.Option("--seed", min=0, help="Seed of the order, the steering draw and the model.")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead.")]


def use_mmap(*, mmap: bool, preload: bool) -> bool | None:
    """What ``--mmap`` and ``--preload`` ask for; ``None`` leaves it to the planner.

    Raises:
        IncompatibleOptionsError: both.
    """
    if mmap and preload:
        raise IncompatibleOptionsError(
            "--mmap maps everything and --preload preloads everything; pass one of them, or neither to let the planner"
            " decide"
        )
    return mmap or (False if preload else None)
