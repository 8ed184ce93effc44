"""Finished work of a build in a hidden directory beside its target, so that a build that was killed continues.

A result is kept under the key of everything that it follows from. A build of other inputs or settings finds no result of
that key, and replaces those that are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from jasper_store.files.atomic import atomic_file, clean_stale, make_directory, map_os_errors, remove
from jasper_store.files.lock import LOCK_NAME, exclusive

__all__ = ["WorkDirectory", "key_of"]

_META = "meta"


def key_of(*parts: Any) -> str:
    """A short text that depends on every part: plain values, as JSON has them."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


class WorkDirectory:
    """The hidden directory of the builds of one target, or of other work on it.

    Attributes:
        path: ``.NAME.build`` beside the target.
    """

    def __init__(self, target: Path, work: str = "build") -> None:
        self.path = target.with_name(f".{target.name}.{work}")
        self._doing = {"build": "building", "mine": "mining for"}[work]

    @contextlib.contextmanager
    def held(self, target: Path) -> Iterator[None]:
        """Make the directory, and keep other builds of the target out.

        Raises:
            ConversionError: another build is at work, or the directory cannot be made.
        """
        with map_os_errors(self.path):
            make_directory(self.path)
        try:
            with exclusive(self.path / LOCK_NAME, f"{self._doing} {target}"):
                clean_stale(self.path)
                yield
        finally:
            # Empty where nothing was finished, or already gone.
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def kept(self, stage: str, key: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors and plain values of a stage that was finished, if they are those of this key."""
        from safetensors import safe_open

        path = self._file(stage, key)
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return tensors, json.loads((file.metadata() or {})[_META])

    def keep(self, stage: str, key: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Keep what a stage has finished, in place of what it kept before.

        Raises:
            ConversionError: no room.
        """
        from safetensors.torch import save_file

        path = self._file(stage, key)
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with atomic_file(path, needed=sum(tensor.nbytes for tensor in whole.values())) as temporary:
            save_file(whole, os.fspath(temporary), metadata={_META: json.dumps(meta)})
        self.clear(stage, key)

    def scratch(self, stage: str, key: str) -> Path:
        """A directory that a stage may keep its own unfinished work in; that of other keys is removed.

        Raises:
            ConversionError: it cannot be made.
        """
        self.clear(stage, key)
        path = self.path / f"{stage}-{key}"
        with map_os_errors(path):
            path.mkdir(exist_ok=True)
        return path

    def clear(self, stage: str, key: str) -> None:
        """Remove what a stage kept under other keys."""
        for path in self.path.glob(f"{stage}-*"):
            if path.name.split(".")[0] != f"{stage}-{key}":
                remove(path)

    def remove(self) -> None:
        """Remove everything; the lock file is released by its holder."""
        remove(self.path)

    def _file(self, stage: str, key: str) -> Path:
        return self.path / f"{stage}-{key}.safetensors"
