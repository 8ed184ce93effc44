"""How a store travels to another process: as a path and options, never as data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from jasper_store.errors import CorruptFileError, IncompatibleOptionsError
from jasper_store.files.fingerprint import FileIdentity
from jasper_store.formats.base import Inline, Schema

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch

    from jasper_store.formats.base import FileFacts, FormatName, TensorSpec

__all__ = ["ReopenSpec", "digest_of", "identities_of"]


def identities_of(specs: Sequence[TensorSpec], known: Mapping[str, FileFacts] | None = None) -> dict[str, FileFacts]:
    """Identity of every file that the tensors lie in, by its path as a text, as it is now, but for those known already."""
    known = known or {}
    return {
        path: known.get(path) or FileIdentity.of(path)
        for path in dict.fromkeys(path for spec in specs for path in spec.path_texts)
    }


def digest_of(specs: Sequence[TensorSpec], identities: Mapping[str, FileFacts]) -> str:
    """Short text that changes whenever a file does, or where a tensor lies in it; the same on every node."""
    digest = xxhash.xxh3_64()
    for spec in sorted(specs, key=lambda spec: spec.name):
        location = "" if isinstance(spec.location, Inline) else repr(spec.location)
        # Other nodes number the inodes and devices of a shared file system in their own way.
        each = [identities[path] for path in spec.path_texts]
        found = np.array([one[0] for one in each] + [one[1] for one in each], np.int64)
        facts = (spec.name, str(spec.dtype), spec.shape, location, xxhash.xxh3_64(found.tobytes()).hexdigest())
        digest.update(repr(facts).encode())
    return digest.hexdigest()


class ReopenSpec:
    """How to open a store again in another process; what a store and its tensors pickle as. Small at any size.

    Attributes:
        path: the directory, the file or the files.
        format: the format that was chosen.
        schema: what is known of the names.
        dtype: floating dtype that the store was opened with.
        digest: :func:`digest_of` the files; another one is refused on opening.
        generation: of a directory whose manifest names parts, the generation that was opened; else 0.
        newer: of tensors that were reopened since, by name, the generation that they are of where it is another one.
        on_device: whether anything is resident on a CUDA device, which cannot be sent.
    """

    def __init__(
        self,
        path: Path | tuple[Path, ...],
        format: FormatName,  # noqa: A002 - the word that users pass
        schema: Schema,
        dtype: torch.dtype | None,
        digest: str,
        *,
        generation: int = 0,
        opener: Callable[[ReopenSpec], Any],
    ) -> None:
        """``opener`` is a module's function that opens the store; given, because this file may not import the store."""
        self.path = path
        self.format = format
        self.schema = schema
        self.dtype = dtype
        self.digest = digest
        self.generation = generation
        self.newer: dict[str, int] = {}
        self.on_device = False
        self._opener = opener

    def copy(self) -> ReopenSpec:
        """The same, for a separate store: each store keeps the digest of what it has read."""
        made = self.of_generation(self.generation)
        made.newer = dict(self.newer)
        return made

    def of_generation(self, generation: int) -> ReopenSpec:
        """The same, of another generation; a caller that opens a store by it sets the digest."""
        given = (self.path, self.format, self.schema, self.dtype, self.digest)
        made = ReopenSpec(*given, generation=generation, opener=self._opener)
        made.on_device = self.on_device
        return made

    def take(self, name: str, origin: ReopenSpec) -> None:
        """Open a tensor from now on as ``origin`` does."""
        self.newer.pop(name, None)
        if origin.generation != self.generation:
            self.newer[name] = origin.generation

    @property
    def first(self) -> Path:
        """The path, or the first of several."""
        return self.path[0] if isinstance(self.path, tuple) else self.path

    def check(self, digest: str) -> None:
        """Compare the files' digest with the one that was sent.

        Raises:
            CorruptFileError: they differ.
        """
        if digest != self.digest:
            msg = (
                f"{self.first}: the files changed after the store was opened, so this process would see other data than "
                "the one that sent it; open the dataset again, then start the workers"
            )
            raise CorruptFileError(msg, path=self.first)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.on_device:
            msg = (
                f"{self.first}: data that is resident on a CUDA device cannot be sent to another process; "
                "use num_workers=0, or device=None with workers"
            )
            raise IncompatibleOptionsError(msg, path=self.first)
        schema = (
            self.schema.required,
            dict(self.schema.hdf5_paths),
            dict(self.schema.hdf5_aliases),
            dict(self.schema.reads_per_sample),
            self.schema.stacks,
            self.schema.optional,
        )
        facts = (self.path, self.format, schema, self.dtype, self.digest, self.generation, self.newer, self._opener)
        return (_opened, facts)


def _opened(
    path: Path | tuple[Path, ...],
    format: FormatName,  # noqa: A002
    schema_parts: tuple[Any, ...],
    dtype: torch.dtype | None,
    digest: str,
    generation: int,
    newer: dict[str, int],
    opener: Callable[[ReopenSpec], Any],
) -> Any:
    """The store, where its specification was unpickled."""
    spec = ReopenSpec(path, format, Schema(*schema_parts), dtype, digest, generation=generation, opener=opener)
    spec.newer = newer
    return opener(spec)
