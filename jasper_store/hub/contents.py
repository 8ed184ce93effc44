"""Which files of a directory are the dataset, and the manifest that travels with them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from jasper_store.conversion.checksum import checksum
from jasper_store.errors import ConversionError, DatasetNotFoundError, IncompatibleOptionsError
from jasper_store.files.fingerprint import FileFingerprint, FileIdentity
from jasper_store.formats.base import TensorSpec
from jasper_store.formats.files import dtype_name
from jasper_store.formats.generation import SHARDS
from jasper_store.formats.registry import format_for, locate
from jasper_store.jasper.recognise import known_at
from jasper_store.store import manifest_file
from jasper_store.store.manifest import MANIFEST_NAME, FileEntry, Manifest, TensorEntry

__all__ = ["CARD_NAME", "Contents", "is_data", "look_at"]

CARD_NAME = "README.md"
_BESIDE = ("config.json", CARD_NAME, "dataset_info.json", "dataset_dict.json", "state.json")
_LICENCES = ("LICENSE", "LICENCE", "NOTICE")
_UNFINISHED = (".tmp", ".staging", ".old")


@dataclass(frozen=True, slots=True)
class Contents:
    """What of a directory is pushed.

    Attributes:
        directory: the directory.
        specs: the tensors of the dataset.
        files: the files by their name in the repository, without the manifest.
        identities: what the system said of each, before anything was read.
        left_out: names of other files there that are not hidden; none of them is pushed.
    """

    directory: Path
    specs: tuple[TensorSpec, ...]
    files: dict[str, Path]
    identities: dict[str, FileIdentity]
    left_out: tuple[str, ...]

    @property
    def has_card(self) -> bool:
        """Whether the directory has a card of its author's."""
        return CARD_NAME in self.files

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(identity.size for identity in self.identities.values())

    def require_unchanged(self) -> None:
        """Refuse files that changed since they were looked at: what was verified is what is pushed.

        Raises:
            ConversionError: one did.
        """
        for name, path in self.files.items():
            found = FileIdentity.of(path) if path.exists() else None
            if found != self.identities[name]:
                raise ConversionError(
                    f"{path}: changed while the dataset was pushed, so nothing was published; push it again", path=path
                )

    def manifest(self) -> bytes:
        """The manifest to push: of these files alone, with a checksum of each tensor, and without what they were made from.

        Checksums that the directory's manifest lacks are computed, which reads those tensors once.
        """
        there = manifest_file.read(self.directory) or Manifest(self.directory)
        if there.generation is None:
            entries = {name: self._entry(name, path, there) for name, path in self.files.items() if is_data(name)}
            marks = {check: found for check, found in there.verified.items() if found.keys() <= entries.keys()}
            there = replace(there, files=entries, verified=marks, found=None)
        return f"{json.dumps(there.to_json(), indent=1)}\n".encode()

    def _entry(self, name: str, path: Path, there: Manifest) -> FileEntry:
        """What the manifest says of a file; of one that it does not know, what the file says."""
        known = there.files.get(name)
        if known is not None and known.tensors and all(entry.xxh3_128 for entry in known.tensors.values()):
            # Where it came from is a path of this machine.
            return replace(known, made_from=())
        whole = [spec for spec in self.specs if spec.paths == (path,)]
        tensors = {spec.name: TensorEntry(dtype_name(spec.dtype), tuple(spec.shape), checksum(spec)) for spec in whole}
        return FileEntry(FileFingerprint.of(path), tensors)


def look_at(path: Path) -> Contents:
    """Find the files of a dataset; only headers are read.

    Raises:
        DatasetNotFoundError: no such directory, or no tensors in it.
        IncompatibleOptionsError: a file instead of a directory, or files outside of it.
        ConversionError: something in it is not finished: a conversion, a write, shards that were not committed.
    """
    if not path.is_dir():
        if path.exists():
            raise IncompatibleOptionsError(
                f"{path}: expected a dataset directory to push, found a file; push its directory"
            )
        raise DatasetNotFoundError(
            f"{path}: expected a dataset directory to push, found nothing of that name", path=path
        )
    _require_finished(path)
    located = locate(path, "auto", known_at(path).schema)
    data = sorted({file for spec in located.specs for file in spec.paths})
    outside = next((file for file in data if not file.is_relative_to(path)), None)
    if outside is not None:
        raise IncompatibleOptionsError(
            f"{outside}: expected all files of the dataset in {path}; convert it into one directory"
        )
    beside = [each for each in sorted(path.iterdir()) if each.is_file() and _belongs(each)]
    files = {each.relative_to(path).as_posix(): each for each in (*data, *beside)}
    others = {each.name for each in path.iterdir() if each.is_file() and each.name[0] != "."} - files.keys()
    return Contents(
        directory=path,
        specs=located.specs,
        files=files,
        identities={name: FileIdentity.of(file) for name, file in files.items()},
        left_out=tuple(sorted(others - {MANIFEST_NAME})),
    )


def is_data(name: str) -> bool:
    """Whether a file of a repository holds tensors, by its name."""
    return format_for(Path(name)) is not None


def _belongs(path: Path) -> bool:
    return path.name in _BESIDE or path.stem.upper() in _LICENCES


def _require_finished(path: Path) -> None:
    """Refuse what is still being written, or was left half-written."""
    if path.name.startswith(".") and path.suffix in _UNFINISHED:
        raise ConversionError(
            f"{path}: expected a finished dataset, found the temporary of a writer; wait for it", path=path
        )
    if (path / SHARDS).is_dir():
        raise ConversionError(
            f"{path}: expected a finished dataset, found shards that are not committed; jasper_store.commit({str(path)!r}), "
            f"or remove {path / SHARDS}",
            path=path,
        )
    left = next((each for each in path.iterdir() if each.name[0] == "." and each.suffix in _UNFINISHED), None)
    if left is not None:
        raise ConversionError(
            f"{path}: expected a finished dataset, found {left.name}, which a writer or a conversion has not finished; wait "
            "for it, or run it again",
            path=path,
        )
    manifest = manifest_file.read(path)
    if manifest is not None and manifest.pending:
        raise ConversionError(
            f"{path}: expected a finished dataset, found a conversion that was not finished ({', '.join(manifest.pending[:5])});"
            " run it again",
            path=path,
        )
