"""What every format has in common: where the bytes of a tensor lie.

A format only says *where the bytes lie*. Reading a file means parsing its header once into
:class:`TensorSpec` values; no data is read. Mapping, preloading, prefetching and warming are done by the
layers above, alike for every format, from the spec alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import xxhash

from jasper_store.formats.file_list import texts_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    import torch

__all__ = [
    "Chunked",
    "Encoded",
    "Extent",
    "FormatName",
    "Inline",
    "Location",
    "Parts",
    "Schema",
    "Skipped",
    "Streamed",
    "TensorSpec",
    "contiguous_strides",
]

FormatName: TypeAlias = Literal["safetensors", "npy", "hdf5", "pt", "arrow", "faiss", "bin", "npz", "pickle", "parquet"]


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of one tensor in one file, lying there exactly as they would lie in memory (little-endian).

    Attributes:
        path: the file.
        offset: byte offset of element [0, 0, ...] from the start of the file.
        strides: elements to step per dimension, as in ``torch.Tensor.stride()``; ``None`` means C order.
            Only ``.pt`` (saved views) and ``.npy`` (Fortran order) ever need them. Never negative.
    """

    path: Path
    offset: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Chunked:
    """A tensor that has no single extent (chunked or compressed HDF5, or never written) and needs its own reader.

    Attributes:
        path: the HDF5 file.
        key: object path of the dataset inside it, without a leading slash.
        chunk_shape: elements per chunk along each dimension; ``None`` where the layout is not chunked.
        filters: the pipeline in words, e.g. ``"shuffle+gzip(4)"``; ``""`` if there is none.
    """

    path: Path
    key: str
    chunk_shape: tuple[int, ...] | None
    filters: str


@dataclass(frozen=True, slots=True, eq=False)
class Inline:
    """A tensor whose values came with the header (a ``.pt`` list of lists, one tiny HDF5 dataset per row).

    Attributes:
        path: the file it was read from.
        values: the tensor itself, in host memory.
    """

    path: Path
    values: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Rows of one tensor that lie in several places, one part after another; each part is one run of whole rows in C order.

    Made by :func:`jasper_store.formats.parts.join`, which checks what the parts have to have in common. Parts without
    rows are left out. A tensor in one place is an :class:`Extent`, never one part.

    Attributes:
        files: the files, each once, in the order in which their first rows come.
        file_of: of each part, the number of its file in ``files``, int64 [parts].
        offsets: of each part, the byte offset of its first row in its file, int64 [parts].
        starts: first row of each part, and in the end the number of rows, int64 [parts + 1]; ascending from 0.
    """

    files: Sequence[Path]
    file_of: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray

    @property
    def path(self) -> Path:
        """The file of the first part."""
        return self.files[0]

    def __len__(self) -> int:
        return len(self.offsets)

    def __repr__(self) -> str:
        # What stands here goes into the digest of a store: all of it, and in few bytes.
        facts = xxhash.xxh3_64(b"".join(a.tobytes() for a in (self.file_of, self.offsets, self.starts))).hexdigest()
        names = xxhash.xxh3_64("\0".join(texts_of(self.files)).encode()).hexdigest()
        return f"Parts({len(self)} in {len(self.files)} files from {self.path}, {facts}, {names})"


FileFacts: TypeAlias = tuple[int, int, int, int]
"""What the system says of a file: bytes, modification time in nanoseconds, number in its file system, number of that."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """Values that can only be read from the first to the last: a deflated member of a ``.npz``, a Parquet column.

    They are converted in bounded memory, or loaded whole; :class:`jasper_store.formats.streams.ByteStream` reads them.

    Attributes:
        files: the files, in the order of their rows.
        kind: what reads them, ``"npz"`` or ``"parquet"``.
        key: member or column, as it is called in each file.
    """

    files: tuple[Path, ...]
    kind: Literal["npz", "parquet"]
    key: str

    @property
    def path(self) -> Path:
        """The file of the first rows."""
        return self.files[0]


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A tensor that is made out of strings while they are read; only a conversion reads it, from front to end.

    Attributes:
        files: the files of the strings, in the order of their rows.
        blocks: makes the values as 1-D blocks, in order; may be called again.
    """

    files: tuple[Path, ...]
    blocks: Callable[[], Iterator[torch.Tensor]]

    @property
    def path(self) -> Path:
        """The file of the first strings."""
        return self.files[0]


