"""``jasper-store sample``: copies the bundled dataset, to try the other commands on."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Annotated

import typer

from jasper_store.cli.console import print_json, results
from jasper_store.cli.options import Json
from jasper_store.errors import ConversionError, DatasetNotFoundError

__all__ = ["SAMPLE", "sample"]

SAMPLE = Path(__file__).parents[1] / "sample" / "wordnet-mini"
"""The bundled dataset: WordNet 3.0 through all-MiniLM-L6-v2, as ``.pt`` files."""


def sample(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Directory to make; it may be there if it is empty.")],
    *,
    json: Json = False,
) -> None:
    """Copy the bundled sample dataset: 1 000 real question and source pairs, 11 MB of .pt files.

    The copy appears under its name only when it is complete. Its README.md says where the data comes from.

    Examples:
      jasper-store sample data/
    """
    from jasper_store.memory.budget import format_bytes

    if not SAMPLE.is_dir():
        raise DatasetNotFoundError(
            f"{SAMPLE}: the bundled sample is missing from this installation; install jasper-store again", path=SAMPLE
        )
    files = sorted(file for file in SAMPLE.iterdir() if file.is_file())
    nbytes = sum(file.stat().st_size for file in files)
    _copy(files, path, nbytes)
    if json:
        print_json({"path": str(path), "files": len(files), "nbytes": nbytes})
        return
    results().print(
        f"{path}: {len(files)} files, {format_bytes(nbytes)}\nNext: jasper-store inspect {path}",
        markup=False,
        soft_wrap=True,
    )


def _copy(files: list[Path], path: Path, nbytes: int) -> None:
    # Imported here because they import torch, for which --help need not wait.
    from jasper_store.conversion.staging import make_staging, publish
    from jasper_store.files.atomic import map_os_errors, require_space, sync_directory, sync_file

    target = path.absolute()
    if target.is_dir() and any(target.iterdir()):
        raise ConversionError(f"{path}: expected no directory of this name, or an empty one; name another", path=path)
    with contextlib.ExitStack() as stack:
        staging = make_staging(stack, target, overwrite=False)
        require_space(staging, nbytes, what=f"the sample in {path}")
        with map_os_errors(target, staging, nbytes):
            for file in files:
                shutil.copyfile(file, staging / file.name)
                sync_file(staging / file.name)
            sync_directory(staging)
            publish(staging, target, overwrite=False)
