"""Datasets written: at once, appended to, by many writers, and made one part of many again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from jasper_store.conversion import commit as committing, compact as compaction, writer
from jasper_store.conversion.compact import CompactReport
from jasper_store.errors import IncompatibleOptionsError, IntegrityError, JasperStoreError
from jasper_store.files.hub import require_local
from jasper_store.formats.base import TensorSpec
from jasper_store.formats.registry import base_name
from jasper_store.jasper.config import CONFIG_NAME, Config, parse_config, read_config
from jasper_store.jasper.integrity import check_structure, require_structure
from jasper_store.jasper.recognise import Known, known_at
from jasper_store.jasper.schema import SCHEMA, SPLITS, split_tensor
from jasper_store.samples.compiler import build_graph
from jasper_store.samples.declaration import CONFIG_KEY, Declaration
from jasper_store.samples.opened import packed_at

__all__ = ["DatasetWriter", "commit", "compact"]


class DatasetWriter(writer.DirectoryWriter):
    """Build a dataset larger than memory: rows appended tensor by tensor, block by block, published atomically.

    Nothing that opens is left behind by a writer that is abandoned or killed.

    ``mode="append"`` adds rows to a dataset that is there: no old byte is read or copied, :meth:`close` publishes the
    longer dataset in one step, and readers keep what they have opened. With ``shard=k, shards=n`` many processes or
    hosts write one dataset, which :func:`commit` publishes.

    Args:
        path: directory to make, or to append to.
        format: ``"safetensors"``, ``"npy"``, ``"hdf5"`` or ``"pt"``; by default the first, or that of the dataset that
            is appended to.
        compression: HDF5 only.
        config: written as ``config.json``.
        overwrite: replace a dataset that is there.
        samples: what a sample reads: ``{"fields": {...}, "splits": {...}}``, or the fields alone; written into
            ``config.json``, and checked against the tensors before anything is published.
        mode: ``"create"`` or ``"append"``.
        shard: number of the shard that is written, from 0; a writer that is run again replaces its shard.
        shards: how many shards there are.

    Raises:
        ConversionError: the target is there already, or is not there to be appended to, has another writer, cannot be
            written, or has no room.
        DatasetNotFoundError, IntegrityError: on closing: ``config`` is that of a JASPER dataset, and tensors of one are
            missing (the message names all of them) or contradict it.
        IncompatibleOptionsError: the dataset that is appended to is packed.
        IntegrityError: rows of another dtype or shape than the dataset's; on closing, tensors that did not grow alike.
        DeclarationError: ``samples`` cannot be understood; on closing, that it does not fit the tensors.

    Example:
        >>> with js.DatasetWriter("out", samples={"emb": "embeddings[i]", "label": "labels[i]"}) as writer:  # doctest: +SKIP
        ...     for block in embed(texts):
        ...         writer.append("embeddings", block)
    """

    def __init__(
        self,
        path: str | PathLike[str],
        format: str | None = None,  # noqa: A002
        *,
        compression: str | None = None,
        config: dict[str, object] | None = None,
        overwrite: bool = False,
        samples: Mapping[str, Any] | None = None,
        mode: str = "create",
        shard: int | None = None,
        shards: int | None = None,
    ) -> None:
        require_local(path)
        declaration = None if samples is None else _declared(samples)
        if declaration is not None:
            config = {**(config or {}), CONFIG_KEY: declaration.to_config()}
        # The names of a declared dataset are its author's.
        schema = SCHEMA if declaration is None else None
        check = _whole(Path(path), declaration, config)
        if mode == "append":
            _refuse_packed(
                Path(path), "rows of it are those of the dataset that it was packed from; append to that one"
            )
        if mode == "append" and config is None:
            known = known_at(Path(path))
            schema, check = known.schema, _fits(known, Path(path))
        super().__init__(
            path,
            format=format,
            compression=compression,
            config=config,
            overwrite=overwrite,
            schema=schema,
            check=check,
            mode=mode,
            shard=shard,
            shards=shards,
        )


def commit(path: str | PathLike[str]) -> Path:
    """Publish the shards that ``DatasetWriter(path, shard=k, shards=n)`` wrote: nothing is visible before, all after.

    The shards' rows follow each other by their numbers, behind those of a dataset that is there. Files are moved, not
    copied. A commit that was killed is run again.

    Args:
        path: the dataset's directory.

    Returns:
        The directory.

    Raises:
        ConversionError: shards are missing, which the message names, or still being written; or there are none.
        IntegrityError: shards that do not fit each other, or the dataset.
        DeclarationError: what ``config.json`` declares does not fit the tensors.
        CorruptFileError: a shard is not the one that was written.

    Example:
        >>> with js.DatasetWriter("out", shard=rank, shards=world_size) as writer:  # doctest: +SKIP
        ...     writer.append("embeddings", embed(my_texts))
        >>> js.commit("out")  # once, when all are done  # doctest: +SKIP
    """
    require_local(path)
    known = known_at(Path(path))
    first = committing.first_shard(Path(path)) if known.declaration is None else None
    if first is not None:
        known = known_at(first)  # the configuration comes with the shards
    where = Path(path) if first is None else first
    return committing.commit(path, schema=known.schema, check=_fits(known, where))


def compact(
    path: str | PathLike[str],
    *,
    remove_old: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> CompactReport:
    """Make one part of many, for each tensor of a dataset that has more than one: bounded memory, one step, proven.

    Args:
        path: the dataset's directory.
        remove_old: remove the files that only older generations have; readers that have one of these open lose it.
        progress: called as ``progress(tensor, done_bytes, total_bytes)`` after each block.

    Returns:
        A report; ``str(report)`` is for people.

    Raises:
        ConversionError: no dataset, no room, another writer, or values that read back differently.
        IncompatibleOptionsError: the dataset is packed.
        CorruptFileError: a part is not the one that was written.
    """
    require_local(path)
    _refuse_packed(Path(path), "compacting would take the blocks apart")
    return compaction.compact(path, remove_old=remove_old, progress=progress, schema=known_at(Path(path)).schema)


def _refuse_packed(path: Path, why: str) -> None:
    """Refuse to change a packed dataset other than by packing.

    Raises:
        IncompatibleOptionsError: it is one.
    """
    if packed_at(path) is not None:
        raise IncompatibleOptionsError(f"{path} is packed, and {why}; pack again (jasper-store pack)", path=path)


def _fits(known: Known, where: Path) -> Callable[[Sequence[TensorSpec]], None] | None:
    """What a dataset that grows has to keep to, where it is known what its samples read."""
    declaration = known.declaration
    if declaration is None:
        return None
    if known.schema is not SCHEMA:
        return partial(_require_fit, declaration)
    try:
        config = read_config(where)  # now, since a commit moves the shard that it comes with
    except JasperStoreError:
        # Tensors with names of JASPER's, and no configuration of one: only their lengths are compared.
        return None

    def fits(specs: Sequence[TensorSpec]) -> None:
        by_name = {spec.name: spec for spec in specs}
        # It is no JASPER dataset before it has all tensors.
        if not known.schema.required <= {base_name(name) for name in by_name}:
            return
        try:
            check_structure(by_name, config, [split for split in SPLITS if split_tensor(split) in by_name], where)
        except IntegrityError as exc:
            msg = (
                f"{where}: expected tensors that still fit each other, found: {exc}. Nothing was published. Append to all of "
                "them; if split_sizes of config.json are in the way, take them out: sizes are then those of the tensors"
            )
            raise IntegrityError(msg, path=where, tensor=exc.tensor) from exc

    return fits


def _declared(samples: Mapping[str, Any]) -> Declaration:
    """A declaration in the form that ``config.json`` has, or its fields alone."""
    if isinstance(samples.get("fields"), Mapping):
        return Declaration.from_config({CONFIG_KEY: samples}, Path("samples=")) or Declaration.parse({})
    return Declaration.parse(samples)


def _whole(
    path: Path, declaration: Declaration | None, config: Mapping[str, Any] | None
) -> Callable[[Sequence[TensorSpec]], None] | None:
    """What the tensors are checked for before they are published; nothing where nothing is known of them."""
    if declaration is not None:
        return partial(_require_fit, declaration)
    if not {"embedding_dim", "n_neg"} <= (config or {}).keys():
        return None
    return partial(_require_jasper, parse_config(config or {}, path / CONFIG_NAME), path)


def _require_jasper(config: Config, path: Path, specs: Sequence[TensorSpec]) -> None:
    """Refuse to publish, under the configuration of a JASPER dataset, tensors that are none."""
    by_name = {spec.name: spec for spec in specs}
    require_structure(by_name, config, path)


def _require_fit(declaration: Declaration, specs: Sequence[TensorSpec]) -> None:
    """Refuse to publish tensors that the declaration does not fit."""
    by_name = {spec.name: spec for spec in specs}
    for split in declaration.parts:
        build_graph(declaration, by_name, split)
