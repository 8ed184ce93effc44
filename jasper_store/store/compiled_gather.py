"""A fixed sequence of gathers in memory, each step's output indexing the next; one native call per batch.

If one tensor holds the row numbers of another, each step takes a few calls of torch or numpy before the next can begin,
and at 256 rows these cost as much as the gathers. So the steps are laid out once per batch size. From batch to batch only
the addresses of the input and the results change, and the gather kernel does everything in between.
"""

from __future__ import annotations

import array
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jasper_store.native.gather import NUMBERS, BegunGather, Source, run_packed, widening
from jasper_store.store.resident import SMALL_TAKE, empty_rows
from jasper_store.store.rows import refused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["INPUT", "SECOND_INPUT", "CompiledGather", "IndexRef", "Step"]

_ROWS, _ROWS_STEP, _N, _OUT, _WIDEN, _STAGE = range(4, NUMBERS)
_INT64_NBYTES = 8
_HOST = torch.device("cpu")


class IndexRef(NamedTuple):
    """What names the rows of a step.

    Attributes:
        step: number of the step that found them; -1 is the input, -2 the second input.
        column: which of the step's values for each sample; ``None`` is all of them.
    """

    step: int
    column: int | None = None


INPUT: Final = IndexRef(-1)
SECOND_INPUT: Final = IndexRef(-2)


@dataclass(frozen=True, slots=True)
class Step:
    """One gather.

    Attributes:
        name: of the tensor, for errors.
        source: the source of the rows; its ``numbers`` must not be empty.
        rows: what names the rows; of an earlier step, which must be one that is not a result.
        dtype: what the values are made: int64 for steps that name rows.
        result: whether the values are returned; else they only name rows.
    """

    name: str
    source: Source
    rows: IndexRef
    dtype: torch.dtype
    result: bool = True


class _Layout(NamedTuple):
    """Steps of a given number of samples, as the kernel takes them, and what has to be filled in."""

    jobs: array.array[int]
    scratch: int  # numbers that name rows
    inside: list[tuple[int, int]]  # where in `jobs` an address belongs, and how far into the scratch it is
    spare: list[tuple[array.array[int], torch.Tensor]]  # jobs with these addresses, and their scratch, not in use now
    outside: list[tuple[int, int]]  # where the address of an input belongs, and which input
    results: list[tuple[int, tuple[int, ...], torch.dtype, int, torch.Tensor]]  # where its address belongs, what it is


class _Ready(NamedTuple):
    """A gather that only has to be run."""

    layout: _Layout
    jobs: array.array[int]
    scratch: torch.Tensor
    results: list[torch.Tensor]


def _with_scratch(layout: _Layout) -> tuple[array.array[int], torch.Tensor]:
    """Jobs of a layout, and the scratch whose addresses stand in them."""
    jobs, scratch = layout.jobs[:], torch.empty(layout.scratch, dtype=torch.int64, device=_HOST)
    base = scratch.data_ptr()
    for place, offset in layout.inside:
        jobs[place] = base + offset
    return jobs, scratch


