"""The public ``convert``.

It has a module to itself because the package has a room of the same name: ``jasper_store.convert`` stays the function
only if it is put there after the room was imported, so this is the one public name that is not imported when it is
first used. What it needs, it imports when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from jasper_store.convert.report import ConversionReport

__all__ = ["convert"]


def convert(
    src: str | PathLike[str],
    dst: str | PathLike[str] | None = None,
    format: str = "safetensors",  # noqa: A002
    compression: str | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    tensors: Collection[str] | None = None,
    source_format: str = "auto",
) -> ConversionReport:
    """Write a dataset, or one file, in another format: bounded memory, published whole, proven by checksums.

    Args:
        src: a dataset directory, or one file.
        dst: directory to write to; the source's own by default. For HDF5 also a file name.
        format: ``"safetensors"``, ``"npy"``, ``"hdf5"`` or ``"pt"``.
        compression: HDF5 only: ``None``, ``"gzip"``, ``"lzf"``, or a filter of hdf5plugin.
        dtype: narrow floating tensors to this dtype; the largest error is reported.
        overwrite: replace targets that hold something else.
        progress: called as ``progress(tensor, done_bytes, total_bytes)`` after each block.
        tensors: names of the tensors to convert; all by default.
        source_format: format to read where the source has its tensors in several.

    Returns:
        A report with sizes, seconds and checksums per tensor; ``str(report)`` is a table.

    Raises:
        ConversionError: no room, read-only, another conversion at work, a target that holds other values, a source
            that changed meanwhile, or values that read back differently.
        IncompatibleOptionsError, UnknownNameError: options.
        IntegrityError: ``dtype`` would make a finite value infinite.
        DatasetNotFoundError, CorruptFileError: the source.
    """
    from jasper_store.convert import converter
    from jasper_store.jasper.api import schema_at

    return converter.convert(
        src,
        dst,
        format=format,
        compression=compression,
        dtype=dtype,
        overwrite=overwrite,
        progress=progress,
        tensors=tensors,
        source_format=source_format,
        schema=schema_at(Path(src)),
    )
