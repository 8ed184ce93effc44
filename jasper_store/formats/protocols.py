"""What a format does, as protocols: a small required core, and what some formats do besides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch

    from jasper_store.formats.base import FormatName, Schema, Skipped, TensorSpec

__all__ = [
    "FileWriter",
    "Format",
    "ReadFormat",
    "SupportsKeys",
    "SupportsRagged",
    "SupportsReference",
    "SupportsSkipped",
]


@runtime_checkable
class FileWriter(Protocol):
    """One file being written, tensor after tensor, rows appended in order. Not safe for concurrent use.

    The caller owns the temporary name, the fsync, the rename and the removal on failure; a writer only fills
    the file it is given. ``begin``/``append``/``end`` may repeat where the format holds several tensors in a
    file (HDF5); a per-tensor format accepts exactly one.
    """

    def begin(self, name: str, dtype: torch.dtype, row_shape: tuple[int, ...] | None, rows: int | None) -> None:
        """Start a tensor of shape ``(rows, *row_shape)``; ``row_shape=None`` is a scalar, ``rows=None`` unknown."""

    def append(self, rows: torch.Tensor) -> None:
        """Append a block [n, *row_shape] of the tensor begun (a scalar: one block of shape [])."""

    def end(self) -> None:
        """Finish the tensor begun."""

    def close(self) -> None:
        """Finish the file; the file is readable afterwards. Without it, the file must not open."""

    def abort(self) -> None:
        """Release every handle without finishing; safe to call at any time, also twice."""


class ReadFormat(Protocol):
    """One file format that is read. Stateless; every method may be called concurrently.

    Attributes:
        name: the name users pass, e.g. ``"safetensors"``.
        suffixes: file name endings, lower case with the dot, the first being the one that is written.
        one_file: name of the single file that a dataset of this format lies in, or ``None`` if each tensor
            has its own file.
    """

    name: FormatName
    suffixes: tuple[str, ...]
    one_file: str | None

    def locate(self, path: Path, schema: Schema) -> list[TensorSpec]:
        """Parse the header of one file; read no tensor data.

        Raises:
            CorruptFileError: the file is truncated, damaged, hostile or of an unsupported kind.
            DatasetNotFoundError: there is no such file.
        """


class Format(ReadFormat, Protocol):
    """One file format that is read and written."""

    def writer(self, path: Path, schema: Schema, *, compression: str | None = None) -> FileWriter:
        """Create ``path`` (it must not exist) and return a writer for it.

        Raises:
            IncompatibleOptionsError: a compression that this format does not have.
        """


@runtime_checkable
class SupportsSkipped(Protocol):
    """A format whose files may hold more than tensors."""

    def skipped(self, path: Path, schema: Schema) -> list[Skipped]:
        """What :meth:`ReadFormat.locate` passes over in one file; errors as there."""


@runtime_checkable
class SupportsKeys(Protocol):
    """A format that names a file's only tensor by its file, although the file has a name for it."""

    def locate_keys(self, path: Path) -> list[TensorSpec]:
        """As :meth:`ReadFormat.locate`, with the names that the file has."""


@runtime_checkable
class SupportsRagged(Protocol):
    """A format that has its own form for ragged tensors, beside a file of values and a file of offsets."""

    def write_ragged(self, path: Path, offsets: torch.Tensor, blocks: Iterable[torch.Tensor]) -> None:
        """Create ``path`` holding one ragged tensor, with memory bounded by one block.

        Args:
            path: the file to create; it must not exist. On failure it is left behind, and opens nowhere.
            offsets: int64 [rows + 1]; row i has the values from ``offsets[i]`` up to ``offsets[i + 1]``.
            blocks: 1-D int64 tensors that, one after another, make all values.

        Raises:
            IntegrityError: offsets that do not ascend from 0, or more or fewer values than they say.
        """


@runtime_checkable
class SupportsReference(Protocol):
    """A format that another library defines, whose view of a file is compared with ours."""

    def compare_with_reference(self, path: Path) -> list[str]:
        """Differences between the reference's view of a file and ours: names, dtypes and shapes.

        Returns:
            A sentence for each difference, or what the reference says of a file that it refuses; none where both agree.

        Raises:
            CorruptFileError, DatasetNotFoundError: as ``locate``.
        """