class CompiledGather:
    """Steps to gather by. May be run from several threads at once.

    Args:
        steps: in an order in which none needs a later one. A step after one that needs the rows of an earlier step
            runs in its stage or a later one, so that they share the threads.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        self._layout: tuple[int, _Layout] | None = None

    def run(
        self,
        rows: torch.Tensor,
        extra: torch.Tensor | None = None,
        *,
        empty: Callable[[tuple[int, ...], torch.dtype, int], torch.Tensor] = empty_rows,
    ) -> list[torch.Tensor]:
        """The results of all steps.

        Args:
            rows: int64 [B] in host memory.
            extra: int64 [B], for the steps that read :data:`SECOND_INPUT`.
            empty: makes a result's memory, on the host, of a shape, a dtype and its bytes.

        Returns:
            A new tensor for each step that is a result: [B, *row_shape], or [B, k, *row_shape] where each sample
            names k rows.

        Raises:
            IndexError: a row out of range.
        """
        ready = self._prepare(rows, extra, empty)
        bad = run_packed(ready.jobs)
        if bad is not None:
            raise self._error(bad, rows, extra, ready)
        ready.layout.spare.append((ready.jobs, ready.scratch))
        return ready.results

    def begin(
        self, rows: torch.Tensor, *, empty: Callable[[tuple[int, ...], torch.dtype, int], torch.Tensor] = empty_rows
    ) -> Callable[[], list[torch.Tensor]]:
        """Let a helper thread begin :meth:`run`.

        Returns:
            Waits for the results; to be called once. If it is dropped instead, the helper stops.

        Raises:
            IndexError: a row out of range.
        """
        ready = self._prepare(rows, None, empty)
        begun = BegunGather(ready.jobs, keep=(self, rows, ready))
        if begun.bad is not None:
            raise self._error(begun.bad, rows, None, ready)

        def finish() -> list[torch.Tensor]:
            begun.finish()
            ready.layout.spare.append((ready.jobs, ready.scratch))
            return ready.results

        return finish

    def _prepare(
        self,
        rows: torch.Tensor,
        extra: torch.Tensor | None,
        empty: Callable[[tuple[int, ...], torch.dtype, int], torch.Tensor],
    ) -> _Ready:
        size = rows.shape[0]
        known = self._layout
        if known is None or known[0] != size:
            known = self._layout = (size, self._lay_out(size))
        layout = known[1]
        try:
            jobs, scratch = layout.spare.pop()
        except IndexError:  # the first time, or another thread is at it
            jobs, scratch = _with_scratch(layout)
        for place, which in layout.outside:
            given = rows if which == INPUT.step else extra
            assert given is not None
            jobs[place], jobs[place + 1] = given.data_ptr(), given.stride(0)
        results = []
        for place, shape, dtype, nbytes, like in layout.results:
            # Of a pattern in half the time; a batch has some of them.
            small = nbytes < SMALL_TAKE and empty is empty_rows
            out = torch.empty_like(like) if small else empty(shape, dtype, nbytes)
            jobs[place] = out.data_ptr()
            results.append(out)
        return _Ready(layout, jobs, scratch, results)

    def _lay_out(self, size: int) -> _Layout:
        jobs = array.array("q")
        layout = _Layout(jobs, 0, [], [], [], [])
        scratch = previous = 0
        found: list[tuple[int, tuple[int, ...], int]] = []  # of each step: place in the scratch, shape, stage
        for step in self.steps:
            at = len(jobs)
            start, shape, stage = (0, (), 0) if step.rows.step < 0 else found[step.rows.step]
            stage = previous = max(stage, previous)
            width = math.prod(shape)
            column = step.rows.column
            named = () if column is not None else shape
            n = size * math.prod(named)
            if step.rows.step < 0:
                layout.outside.append((at + _ROWS, step.rows.step))
            else:
                layout.inside.append((at + _ROWS, (start + (column or 0)) * _INT64_NBYTES))
            widen = widening(step.source.tensor.dtype, step.dtype)
            assert widen is not None
            jobs.extend((*step.source.numbers, 0, width if column is not None else 1, n, 0, widen, stage))
            whole = (*named, *step.source.row_shape)
            found.append((scratch, whole, stage + 1))
            if step.result:
                nbytes = size * math.prod(whole) * step.dtype.itemsize
                like = torch.empty(1, dtype=step.dtype, device=_HOST).expand(size, *whole)
                layout.results.append((at + _OUT, (size, *whole), step.dtype, nbytes, like))
            else:
                layout.inside.append((at + _OUT, scratch * _INT64_NBYTES))
                scratch += size * math.prod(whole)
        return layout._replace(scratch=scratch)

    def _error(
        self,
        bad: int,
        rows: torch.Tensor,
        extra: torch.Tensor | None,
        ready: _Ready,
    ) -> IndexError:
        layout, jobs, scratch, _ = ready
        step, job = self.steps[bad], jobs[bad * NUMBERS : (bad + 1) * NUMBERS]
        if step.rows == SECOND_INPUT and extra is not None:
            rows = extra
        elif step.rows.step >= 0:
            offset = dict(layout.inside)[bad * NUMBERS + _ROWS] // _INT64_NBYTES
            rows = scratch[offset:].as_strided((job[_N],), (job[_ROWS_STEP],))
        return refused(rows, step.source.tensor.shape[0], step.name)