Location: TypeAlias = Extent | Chunked | Inline | Parts | Streamed | Encoded


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Element strides of a C-ordered tensor of this shape, as ``torch.empty(shape).stride()`` gives them."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a file: all that its header says. Immutable, cheap, picklable.

    Attributes:
        name: the tensor's name in the store, e.g. ``"source_embs"``; a ragged tensor ``X`` is two specs,
            ``X.values`` (1-D) and ``X.offsets`` (int64, rows + 1).
        dtype: torch dtype of the values.
        shape: sizes; ``()`` for a scalar.
        location: where the values are.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    location: Location

    @property
    def path(self) -> Path:
        """The file that holds the values; of several, the first."""
        return self.location.path

    @property
    def paths(self) -> Sequence[Path]:
        """All files that hold the values."""
        return self.location.files if isinstance(self.location, Parts | Streamed | Encoded) else (self.location.path,)

    @property
    def path_texts(self) -> tuple[str, ...]:
        """The same as texts: of ten thousand files, in a hundredth of the time."""
        return texts_of(self.paths)

    @property
    def n_rows(self) -> int:
        """Size of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row, ``shape[1:]``, when laid out in C order."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all values when laid out in C order."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether the values are one run of bytes in C order, so that row i is at offset + i * row_nbytes; not of parts."""
        if not isinstance(self.location, Extent):
            return False
        strides = self.location.strides
        if strides is None:
            return True
        expected = contiguous_strides(self.shape)
        return all(s == e for s, e, n in zip(strides, expected, self.shape, strict=True) if n > 1) or 0 in self.shape


@dataclass(frozen=True)
class Skipped:
    """Something in a file that is no tensor, or none that can be read, and that is passed over.

    Attributes:
        name: what the file calls it.
        path: the file.
        reason: what it is, and what to do to have it, for people.
    """

    name: str
    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.name!r:.100} is skipped: {self.reason}"


@dataclass(frozen=True, slots=True)
class Schema:
    """What a caller knows about the tensors of a dataset before any file is opened.

    The storage layers know no dataset's names; a layer above hands them down in this. The default knows
    nothing: HDF5 paths are the names, and each tensor is read one row per sample.

    Attributes:
        required: names that a complete dataset holds (ragged tensors by their base name).
        optional: names that belong to it too, and that it may lack.
        hdf5_paths: tensor name to the HDF5 path it is written to and read from (base name for ragged ones).
        hdf5_aliases: other HDF5 paths to the tensor name that they mean.
        reads_per_sample: rows of a tensor that one training sample reads; a name that is missing reads 1.0.
        stacks: tensors that a batch gathers together, each row from one of them; see ``store/concat_buffer.py``.
        together: tensors that are preloaded all or not at all, since they are read together in runs.
    """

    required: frozenset[str] = frozenset()
    hdf5_paths: Mapping[str, str] = field(default_factory=dict)
    hdf5_aliases: Mapping[str, str] = field(default_factory=dict)
    reads_per_sample: Mapping[str, float] = field(default_factory=dict)
    stacks: tuple[tuple[str, ...], ...] = ()
    optional: frozenset[str] = frozenset()
    together: frozenset[str] = frozenset()

    def hdf5_path(self, name: str) -> str:
        """HDF5 path of a tensor; of ``X.values`` and ``X.offsets``, the ragged group's path and the part."""
        base, dot, part = name.rpartition(".")
        if dot and part in {"values", "offsets"} and base in self.hdf5_paths:
            return f"{self.hdf5_paths[base]}/{part}"
        return self.hdf5_paths.get(name, name)

    def reads(self, name: str) -> float:
        """Rows of a tensor that one sample reads (expected value; 0 for a tensor that training never reads)."""
        base, dot, part = name.rpartition(".")
        if dot and part in {"values", "offsets"}:
            name = base if base in self.reads_per_sample else name
        return self.reads_per_sample.get(name, 1.0)
