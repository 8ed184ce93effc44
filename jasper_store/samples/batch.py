"""A batch that is gathered once and also is a sequence of ordinary samples.

PyTorch's fetcher calls ``dataset.__getitems__(indices)`` and hands the result to ``collate_fn``. A user's own
``collate_fn`` expects a list of samples; the default one would stack them again, tensor by tensor. :class:`Batch`
serves both: it is a sequence whose items are dictionaries of views, made only when one is asked for, and the
type of its items is registered with the default collation, which then returns the gathered tensors as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, overload

import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import collate, default_collate_fn_map

__all__ = ["Batch", "Sample", "collate_samples"]


class Sample(dict[str, torch.Tensor]):
    """One sample: a plain dictionary of tensors, with its own type, so that default collation recognises it.

    Attributes:
        ragged: keys whose number of rows differs from sample to sample.
    """

    __slots__ = ("ragged",)

    def __init__(self, values: Iterable[tuple[str, torch.Tensor]], ragged: tuple[str, ...] = ()) -> None:
        super().__init__(values)
        self.ragged = ragged

    def __reduce__(self) -> tuple[Any, ...]:
        return (Sample, (list(self.items()), self.ragged))


class Batch(Sequence[Sample]):
    """B samples backed by tensors that were gathered once.

    Items are views into the batch's tensors: keeping one keeps the whole batch alive, and writing to one writes to
    the batch (never to the dataset).

    Attributes:
        tensors: the gathered tensors by key, each with B as its first dimension; a ragged field X is ``X.values``
            [total, ...] and ``X.offsets`` [B + 1].
        ragged: names of the ragged fields.
    """

    __slots__ = ("_size", "ragged", "tensors")

    def __init__(self, tensors: dict[str, torch.Tensor], size: int, ragged: tuple[str, ...] = ()) -> None:
        self.tensors = tensors
        self.ragged = ragged
        self._size = size

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Batch: ...
    def __getitem__(self, index: int | slice) -> Sample | Batch:
        """One sample as a dictionary of views, or a slice of the batch."""
        if isinstance(index, slice):
            if self.ragged:
                chosen = range(self._size)[index]
                return collated(self[number] for number in chosen) if chosen else self._empty()
            return Batch({key: value[index] for key, value in self.tensors.items()}, len(range(self._size)[index]))
        if not -self._size <= index < self._size:
            raise IndexError(f"sample {index} is out of range for a batch of {self._size}")
        if index == 0 and _asks_for_the_type():
            return _OF_THE_TYPE
        if not self.ragged:
            return Sample([(key, value[index]) for key, value in self.tensors.items()])
        return self._ragged_sample(range(self._size)[index])

    def _empty(self) -> Batch:
        offsets = {f"{name}.offsets" for name in self.ragged}
        return Batch({key: value[: key in offsets] for key, value in self.tensors.items()}, 0, self.ragged)

    def _ragged_sample(self, index: int) -> Sample:
        found: dict[str, torch.Tensor] = {}
        for key, value in self.tensors.items():
            name, _, part = key.rpartition(".")
            if name not in self.ragged:
                found[key] = value[index]
            elif part == "values":
                start, stop = self.tensors[f"{name}.offsets"][index : index + 2].tolist()
                found[name] = value[start:stop]
        return Sample(found.items(), self.ragged)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(self._size))

    def __repr__(self) -> str:
        return f"Batch({self._size} samples: {', '.join(self.tensors)})"


_OF_THE_TYPE: Final = Sample(())
_COLLATE: Final = collate.__code__
_DEFAULT_COLLATE: Final = default_collate.__code__


def _asks_for_the_type() -> bool:
    """Whether the caller's caller is PyTorch's default collation, which looks at nothing but the type of a first sample.

    Views of all fields would take it a sixth of the time of a batch of 32. A collation with another map than the
    default one gets a whole sample: it may look for the keys.
    """
    frame = sys._getframe(2)  # noqa: SLF001 - in every CPython that torch runs on
    if frame.f_code is not _COLLATE or Sample not in default_collate_fn_map:
        return False
    caller = frame.f_back
    return caller is not None and caller.f_code is _DEFAULT_COLLATE


def collate_samples(
    batch: Sequence[Sample], *, collate_fn_map: dict[type | tuple[type, ...], Callable[..., Any]] | None = None
) -> dict[str, torch.Tensor]:
    """Collate samples as ``torch.utils.data.default_collate`` does; a :class:`Batch` is already collated.

    Args:
        batch: a :class:`Batch`, or any sequence of samples (as ``ConcatDataset`` makes).
        collate_fn_map: the map of the collation that called; it is passed on for the tensors.

    Returns:
        A plain dictionary of tensors with B as their first dimension.
    """
    if isinstance(batch, Batch):
        return batch.tensors
    return collated(batch, collate_fn_map).tensors


def collated(
    samples: Iterable[Sample], collate_fn_map: dict[type | tuple[type, ...], Callable[..., Any]] | None = None
) -> Batch:
    """Samples collated to a batch; ragged fields are concatenated."""
    samples = list(samples)
    ragged = samples[0].ragged if samples else ()
    found: dict[str, torch.Tensor] = {}
    for key in samples[0] if samples else ():
        values = [sample[key] for sample in samples]
        if key in ragged:
            found[f"{key}.values"] = torch.cat(values)
            found[f"{key}.offsets"] = torch.tensor([0, *map(len, values)], device=values[0].device).cumsum(0)
        else:
            found[key] = collate(values, collate_fn_map=collate_fn_map or default_collate_fn_map)
    return Batch(found, len(samples), ragged)


default_collate_fn_map[Sample] = collate_samples
