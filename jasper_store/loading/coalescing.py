"""Several batches gathered at once, and served as parts.

A batch of 32 samples is a gather of 25 us under 80 us of calls, and most of those calls cost the same for a thousand
samples. So a loader gathers some batches together, in the trainer's process or in a worker. If all tensors are in memory, a
helper thread gathers the next ones while the trainer uses these (both measured in docs/notes-paging.md).

The parts are disjoint and each has its own version counter, so a trainer may write to a batch. What the trainer changes
between two batches (the epoch, a forced variant, reloaded tensors) takes effect with the next batch: batches that were
gathered ahead are gathered again, in the trainer's process.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from jasper_store.samples.batch import Batch, Sample, collate_samples
from jasper_store.store.resident import pinned_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jasper_store.loading.batches import BatchIterator
    from jasper_store.samples.context import GatherContext
    from jasper_store.samples.dataset import Dataset

__all__ = ["CoalescingIterator", "OwnGathers", "Unit", "batches_at_once", "is_identity_collate"]

_SAMPLES: Final = 4096
_NBYTES: Final = 12 << 20
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


class Unit(NamedTuple):
    """Batches that were gathered together.

    Attributes:
        indices: of all samples, one batch after another.
        sizes: samples of each batch.
        samples: all of them, in this order.
        version: what the dataset's ``state_version()`` was before they were gathered.
    """

    indices: Any
    sizes: list[int]
    samples: Batch
    version: object


class Gathers(Protocol):
    """Where units come from."""

    def next(self) -> Unit | None:
        """The next one; ``None`` after the last."""

    def again(self, indices: Any, sizes: list[int]) -> Unit:
        """Batches of a unit once more, as the dataset is now."""

    def close(self) -> None:
        """Release what was made ahead for batches that will not be served."""


class CoalescingIterator:
    """The batches of one pass. Iterate it from one thread.

    Args:
        dataset: what they are gathered from.
        gathers: makes units of them.
        collate: turns a :class:`~jasper_store.samples.batch.Batch` into what the trainer receives.
    """

    def __init__(self, dataset: Dataset, gathers: Gathers, collate: Callable[[Any], Any]) -> None:
        self.gathers = gathers
        self._state_version = dataset.state_version
        # Calling the default collation costs 20 us, because it inspects a sample first.
        self._collate = None if is_identity_collate(collate) else collate
        self._indices: Any = ()  # of the unit that is being served
        self._sizes: list[int] = []
        self._made_for: object = None
        self._parts: deque[Any] = deque()  # batches of it that are not served yet

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        ready = self.next_ready()
        if ready is not None:
            return ready
        left = len(self._parts)
        if left:
            sizes = self._sizes[-left:]
            unit: Unit | None = self.gathers.again(self._indices[-sum(sizes) :], sizes)
        else:
            unit = self.gathers.next()
        if unit is None:
            raise StopIteration
        if unit.version != self._state_version():  # a worker made it before something was set
            unit = self.gathers.again(unit.indices, unit.sizes)
        self._indices, self._sizes, self._made_for = unit.indices, unit.sizes, unit.version
        self._parts = _split(unit.samples, unit.sizes, as_tensors=self._collate is None)
        return self._next_part()

    def next_ready(self) -> Any:
        """The next batch if it has been gathered, and still holds; else ``None``."""
        return self._next_part() if self._parts and self._made_for == self._state_version() else None

    def _next_part(self) -> Any:
        part, collate = self._parts.popleft(), self._collate
        return part if collate is None else collate(part)

    def close(self) -> None:
        """Release rows that were read ahead for batches that will not be served."""
        self.gathers.close()


class OwnGathers:
    """Units gathered in the trainer's process.

    Args:
        dataset: what they are gathered from.
        indices: of the samples of each batch.
        at_once: batches that are gathered together.
        ahead: let a helper thread begin the next unit while the trainer uses this one. Nothing may be prefetched for
            ``indices``: asking for the next ones releases rows that are staged for these.
        pin: gather into pinned memory, or copy there.
    """

    def __init__(
        self, dataset: Dataset, indices: BatchIterator, at_once: int, *, ahead: bool = False, pin: bool = False
    ) -> None:
        self._dataset = dataset
        self._indices = indices
        self._at_once = at_once
        self._ahead = ahead
        self._pin = pin
        self._begun: Callable[[], Unit] | None = None

    def next(self) -> Unit | None:
        """The next one; ``None`` after the last."""
        begun, self._begun = self._begun, None
        if begun is None:
            indices, sizes = self._indices.next_batches(self._at_once)
            unit = self.again(indices, sizes) if sizes else None
        else:
            unit = begun()
        if unit is not None and self._ahead:
            self._begin()
        return unit

    def _begin(self) -> None:
        """Begin the next one."""
        indices, sizes = self._indices.next_batches(self._at_once)
        if not sizes:
            return
        version = self._dataset.state_version()
        try:
            finish = self._dataset.begin_gather(indices, self._context)
        except Exception:  # noqa: BLE001 - of interest once the trainer asks for this unit, which meets it again
            finish = None
        if finish is None:
            self._begun = lambda: self.again(indices, sizes)
        else:
            self._begun = lambda: Unit(indices, sizes, self._pinned(finish()), version)

    @property
    def _context(self) -> GatherContext:
        context = self._indices.context
        return replace(context, empty=pinned_rows) if self._pin else context

    def again(self, indices: Any, sizes: list[int]) -> Unit:
        """Batches gathered now."""
        version = self._dataset.state_version()
        return Unit(indices, sizes, self._pinned(self._dataset.gather(indices, self._context)), version)

    def _pinned(self, batch: Batch) -> Batch:
        if not self._pin:
            return batch
        # pin_memory() returns a tensor itself if it is pinned already.
        return Batch({key: value.pin_memory() for key, value in batch.tensors.items()}, len(batch), batch.ragged)

    def close(self) -> None:
        """Release rows that were read or gathered ahead for batches that will not be served."""
        self._begun = None
        self._indices.close()


def _split(batch: Batch, sizes: list[int], *, as_tensors: bool) -> deque[Any]:
    """The batches, in order: as tensors by key, or as a :class:`~jasper_store.samples.batch.Batch`."""
    keys, ragged = tuple(batch.tensors), batch.ragged
    if len(sizes) == 1:
        return deque([batch.tensors if as_tensors else batch])
    columns = [_cut(batch, key, value, sizes) for key, value in batch.tensors.items()]
    parts = (dict(zip(keys, tensors, strict=True)) for tensors in zip(*columns, strict=True))
    if as_tensors:
        return deque(parts)
    return deque(Batch(tensors, size, ragged) for size, tensors in zip(sizes, parts, strict=True))


def _cut(batch: Batch, key: str, value: torch.Tensor, sizes: list[int]) -> Sequence[torch.Tensor]:
    """One tensor of a batch, cut into those of its parts.

    Autograd does not track them as views, so that a write to one batch does not count as a write to another: that is
    what "unsafe" means here, and what ``.data`` does.
    """
    name, _, part = key.rpartition(".")
    if name not in batch.ragged:
        return torch.unsafe_split_with_sizes(value, sizes)
    ends = [0, *accumulate(sizes)]
    offsets = batch.tensors[f"{name}.offsets"]
    bounds = offsets[torch.tensor(ends, device=offsets.device)].tolist()
    if part == "values":
        return [value[start:stop].data for start, stop in pairwise(bounds)]
    return [value[start : stop + 1] - bound for (start, stop), bound in zip(pairwise(ends), bounds, strict=False)]


def is_identity_collate(collate: Callable[[Any], Any]) -> bool:
    """Whether a collation returns a batch's tensors as they are."""
    return collate is default_collate and default_collate_fn_map.get(Sample) is collate_samples
