"""What ``config.json`` says of samples that were packed: in which blocks they lie, and what they were packed from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jasper_store.errors import CorruptFileError
from jasper_store.files.fingerprint import FileFingerprint
from jasper_store.store.manifest import SourceFile

__all__ = ["PACKED_KEY", "Packed"]

PACKED_KEY: Final = "packed"
"""Key of ``config.json`` that it stands under."""
_VERSION: Final = 1
_MOST: Final = 1 << 31
_MADE_FROM: Final = ("fingerprints", "files")
"""What tells the source of one generation from that of another."""
_NEXT: Final = "next"


@dataclass(frozen=True)
class Packed:
    """How samples were packed. Immutable, picklable.

    Attributes:
        kind: what opens them: ``"jasper"``, or ``"dataset"``.
        block: samples of a block, which lie in one run of the file; the last block of a split may have fewer.
        window: blocks whose samples a loader mixes with each other.
        seed: decides the order in which the samples lie.
        dtype: what floating fields were narrowed to, or ``None``.
        origin: name of the tensor that holds the row of each sample in the dataset that it was packed from.
        source: that dataset's directory, relative to this one's; the directory of its files.
        fingerprints: what decides the samples of each split there, by its name; ``""`` without splits.
        files: the files that samples were read from.
        columns: name of each stored tensor to the field and variant that it holds.
    """

    kind: str
    block: int
    window: int
    seed: int
    dtype: str | None
    origin: str
    source: str
    fingerprints: Mapping[str, str]
    files: tuple[SourceFile, ...]
    columns: Mapping[str, str]

    def changes(self, directory: Path) -> list[str]:
        """Texts for a warning: the source has changed since. A source that is gone is no change."""
        # Without links and "..", since the directory may not be there yet.
        root = os.path.realpath(directory)
        changed = [
            source.path
            for source in self.files
            if _has_changed(Path(os.path.normpath(Path(root, source.path))), source.fingerprint)
        ]
        if not changed:
            return []
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        msg = (
            f"{directory} was packed from files that have changed since ({', '.join(changed[:3])}{more}); pack again"
            " (jasper-store pack --overwrite), or only what has changed (--columns)"
        )
        return [msg]

    def to_config(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "version": _VERSION,
            **{name: getattr(self, name) for name in ("kind", "block", "window", "seed", "dtype", "origin", "source")},
            "fingerprints": dict(self.fingerprints),
            "files": [source.to_json() for source in self.files],
            "columns": dict(self.columns),
        }

    def followed_by(self, later: Packed, generation: int) -> dict[str, Any]:
        """Plain values of this until a generation is published, and from then on with the source that ``later`` had.

        So the configuration is right before and after the one step that publishes the generation.
        """
        made_from = {key: later.to_config()[key] for key in _MADE_FROM}
        return self.to_config() | {_NEXT: {"generation": generation} | made_from}

    @classmethod
    def from_config(cls, raw: Any, path: Path, generation: Callable[[], int]) -> Packed:
        """What :meth:`to_config` or :meth:`followed_by` gave.

        Args:
            raw: the value under :data:`PACKED_KEY`.
            path: the configuration, for errors.
            generation: gives the number of the generation that is there; called only where it matters.

        Raises:
            CorruptFileError: it makes no sense, or a later release wrote it.
        """
        try:
            _require(raw["version"] == _VERSION, f"version {raw['version']!r:.20}, this release reads {_VERSION}")
            if _NEXT in raw and raw[_NEXT]["generation"] <= generation():
                raw = raw | {key: raw[_NEXT][key] for key in _MADE_FROM}
            made = cls(
                kind=str(raw["kind"]),
                block=raw["block"],
                window=raw["window"],
                seed=raw["seed"],
                dtype=raw["dtype"],
                origin=str(raw["origin"]),
                source=str(raw["source"]),
                fingerprints=dict(raw["fingerprints"]),
                files=tuple(_source(each) for each in raw["files"]),
                columns=dict(raw["columns"]),
            )
            for name in ("block", "window"):
                value = getattr(made, name)
                _require(type(value) is int and 1 <= value < _MOST, f"{name} {value!r:.20}")
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            msg = (
                f'{path}: what it says of "{PACKED_KEY}" cannot be understood ({exc!r:.200}); restore the file, or pack'
                " again"
            )
            raise CorruptFileError(msg, path=path) from exc
        return made


def _require(sound: bool, what: str) -> None:
    if not sound:
        raise ValueError(what)


def _source(raw: Any) -> SourceFile:
    return SourceFile(str(raw["path"]), FileFingerprint(raw["size"], raw["mtime_ns"], raw["sample"]))


def _has_changed(path: Path, fingerprint: FileFingerprint) -> bool:
    try:
        return not fingerprint.matches(path)
    except OSError:
        return False
