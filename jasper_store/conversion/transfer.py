"""One file's values from source to target: read, narrowed, hashed and written block by block, then proven."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from jasper_store.conversion.checksum import Hasher, checksum
from jasper_store.conversion.narrow import Narrowing
from jasper_store.conversion.rows import read_blocks
from jasper_store.conversion.writeback import WINDOW_NBYTES, WriteBehind, drop_pages
from jasper_store.errors import ConversionError
from jasper_store.formats.base import Chunked, Extent
from jasper_store.formats.files import DATA_START
from jasper_store.formats.protocols import SupportsRagged, SupportsReference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from jasper_store.conversion.plan import FileTask
    from jasper_store.formats.base import Schema, TensorSpec
    from jasper_store.formats.protocols import Format

__all__ = ["Options", "Stream", "Written", "compressed_nbytes", "matched", "require_reference", "write_file"]


@dataclass(frozen=True)
class Options:
    """How tensors are written.

    Attributes:
        fmt: the target's format.
        schema: names and HDF5 paths.
        compression: as :meth:`jasper_store.formats.protocols.Format.writer` takes it.
        dtype: dtype to narrow floating tensors to; ``None`` keeps every value.
        drop: whether to keep the page cache free of what was read and written.
    """

    fmt: Format
    schema: Schema
    compression: str | None = None
    dtype: torch.dtype | None = None
    drop: bool = False


@dataclass(frozen=True)
class Written:
    """One tensor that was written and read back.

    Attributes:
        spec: the tensor in the source.
        target: the tensor in the temporary file.
        checksum: of the values in the target.
        seconds: time it took, the proof included.
        max_error: largest absolute error of narrowing; ``None`` where there was none to do.
    """

    spec: TensorSpec
    target: TensorSpec
    checksum: str
    seconds: float
    max_error: float | None


class Stream:
    """The values of one tensor as they are to be written: blocks in order, hashed on the way. Iterate once."""

    def __init__(
        self,
        spec: TensorSpec,
        dtype: torch.dtype,
        *,
        drop: bool = False,
        on_bytes: Callable[[str, int], None] | None = None,
    ) -> None:
        self.dtype = dtype
        self._spec = spec
        self._drop = drop
        self._on_bytes = on_bytes
        self._hasher = Hasher()
        self._narrowing = Narrowing(spec.name, dtype) if dtype != spec.dtype else None

    def __iter__(self) -> Iterator[torch.Tensor]:
        row = 0
        blocks = read_blocks(self._spec, drop=self._drop)
        try:
            for block in blocks:
                values = block if self._narrowing is None else self._narrowing.cast(block, row)
                self._hasher.update(values)
                yield values
                row += len(block) if block.ndim else 1
                if self._on_bytes is not None:
                    self._on_bytes(self._spec.name, block.nbytes)
        finally:
            blocks.close()

    def run(self) -> str:
        """Read everything for its checksum alone."""
        for _ in self:
            pass
        return self.checksum

    @property
    def checksum(self) -> str:
        """Checksum of the values that were yielded."""
        return self._hasher.hexdigest()

    @property
    def max_error(self) -> float | None:
        """Largest absolute error that narrowing made; ``None`` where nothing was narrowed."""
        return None if self._narrowing is None else self._narrowing.max_error


def write_file(
    task: FileTask, path: Path, options: Options, on_bytes: Callable[[str, int], None] | None = None
) -> list[Written]:
    """Write one file under a temporary name and prove that it holds the source's values.

    The file is neither flushed nor named; on failure it is left to the caller to remove.

    Args:
        task: what goes into it.
        path: the temporary name; nothing is there.
        options: how.
        on_bytes: called with a tensor's name and the bytes of each block of the source that was written.

    Raises:
        ConversionError: the values read back are not those that were written.
        IntegrityError: narrowing would make a finite value infinite.
        CorruptFileError: the source is damaged.
        OSError: the system refused.
    """
    fmt = options.fmt
    tensors = list(task.written(options.dtype))
    streams = [Stream(spec, dtype, drop=options.drop, on_bytes=on_bytes) for spec, dtype in tensors]
    specs = [spec for spec, _ in tensors]
    started = time.perf_counter()
    if task.ragged is not None and isinstance(fmt, SupportsRagged):
        # A task of a ragged tensor names its values first.
        values, offsets = streams
        fmt.write_ragged(path, _whole(offsets), values)
        seconds = [time.perf_counter() - started] * 2
        behind: list[str | None] = [None] * 2
    else:
        seconds, behind = _write_tensors(specs, streams, path, options)
    return _prove(task, specs, streams, seconds, behind, path, options)


def _whole(stream: Stream) -> torch.Tensor:
    """All offsets of a ragged tensor, in memory: 8 bytes a row."""
    return torch.cat([torch.empty(0, dtype=stream.dtype), *(block.clone() for block in stream)])


def _write_tensors(
    specs: Sequence[TensorSpec], streams: Sequence[Stream], path: Path, options: Options
) -> tuple[list[float], list[str | None]]:
    """Seconds of each tensor, and its checksum read back while it was written where that could be done."""
    seconds: list[float] = []
    behind: list[str | None] = []
    writer = options.fmt.writer(path, options.schema, compression=options.compression)
    follower: WriteBehind | None = None
    try:
        if sum(spec.nbytes for spec in specs) >= WINDOW_NBYTES:
            # Only a file of one tensor has its values at a place that is known before it is finished.
            start = DATA_START if options.fmt.one_file is None else None
            follower = WriteBehind(path, start=start, drop=options.drop)
        total = 0
        for spec, stream in zip(specs, streams, strict=True):
            started = time.perf_counter()
            writer.begin(spec.name, stream.dtype, spec.shape[1:] if spec.shape else None, spec.n_rows)
            for block in stream:
                writer.append(block)
                total += block.nbytes
                if follower is not None:
                    follower.written(total)
            writer.end()
            seconds.append(time.perf_counter() - started)
        found = follower.finish(total) if follower is not None else None
        behind = [found] * len(specs)
        writer.close()
    except BaseException:
        writer.abort()
        raise
    finally:
        if follower is not None:
            follower.close()
    return seconds, behind


def _prove(
    task: FileTask,
    specs: Sequence[TensorSpec],
    streams: Sequence[Stream],
    seconds: Sequence[float],
    behind: Sequence[str | None],
    path: Path,
    options: Options,
) -> list[Written]:
    """Read every value back and compare checksums, and the header with what the format's own library makes of it."""
    if options.drop:
        with path.open("rb") as file:
            drop_pages(file.fileno())
    targets = matched(task, options.fmt.locate(path, options.schema), one_tensor=options.fmt.one_file is None)
    proven = []
    for spec, stream, spent, early in zip(specs, streams, seconds, behind, strict=True):
        started = time.perf_counter()
        target = targets.get(spec.name)
        if target is None or target.dtype != stream.dtype or target.shape != spec.shape:
            found = "nothing" if target is None else f"{target.dtype} {list(target.shape)}"
            msg = (
                f"{task.target}: {spec.name} was written as {stream.dtype} {list(spec.shape)}, reading back found "
                f"{found}; nothing was published. This is a fault of jasper_store: please report it"
            )
            raise ConversionError(msg, path=task.target, tensor=spec.name)
        known = early is not None and isinstance(target.location, Extent) and target.location.offset == DATA_START
        back = early if known and target.contiguous else checksum(target)
        if back != stream.checksum:
            msg = (
                f"{task.target}: {spec.name} has checksum {stream.checksum} in the source and {back} when read back "
                "from the target; nothing was published. The disk or the memory is faulty: check both, and run again"
            )
            raise ConversionError(msg, path=task.target, tensor=spec.name)
        spent_in_all = spent + time.perf_counter() - started
        proven.append(Written(spec, target, stream.checksum, spent_in_all, stream.max_error))
    require_reference(options.fmt, path, task.target)
    return proven


