"""What kind of dataset a path holds: JASPER, one that declares its samples, or tensors of which nothing is known."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from jasper_store.errors import DeclarationError, JasperStoreError, UnknownNameError
from jasper_store.formats.base import Schema, TensorSpec
from jasper_store.formats.generation import read_generation
from jasper_store.formats.registry import base_name
from jasper_store.jasper.config import read_config
from jasper_store.jasper.schema import SCHEMA, TENSORS, declaration_for
from jasper_store.jasper.steering import default_curriculum
from jasper_store.samples.declaration import CONFIG_KEY, Declaration
from jasper_store.samples.opened import CONFIG_NAME, declaration_at, describe, load_config, packed_at
from jasper_store.samples.packed import Packed

__all__ = ["PACKED_KIND", "Known", "is_jasper", "is_packed_jasper", "known_at"]

PACKED_KIND: Final = "jasper"
"""What a packed JASPER dataset says that it is."""


@dataclass(frozen=True)
class Known:
    """What is known of the tensors at a path before their headers are read.

    Attributes:
        schema: their names.
        declaration: what samples read, if it is known.
        packed: how the samples were packed, if they were.
    """

    schema: Schema
    declaration: Declaration | None = None
    packed: Packed | None = None

    @property
    def describe(self) -> Callable[[Sequence[TensorSpec]], Schema] | None:
        """For ``open_store``: what is known once headers were read."""
        declaration = self.declaration
        if declaration is None:
            return None

        def describing(specs: Sequence[TensorSpec]) -> Schema:
            by_name = {spec.name: spec for spec in specs}
            served: list[str | None] = [split for split, name in declaration.splits.items() if name in by_name]
            served = served or [None]
            try:
                return describe(declaration, by_name, served, base=self.schema, packed=self.packed)
            except (DeclarationError, UnknownNameError):
                # An incomplete dataset may still be inspected; only JASPERSteeringDataset requires all tensors.
                return replace(self.schema, reads_per_sample=dict.fromkeys(by_name, 1.0))

        return describing


def known_at(path: Path) -> Known:
    """What is known of the tensors at a path: nothing, unless it is a dataset or an HDF5 file with its paths.

    Raises:
        DeclarationError: ``config.json`` declares samples, and what it says cannot be understood.
    """
    if not path.is_dir():
        return Known(Schema(hdf5_paths=SCHEMA.hdf5_paths, hdf5_aliases=SCHEMA.hdf5_aliases))
    if is_jasper(path):
        try:
            curriculum = read_config(path).curriculum
        except JasperStoreError:
            # Tensors can be looked at without their configuration.
            curriculum = default_curriculum()
        return Known(SCHEMA, declaration_for(curriculum))
    declaration = declaration_at(path)
    if declaration is None:
        return Known(Schema())
    return Known(Schema(required=frozenset(declaration.tensors)), declaration, packed_at(path))


def is_packed_jasper(path: Path) -> bool:
    """Whether a directory holds the packed samples of a JASPER dataset.

    Raises:
        CorruptFileError: what ``config.json`` says of it makes no sense.
    """
    packed = packed_at(path)
    return packed is not None and packed.kind == PACKED_KIND


def is_jasper(path: Path) -> bool:
    """Whether a directory is meant to be a JASPER dataset: by its configuration, or by the names of its files.

    Packed samples of one are not: they declare what they read.
    """
    if not path.is_dir():
        return False
    config = path / CONFIG_NAME
    there = config.is_file()
    if there:
        with contextlib.suppress(JasperStoreError):
            if CONFIG_KEY in load_config(config):
                return False
            read_config(path)
            return True
    grown = read_generation(path)
    if grown is not None and not TENSORS.keys().isdisjoint(map(base_name, (*grown.tensors, *grown.whole))):
        return True
    # Not by paths: of ten thousand files, in a third of the time.
    if any(name.split(".", 1)[0] in TENSORS for name in os.listdir(path)):  # noqa: PTH208
        return True
    return there and (path / "dataset.h5").is_file()
