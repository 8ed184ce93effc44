"""Rows per second of a stored tensor, and samples per second of ``create_loader``."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from jasper_store.errors import JasperStoreWarning
from jasper_store.jasper.loader import create_loader
from jasper_store.loading.loader import Loader
from jasper_store.store.tensors import StoredTensor

__all__ = ["LoaderRate", "loader_rate", "quietly", "row_rate"]

_ROWS = 256
_WARM_NBYTES = 64 << 20
_WINDOWS = 8


@dataclass(frozen=True, slots=True)
class LoaderRate:
    """How fast a loader served.

    Attributes:
        placement: where the rows of the embeddings came from: ``"mapped"``, ``"preloaded"`` or ``"planned"``.
        state: ``"warm"`` (the same batches were served just before) or ``"cold"`` (the page cache was emptied).
        batch_size: samples per batch.
        samples_per_second: over whole batches; of warm ones in the fastest eighth of the time.
        batches: how many were served.
        open_seconds: until the loader was there, preloading included.
    """

    placement: str
    state: str
    batch_size: int
    samples_per_second: float
    batches: int
    open_seconds: float


@contextmanager
def quietly() -> Iterator[None]:
    """Without the library's warnings: a measurement does on purpose what they warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JasperStoreWarning)
        yield


def loader_rate(
    path: Path,
    batch_size: int,
    *,
    split: str | None = "train",
    storage_format: str = "auto",
    use_mmap: bool | None = None,
    memory_limit: int | str | None = None,
    seconds: float = 0.5,
    cold: bool = False,
) -> LoaderRate:
    """Samples per second of one loader, in this process.

    Args:
        path: dataset directory.
        batch_size: samples per batch.
        split: split to serve; ``None`` for a dataset without.
        storage_format: format to read.
        use_mmap: as :func:`~jasper_store.jasper.loader.create_loader`.
        memory_limit: as there.
        seconds: about how long to measure; at least one batch is served.
        cold: measure the first pass. Otherwise the same batches are served once before, so that it is the page
            cache that serves them, also where the dataset as a whole does not fit there.
    """
    placement = {None: "planned", True: "mapped", False: "preloaded"}[use_mmap]
    with quietly():
        began = time.perf_counter()
        loader = create_loader(
            path,
            split,
            batch_size,
            storage_format=storage_format,
            use_mmap=use_mmap,
            memory_limit=memory_limit,
            drop_last=False,
        )
        opened = time.perf_counter() - began
        with loader.dataset_obj:
            if cold:
                batches, best = _serve(loader, seconds, None)
            else:
                limit, _ = _serve(loader, seconds / 3, None)
                batches, best = _serve(loader, seconds * 2 / 3, limit, windows=_WINDOWS)
    return LoaderRate(placement, "cold" if cold else "warm", batch_size, best, batches, opened)


def _serve(loader: Loader, seconds: float, limit: int | None, windows: int = 1) -> tuple[int, float]:
    """Batches served, and samples per second.

    Args:
        loader: what serves; each pass serves the same epoch.
        seconds: how long.
        limit: batches per pass, after which the next begins; ``None`` for one pass over at most the whole epoch.
        windows: parts of the time, of which the fastest counts.
    """
    window = _Window(seconds / windows)
    batches = 0
    began = time.perf_counter()
    while True:
        for served, batch in enumerate(loader, 1):
            batches += 1
            if window.add(_samples_in(batch)) - began >= seconds:
                return batches, window.best()
            if served == limit:
                break
        if limit is None:  # one whole epoch is all there is to see
            return batches, window.best()


def _samples_in(batch: Mapping[str, torch.Tensor]) -> int:
    """Samples in a batch; offsets of a ragged field have one entry more."""
    key, value = next((key, value) for key, value in batch.items() if not key.endswith(".values"))
    return len(value) - key.endswith(".offsets")


class _Window:
    """A rate by stretches of time, of which the fastest counts: other programs only ever make one slower."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._began = time.perf_counter()
        self._count = 0
        self._best = 0.0

    def add(self, count: int) -> float:
        """Count so many more; returns the time."""
        self._count += count
        now = time.perf_counter()
        if now - self._began >= self.seconds:
            self._best = max(self._best, self._count / (now - self._began))
            self._began, self._count = now, 0
        return now

    def best(self) -> float:
        """Per second, in the fastest stretch; in all the time where there was no whole one."""
        spent = time.perf_counter() - self._began
        return self._best or self._count / max(spent, 1e-9)


def row_rate(tensor: StoredTensor, *, seconds: float, cold: bool, seed: int = 0) -> float:
    """Random rows per second, taken 256 at a time.

    Args:
        tensor: the tensor.
        seconds: about how long to measure.
        cold: take each row at most once, from data that was made cold before; otherwise up to 64 MiB of rows are
            taken once to bring them in, and then again and again: the fastest eighth of the time counts.
        seed: of the choice of rows.
    """
    generator = torch.Generator().manual_seed(seed)
    most = max(_ROWS, _WARM_NBYTES // max(tensor.row_nbytes, 1))
    count = min(tensor.n_rows, most)
    if count == tensor.n_rows:
        rows = torch.randperm(count, generator=generator)
    else:
        rows = torch.randint(tensor.n_rows, (count,), generator=generator)
    batches = torch.split(rows, _ROWS)
    if not cold:
        began = time.perf_counter()
        for reached, batch in enumerate(batches, 1):
            tensor.take(batch)
            if time.perf_counter() - began > seconds:
                batches = batches[:reached]
                break
    window = _Window(seconds if cold else seconds / _WINDOWS)
    began = time.perf_counter()
    while True:
        for batch in batches:
            tensor.take(batch)
            if window.add(len(batch)) - began >= seconds:
                return window.best()
        if cold:
            return window.best()
