"""The files of a dataset in parts, compared with what its manifest says of them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

from jasper_store.errors import JasperStoreError, JasperStoreWarning
from jasper_store.formats.base import Extent, TensorSpec
from jasper_store.formats.files import dtype_name
from jasper_store.formats.parts import parts_of
from jasper_store.formats.registry import format_for

if TYPE_CHECKING:
    from pathlib import Path

    from jasper_store.formats.base import Schema
    from jasper_store.formats.generation import Generation
    from jasper_store.formats.part_columns import PartedTensor

__all__ = ["Problem", "part_headers"]


class Problem(NamedTuple):
    """An error: the tensor or file concerned, the check, and the text."""

    tensor: str
    check: str
    message: str


def part_headers(
    generation: Generation, root: Path, schema: Schema
) -> tuple[dict[str, tuple[tuple[TensorSpec, str | None], ...]], list[Problem]]:
    """Read the header of every file of the newest generation.

    Returns:
        Of each tensor the parts whose files are sound, in order, each with its checksum; and what is wrong with others.
    """
    problems: list[Problem] = []
    located: dict[int, list[TensorSpec]] = {}
    for number in generation.files_of(generation.number).tolist():
        path = root / generation.files.names[number]
        found = _located(path, int(generation.files.sizes[number]), schema, problems)
        if found is not None:
            located[number] = found
    held = {}
    for name, tensor in generation.tensors.items():
        parts = [
            (spec, tensor.checksums[at])
            for at in tensor.visible(generation.number).tolist()
            if (spec := _part(name, tensor, at, generation, root, located, problems)) is not None
        ]
        if parts:
            held[name] = tuple(parts)
    for name, whole in generation.whole.items():
        for spec in located.get(whole.file, ()):
            if spec.name == name and (spec.dtype, spec.shape) == (whole.dtype, whole.shape):
                held[name] = ((spec, whole.checksum),)
        if whole.file in located and name not in held:
            path = root / generation.files.names[whole.file]
            problems.append(Problem(name, "header", f"{path}: {name} was written to it and is not in it now"))
    return held, problems


def _located(path: Path, size: int, schema: Schema, problems: list[Problem]) -> list[TensorSpec] | None:
    """What the header of a file says; ``None``, and a problem, where the file is not the one that was written."""
    fmt = format_for(path)
    try:
        found = path.stat().st_size
        if found != size:
            text = f"{path}: expected {size:,} bytes, found {found:,}; restore the file"
            problems.append(Problem(path.name, "size", text))
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", JasperStoreWarning)
            return fmt.locate(path, schema) if fmt is not None else []
    except OSError as exc:
        text = f"{path}: the manifest lists it, and it cannot be read ({exc.strerror or exc}); restore the file"
        problems.append(Problem(path.name, "missing", text))
    except JasperStoreError as exc:
        problems.append(Problem(path.name, "header", str(exc)))
    return None


def _part(
    name: str,
    tensor: PartedTensor,
    at: int,
    generation: Generation,
    root: Path,
    located: dict[int, list[TensorSpec]],
    problems: list[Problem],
) -> TensorSpec | None:
    """One part, where the header of its file says the same of it as the manifest."""
    file, offset, rows = int(tensor.file_of[at]), int(tensor.offsets[at]), int(tensor.rows[at])
    if file not in located:
        return None
    path = root / generation.files.names[file]
    for spec in located[file]:
        # A file may call its tensor otherwise than the whole (numbered files); what counts is the place.
        for piece in parts_of(spec) if spec.shape else ():
            there = piece.location.offset if isinstance(piece.location, Extent) else 0
            if (piece.dtype, piece.shape, there) == (tensor.dtype, (rows, *tensor.row_shape), offset):
                return TensorSpec(name, tensor.dtype, piece.shape, piece.location if rows else Extent(path, 0))
    text = (
        f"{path}: expected {rows:,} rows of {name}, {dtype_name(tensor.dtype)} {list(tensor.row_shape)}, at byte {offset:,} as "
        "the manifest says; its header says otherwise: restore the file"
    )
    problems.append(Problem(name, "header", text))
    return None
