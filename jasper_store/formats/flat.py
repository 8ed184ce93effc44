"""The writer of formats that are one header followed by the bytes of one tensor (safetensors, ``.npy``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, Protocol

from jasper_store.errors import IncompatibleOptionsError
from jasper_store.formats.files import DATA_START, TensorBeingWritten, create_file, require_open, tensor_bytes, write_at

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__all__ = ["FlatWriter", "MakeHeader", "stem_of"]


class MakeHeader(Protocol):
    """Makes the header once name, dtype, shape and bytes of the only tensor are known."""

    def __call__(self, path: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int) -> bytes:
        """Exactly ``DATA_START`` bytes.

        Raises:
            IncompatibleOptionsError: the format cannot hold this dtype.
        """


def stem_of(path: Path, suffixes: tuple[str, ...]) -> str:
    """The file name without the format's suffix: ``a.values.npy`` is ``a.values``."""
    lower = path.name.lower()
    for suffix in suffixes:
        if lower.endswith(suffix) and len(lower) > len(suffix):
            return path.name[: -len(suffix)]
    return path.name


class FlatWriter:
    """Writes one tensor behind a header of one page. The page stays zero, which opens nowhere, until ``close``."""

    def __init__(self, path: Path, make_header: MakeHeader) -> None:
        self._path = path
        self._make_header = make_header
        self._tensor: TensorBeingWritten | None = None
        self._header: bytes | None = None
        self._end = DATA_START
        self._file: BinaryIO | None = create_file(path)

    def begin(self, name: str, dtype: torch.dtype, row_shape: tuple[int, ...] | None, rows: int | None) -> None:
        """See :class:`jasper_store.formats.protocols.FileWriter`; exactly once."""
        require_open(self._file is not None, self._path)
        if self._tensor is not None:
            msg = f"{self._path}: this format holds one tensor a file; {self._tensor.name!r} is in it already."
            raise IncompatibleOptionsError(msg, path=self._path, tensor=name)
        tensor = TensorBeingWritten(name, dtype, row_shape, rows)
        # Called now only for its refusal: better before the data than after it.
        self._make_header(self._path, name, dtype, tensor.shape, 0)
        self._tensor = tensor

    def append(self, rows: torch.Tensor) -> None:
        """See :class:`jasper_store.formats.protocols.FileWriter`."""
        tensor, file = self._current()
        data = tensor_bytes(tensor.take(rows))
        write_at(file, self._end, data.data)
        self._end += data.nbytes

    def end(self) -> None:
        """See :class:`jasper_store.formats.protocols.FileWriter`."""
        tensor, _ = self._current()
        tensor.finish()
        self._header = self._make_header(self._path, tensor.name, tensor.dtype, tensor.shape, self._end - DATA_START)

    def close(self) -> None:
        """See :class:`jasper_store.formats.protocols.FileWriter`."""
        file = self._file
        if file is None:
            return
        if self._header is None:
            msg = f"{self._path}: close() needs one tensor, begun and ended; use abort() to give up."
            raise IncompatibleOptionsError(msg, path=self._path)
        write_at(file, 0, self._header)
        self.abort()

    def abort(self) -> None:
        """See :class:`jasper_store.formats.protocols.FileWriter`."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _current(self) -> tuple[TensorBeingWritten, BinaryIO]:
        require_open(self._file is not None, self._path)
        if self._tensor is None or self._header is not None or self._file is None:
            msg = f"{self._path}: no tensor is begun; the order is begin, append..., end, close."
            raise IncompatibleOptionsError(msg, path=self._path)
        return self._tensor, self._file
