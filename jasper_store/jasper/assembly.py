"""Batches made in the trainer's process: several are gathered at once and handed over as parts.

A batch of 32 samples is a gather of 25 us under 80 us of calls, and most of those calls cost the same for a thousand
samples. So a loader without workers gathers some batches together (measured in docs/notes-paging.md). The parts
are disjoint, each with a version counter of its own, so that a trainer may write to a batch as it likes. What the
trainer sets meanwhile, an epoch, a forced variant, new negatives, holds from its next batch on: what was
gathered before is gathered anew.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import torch

from jasper_store.jasper.batch import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jasper_store.jasper.dataset import JASPERSteeringDataset

__all__ = ["Assembly", "batches_at_once"]

_SAMPLES: Final = 1024
_NBYTES: Final = 16 << 20
"""Bytes gathered at once, at most: beyond it the parts leave the processor's cache before the trainer reads them, and
a batch that is kept would keep too much alive."""


def batches_at_once(batch_size: int, sample_nbytes: int) -> int:
    """How many batches to gather together.

    Args:
        batch_size: samples per batch.
        sample_nbytes: bytes of a sample in a batch.

    Returns:
        At least 1.
    """
    samples = min(_SAMPLES, _NBYTES // max(sample_nbytes, 1))
    return max(1, samples // batch_size)


class Assembly:
    """The batches of one pass. Iterate it from one thread.

    Args:
        dataset: what they are gathered from.
        indices: positions of the samples of each batch.
        collate: makes of a :class:`~jasper_store.jasper.batch.Batch` what the trainer gets.
        at_once: batches that are gathered together.
        pin: copy them to pinned memory.
    """

    def __init__(
        self,
        dataset: JASPERSteeringDataset,
        indices: Iterator[Any],
        collate: Callable[[Any], Any],
        at_once: int,
        *,
        pin: bool = False,
    ) -> None:
        self._dataset = dataset
        self._indices = indices
        self._collate = collate
        self._at_once = at_once
        self._pin = pin
        self._waiting: deque[Any] = deque()  # indices of batches that are gathered and not yet handed over
        self._gathered: dict[str, torch.Tensor] = {}
        self._first = 0  # sample of the gathered ones that the next batch begins with
        self._made_for: object = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._waiting:
            self._waiting.extend(islice(self._indices, self._at_once))
            if not self._waiting:
                self._gathered = {}
                raise StopIteration
            self._gather()
        elif self._made_for != self._dataset.settings():
            self._gather()
        size = len(self._waiting.popleft())
        first, self._first = self._first, self._first + size
        if not self._waiting and not first:
            tensors, self._gathered = self._gathered, {}
        else:
            # .data: a view that autograd does not know to be one, so writing to one batch is no write to another.
            tensors = {key: value[first : first + size].data for key, value in self._gathered.items()}
        return self._collate(Batch(tensors, size))

    def _gather(self) -> None:
        """Gather what is waiting."""
        self._made_for = self._dataset.settings()
        wanted = self._waiting[0]
        if len(self._waiting) > 1:
            # A last batch that is not full may be a list, where the others are tensors on a device.
            device = self._dataset.device
            wanted = torch.cat(
                [torch.as_tensor(indices, dtype=torch.int64, device=device) for indices in self._waiting]
            )
        tensors = self._dataset.__getitems__(wanted).tensors
        self._gathered = {key: value.pin_memory() for key, value in tensors.items()} if self._pin else tensors
        self._first = 0
