"""Values that can only be read from the first to the last."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch

from jasper_store.errors import CorruptFileError
from jasper_store.formats.base import Streamed
from jasper_store.formats.npz import member_bytes
from jasper_store.formats.parquet import column_bytes

if TYPE_CHECKING:
    from collections.abc import Generator

    from jasper_store.formats.base import TensorSpec

__all__ = ["ByteStream"]


class ByteStream:
    """The values of a streamed tensor, in order, with memory bounded by one block. Not safe for concurrent use.

    Args:
        spec: a tensor whose location is :class:`jasper_store.formats.base.Streamed`.
    """

    def __init__(self, spec: TensorSpec) -> None:
        self._spec = spec
        self._blocks = _blocks(spec)
        self._rest = memoryview(b"")
        self._left = spec.nbytes

    def fill(self, out: torch.Tensor) -> None:
        """Read the next values into ``out``, C-ordered and of the tensor's dtype.

        Raises:
            CorruptFileError: there are fewer values than the file said, or more, or it is damaged.
        """
        view = out.reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            if not self._rest:
                self._rest = next(self._blocks, memoryview(b""))
                if not self._rest:
                    self._refuse("fewer")
            part = self._rest[: len(view) - done]
            view[done : done + len(part)] = part
            self._rest = self._rest[len(part) :]
            done += len(part)
        self._left -= done
        # Checksums and the lengths of the last lists are compared where the stream ends.
        if not self._left and (self._rest or next(self._blocks, None) is not None):
            self._refuse("more")

    def close(self) -> None:
        """Release the files."""
        self._blocks.close()

    def _refuse(self, how: str) -> NoReturn:
        path = self._spec.path
        msg = (
            f"{path}: tensor {self._spec.name!r} was expected to have {self._spec.nbytes} bytes, found {how}: the file is "
            "damaged or was changed; write it again"
        )
        raise CorruptFileError(msg, path=path, tensor=self._spec.name)


def _blocks(spec: TensorSpec) -> Generator[memoryview, None, None]:
    place = spec.location
    assert isinstance(place, Streamed)
    for path in place.files:
        if place.kind == "npz":
            for block in member_bytes(path, place.key):
                yield memoryview(block)
        else:
            yield from column_bytes(path, spec, place.key)
