"""How a store travels to another process: as a path and options, never as data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import xxhash

from jasper_store.errors import CorruptFileError, IncompatibleOptionsError
from jasper_store.formats.base import Inline, Schema
from jasper_store.formats.registry import locate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from jasper_store.formats.base import FormatName, TensorSpec
    from jasper_store.store.store import TensorStore

__all__ = ["ReopenSpec", "digest_of", "same", "stats_of"]


def stats_of(specs: Sequence[TensorSpec]) -> dict[Path, tuple[int, int]]:
    """Size and modification time of every file, as they are when it is opened."""
    found = {}
    for path in dict.fromkeys(spec.path for spec in specs):
        facts = path.stat()
        found[path] = (facts.st_size, facts.st_mtime_ns)
    return found


def digest_of(specs: Sequence[TensorSpec], stats: Mapping[Path, tuple[int, int]]) -> str:
    """Short text that changes whenever a file does, or where a tensor lies in it."""
    digest = xxhash.xxh3_64()
    for spec in sorted(specs, key=lambda spec: spec.name):
        location = "" if isinstance(spec.location, Inline) else repr(spec.location)
        digest.update(repr((spec.name, str(spec.dtype), spec.shape, location, stats[spec.path])).encode())
    return digest.hexdigest()


class ReopenSpec:
    """How to open a store again in another process; what a store and its tensors pickle as. Small at any size."""

    def __init__(
        self,
        path: Path,
        format: FormatName,  # noqa: A002 - the word that users pass
        schema: Schema,
        dtype: torch.dtype | None,
        digest: str,
    ) -> None:
        self.path = path
        self.format = format
        self.schema = schema
        self.dtype = dtype
        self.digest = digest
        self.on_device = False

    def __reduce__(self) -> tuple[Any, ...]:
        if self.on_device:
            msg = (
                f"{self.path}: data that is resident on a CUDA device cannot be sent to another process; "
                "use num_workers=0, or device=None with workers"
            )
            raise IncompatibleOptionsError(msg, path=self.path)
        schema = (
            self.schema.required,
            dict(self.schema.hdf5_paths),
            dict(self.schema.hdf5_aliases),
            dict(self.schema.reads_per_sample),
            self.schema.stacks,
            self.schema.optional,
        )
        return (_reopen, (self.path, self.format, schema, self.dtype, self.digest))


def _reopen(
    path: Path,
    format: FormatName,  # noqa: A002
    schema_parts: tuple[Any, ...],
    dtype: torch.dtype | None,
    digest: str,
) -> TensorStore:
    """Open a store where it was unpickled: everything that can be is mapped, and nothing is said twice."""
    from jasper_store.store.planning import plan_for
    from jasper_store.store.store import TensorStore

    schema = Schema(*schema_parts)
    located = locate(path, format, schema)
    stats = stats_of(located.specs)
    if digest_of(located.specs, stats) != digest:
        msg = (
            f"{path}: the files changed after the store was opened, so this process would see other data than the one "
            "that sent it; open the dataset again, then start the workers"
        )
        raise CorruptFileError(msg, path=path)
    plan = plan_for(located, schema, use_mmap=True, dtype=dtype)
    return TensorStore(ReopenSpec(path, format, schema, dtype, digest), located, plan, stats=stats)


def same(store: TensorStore) -> TensorStore:
    """What a store's pickle calls on what its recipe became."""
    return store
