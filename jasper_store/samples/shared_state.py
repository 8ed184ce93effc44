"""The few numbers that every worker must see change: epoch, forced variant, generation of reloaded tensors.

A DataLoader copies its dataset into each worker, and persistent workers keep that copy from epoch to epoch; an
attribute set in the main process never reaches them. These numbers live in shared memory instead.
"""

from __future__ import annotations

import torch

__all__ = ["SharedState"]

_EPOCH, _FORCED, _GENERATION = range(3)
_NOT_FORCED = -1


class SharedState:
    """Shared numbers of one dataset. One process writes (the trainer's), any number read; each number is one word.

    Pickled for a worker, it refers to the same memory; pickled by value (to a file, to another machine), it becomes
    an independent copy.
    """

    __slots__ = ("_seen", "_words")

    def __init__(self, epoch: int) -> None:
        self.__setstate__(torch.tensor([epoch, _NOT_FORCED, 0], dtype=torch.int64))

    def copy(self) -> SharedState:
        """The same numbers in memory of their own."""
        made = SharedState(0)
        made._words.copy_(self._words)
        return made

    def read(self) -> tuple[int, int | None, int]:
        """Epoch, forced variant (``None`` if it is drawn), generation of reloaded tensors."""
        epoch, forced, generation = self._seen.tolist()
        return epoch, None if forced == _NOT_FORCED else forced, generation

    def set_epoch(self, epoch: int) -> None:
        """Publish the epoch."""
        self._words[_EPOCH] = epoch

    def force(self, variant: int | None) -> None:
        """Publish a forced variant, or ``None`` to have it drawn."""
        self._words[_FORCED] = _NOT_FORCED if variant is None else variant

    def tensors_changed(self) -> None:
        """Tell every process to read the reloaded tensors anew before its next batch."""
        self._words[_GENERATION] += 1

    def __getstate__(self) -> torch.Tensor:
        words: torch.Tensor = self._words
        return words

    def __setstate__(self, words: torch.Tensor) -> None:
        # Idempotent for memory that is shared already; a copy by value becomes shareable again.
        self._words = _shared(words)
        # The same memory: reading it takes a quarter of the time of a tensor, and each batch does.
        self._seen = self._words.numpy().data


def _shared(words: torch.Tensor) -> torch.Tensor:
    """The same numbers in memory that children share."""
    return words.share_memory_()  # type: ignore[no-untyped-call, no-any-return]
