"""The directory that a build makes: whether it may be made, and what an earlier build wrote there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jasper_store.building.settings import BuildSettings
from jasper_store.errors import JasperStoreError
from jasper_store.jasper import api
from jasper_store.jasper.config import CONFIG_NAME
from jasper_store.jasper.writing import DatasetWriter
from jasper_store.samples.opened import load_config

__all__ = ["BUILT", "built_config", "probe"]

BUILT = "built"
"""Key of ``config.json`` that says what a dataset was built from."""


def built_config(target: Path) -> dict[str, Any] | None:
    """The configuration of a dataset that was built here and opens; ``None`` where there is none."""
    path = target / CONFIG_NAME
    if not path.is_file():
        return None
    try:
        config = dict(load_config(path))
        if not isinstance(config.get(BUILT), dict) or "key" not in config[BUILT]:
            return None
        with api._quietly_opened(target):  # noqa: SLF001
            return config
    except JasperStoreError:
        return None


def probe(target: Path, settings: BuildSettings, *, overwrite: bool) -> None:
    """Refuse now what writing would refuse in the end.

    Raises:
        ConversionError: the target is there and may not be replaced, cannot be written, or has another writer.
        UnknownNameError, IncompatibleOptionsError: a compression that the format or this machine lacks.
    """
    DatasetWriter(target, settings.format, compression=settings.compression, overwrite=overwrite).abandon()