def require_reference(fmt: Format, path: Path, target: Path) -> None:
    """Compare a file that was written with what the library that defines its format reads in it, if there is one.

    Args:
        fmt: the format.
        path: where the file lies for now.
        target: where it is meant to lie, for messages.

    Raises:
        ConversionError: names, dtypes or shapes differ, or the library refuses the file.
    """
    differences = fmt.compare_with_reference(path) if isinstance(fmt, SupportsReference) else []
    if differences:
        msg = (
            f"{target}: expected a file that the {fmt.name} library reads as it was written, found: "
            f"{'; '.join(differences[:5])}. Nothing was published. This is a fault of jasper_store: please report it"
        )
        raise ConversionError(msg, path=target)


def matched(task: FileTask, located: Sequence[TensorSpec], *, one_tensor: bool) -> dict[str, TensorSpec]:
    """The tensors of a written file by the names of the source's; formats of one tensor take theirs from the file."""
    if task.ragged is not None:
        parts = {spec.name.rpartition(".")[2]: spec for spec in located}
        return {f"{task.ragged}.{part}": parts[part] for part in ("values", "offsets") if part in parts}
    if one_tensor and len(task.specs) == len(located) == 1:
        return {task.specs[0].name: located[0]}
    return {spec.name: spec for spec in located}


def compressed_nbytes(spec: TensorSpec) -> int:
    """Bytes that a tensor's values take in its file, after compression."""
    if not isinstance(spec.location, Chunked):
        return spec.nbytes
    from jasper_store.formats.hdf5.format import open_file

    with open_file(spec.location.path) as (file, _):
        return int(file[spec.location.key].id.get_storage_size())
