"""Directories that the library ``datasets`` has written: which of their Arrow files hold the dataset.

``Dataset.save_to_disk`` writes numbered files and ``state.json``, which lists them; ``DatasetDict.save_to_disk`` a directory
per split and ``dataset_dict.json``. The cache of the hub has the files of all splits in one directory, with
``dataset_info.json``; results of ``map`` and ``filter`` lie beside them as ``cache-*.arrow``.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from jasper_store.errors import CorruptFileError, DatasetNotFoundError
from jasper_store.formats.base import Skipped
from jasper_store.formats.files import is_directory, is_file, open_for_reading, read_at, shown

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["dataset_files", "lists_data_files", "splits_of"]

_STATE = "state.json"
_MAX_JSON = 64 << 20
_NUMBER = re.compile(r"-\d+-of-\d+$")
_CACHE = re.compile(r"cache-[0-9a-f]{8,}(_\d+_of_\d+)?$")


def splits_of(root: Path) -> list[str]:
    """Directories that a ``DatasetDict`` has saved its splits to; none if ``root`` is no such directory.

    Raises:
        CorruptFileError: ``dataset_dict.json`` cannot be understood.
    """
    path = root / "dataset_dict.json"
    if not path.is_file():
        return []
    splits = _json(path).get("splits")
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise CorruptFileError(
            f"{path}: expected a list of splits, found {shown(splits, 80)}; save it again.", path=path
        )
    return [split for split in splits if is_directory(root / split)]


def dataset_files(root: Path, files: Mapping[Path, str]) -> tuple[dict[Path, str], list[Skipped]]:
    """The Arrow files that hold the dataset of a directory, and those that are passed over.

    Args:
        root: the directory.
        files: its Arrow files, each with its name without suffix.

    Raises:
        CorruptFileError: ``state.json`` cannot be understood, names a file that is not there, or says that rows are
            selected by another file.
        DatasetNotFoundError: the files of several splits lie there.
    """
    kept = dict(files)
    skipped = []
    for path, stem in files.items():
        if _CACHE.fullmatch(stem):
            del kept[path]
            skipped.append(
                Skipped(stem, path, "a result that the library datasets keeps; open it by its name to have it")
            )
    named = _named(root / _STATE)
    if named is not None:
        others = [path for path in kept if path.name not in named]
        skipped += [Skipped(kept[path], path, "state.json does not list it") for path in others]
        # In its order, which is the order of the rows.
        kept = {path: kept[path] for path in (root / name for name in named)}
    elif (root / "dataset_info.json").is_file():
        splits = sorted({_NUMBER.sub("", stem) for stem in kept.values()})
        if len(splits) > 1:
            raise DatasetNotFoundError(
                f"{root}: expected the files of one split, found those of {', '.join(splits)}; open the files of one as a "
                f"list: js.open(sorted(Path({str(root)!r}).glob({splits[-1] + '*.arrow'!r}))).",
                path=root,
            )
    return kept, skipped


def lists_data_files(path: Path) -> bool:
    """Whether a file is the ``state.json`` of a saved dataset, which says which files hold its rows."""
    if path.name != _STATE:
        return False
    try:
        return "_data_files" in _json(path)
    except CorruptFileError:
        return False  # another program's file of that name


def _named(path: Path) -> list[str] | None:
    """Names of the files that ``state.json`` lists; ``None`` without one of a dataset."""
    if not path.is_file():
        return None
    state = _json(path)
    if "_data_files" not in state:
        return None
    if state.get("_indices_data_files"):
        raise CorruptFileError(
            f"{path}: says that the rows are selected by {shown(state['_indices_data_files'], 100)}; save the dataset "
            "again after dataset.flatten_indices().",
            path=path,
        )
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
    except (TypeError, KeyError):
        names = [None]
    if not all(isinstance(name, str) and "/" not in name and "\\" not in name and "\0" not in name for name in names):
        raise CorruptFileError(
            f"{path}: expected the names of files in its directory, found {shown(state['_data_files'], 100)}; save the "
            "dataset again.",
            path=path,
        )
    for name in names:
        if not is_file(path.parent / name):
            raise CorruptFileError(
                f"{path}: lists the file {shown(name, 100)}, which is not there; restore it, or save the dataset again.",
                path=path,
            )
    return names


def _json(path: Path) -> dict[str, Any]:
    with open_for_reading(path) as (file, size):
        raw = read_at(file, 0, min(size, _MAX_JSON + 1))
    try:
        found = json.loads(raw) if len(raw) <= _MAX_JSON else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CorruptFileError(
            f"{path}: expected a JSON object of at most {_MAX_JSON} bytes, found {shown(raw[:40], 80)}; save the dataset again.",
            path=path,
        )
    return found
