"""xxh3-128 of a tensor's values: what the manifest holds, and what proves that a conversion changed nothing.

The hash is of the values as C-ordered little-endian bytes, so it is the same in every format, layout and
compression. It finds damage and mistakes; it does not protect against two files that were made to have the same hash.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

from jasper_store.conversion.rows import read_blocks
from jasper_store.formats.files import tensor_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from jasper_store.formats.base import TensorSpec

__all__ = ["Hasher", "checksum", "checksum_of"]


class Hasher:
    """Hash of values that arrive block by block; where the blocks are cut does not matter.

    Not safe for concurrent use; hashing lets other threads run.
    """

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()

    def update(self, block: torch.Tensor) -> None:
        """Add a block's values (host memory, any layout)."""
        self._digest.update(tensor_bytes(block).data)

    def hexdigest(self) -> str:
        """32 hex digits."""
        return str(self._digest.hexdigest())


def checksum_of(values: torch.Tensor) -> str:
    """Checksum of values in memory, on any device and in any layout."""
    hasher = Hasher()
    hasher.update(values.cpu())
    return hasher.hexdigest()


def checksum(
    spec: TensorSpec, on_block: Callable[[int, torch.Tensor], None] | None = None, *, drop: bool = False
) -> str:
    """Checksum of a tensor in a file, streamed: memory is a few blocks whatever its size.

    Args:
        spec: the tensor.
        on_block: called with the first row of each block and its values, which are valid during the call.
        drop: whether to drop what was read from the page cache.

    Raises:
        CorruptFileError: the file is shorter than its header says, or a chunk cannot be decompressed.
    """
    hasher = Hasher()
    start = 0
    for values in read_blocks(spec, drop=drop):
        hasher.update(values)
        if on_block is not None:
            on_block(start, values)
        start += len(values) if values.ndim else 1
    return hasher.hexdigest()
