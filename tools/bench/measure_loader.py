"""What runs inside the child for whole batches: ways to load them, and the copy that bounds them all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from tools.bench import block_device, pagecache
from tools.bench.cgroup import Cap
from tools.bench.library import library
from tools.bench.plain_dataset import PlainDataset, PlainLabels, PlainTriplets

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["KINDS", "Kind", "epochs", "equal", "growth", "rate", "sharing"]

SOURCE_NBYTES = 1 << 30
COPY_S = 0.4
LEAST_BATCHES = 3
TOUCH_EVERY = 16
"""Batches of which a number is looked at; to index a tensor from Python takes 3 us, a tenth of the time of a batch of 32."""

Batch = dict[str, torch.Tensor]


class _OneByOne(Dataset[dict[str, torch.Tensor]]):
    """This library's dataset with its batched access hidden: what PyTorch does without ``__getitems__``."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return dict(self.dataset[index])


@dataclass(frozen=True)
class Kind:
    """How the datasets of one kind are opened.

    Attributes:
        open: this library's dataset, of (library, path, epoch, options).
        plain: the dataset of a user who has no library, everything in memory.
        split: what a loader is asked for.
        drawn: keys whose values are drawn, so that the plain dataset has others.
    """

    open: Callable[[Any, Path, int, dict[str, Any]], Any]
    plain: Callable[[Path], Dataset[Batch]]
    split: str | None = None
    drawn: frozenset[str] = frozenset()


def _open_jasper(js: Any, path: Path, epoch: int, options: dict[str, Any]) -> Any:
    return js.JASPERSteeringDataset(path, "train", epoch, **options)


def _open_declared(js: Any, path: Path, _epoch: int, options: dict[str, Any]) -> Any:
    return js.Dataset(path, **options)


KINDS = {
    "jasper": Kind(_open_jasper, PlainDataset, "train", frozenset({"steering", "steering_variant"})),
    "labels": Kind(_open_declared, PlainLabels),
    "triplets": Kind(_open_declared, PlainTriplets),
}


def rate(
    way: str,
    dataset: str,
    batch: int,
    seconds: float,
    *,
    kind: str = "jasper",
    epoch: int = 0,
    workers: int = 0,
    options: dict[str, Any] | None = None,
    cap: dict[str, Any] | None = None,
    cold: bool = False,
    copies: bool = False,
) -> dict[str, Any]:
    """Samples a second of one way to load: ``plain-per-sample``, ``per-sample``, ``dataloader``, ``create_loader``.

    Counted from the first batch on, over as many epochs as the time holds, the gaps between epochs included.
    ``kind`` is a key of :data:`KINDS`. ``copies`` also measures the machine's copy of as many bytes, in this process.
    """
    js = library()

    location = Path(dataset)
    files = pagecache.files_under(location)
    if cold:
        pagecache.evict(files)
    if cap:
        Cap.from_dict(cap).join()
    begin = time.perf_counter()
    epochs, plan = _ways(js, KINDS[kind])[way](location, batch, epoch, workers, options or {})
    opened = time.perf_counter() - begin
    device = block_device.device_of(location)
    before = device.counters() if device else None
    done, elapsed, nbytes, window = _serve(epochs, batch, seconds)
    facts: dict[str, Any] = {"samples_per_s": done / elapsed, "samples": done, "seconds": elapsed, "open_s": opened}
    facts |= {"sample_nbytes": nbytes, "window": window, "plan": plan}
    if device and before:
        disk = device.counters().since(before)
        facts |= {"disk_reads_per_sample": disk.reads / done, "disk_bytes_per_sample": disk.nbytes / done}
    if copies:
        facts |= _copies(nbytes * batch)
    return facts


def _ways(js: Any, kind: Kind) -> dict[str, Callable[..., tuple[Iterator[Iterator[Batch]], dict[str, Any] | None]]]:
    def plain_per_sample(path: Path, batch: int, _epoch: int, workers: int, _options: dict[str, Any]) -> Any:
        return _again(DataLoader(kind.plain(path), batch, shuffle=True, drop_last=True, **_workers(workers))), None

    def per_sample(path: Path, batch: int, epoch: int, _workers: int, options: dict[str, Any]) -> Any:
        dataset = kind.open(js, path, epoch, options)
        loader = DataLoader(_OneByOne(dataset), batch_size=batch, shuffle=True, drop_last=True)
        return _again(loader), _placements(dataset)

    def dataloader(path: Path, batch: int, epoch: int, workers: int, options: dict[str, Any]) -> Any:
        dataset = kind.open(js, path, epoch, options)
        loader = DataLoader(dataset, batch_size=batch, shuffle=True, drop_last=True, **_workers(workers))
        return _again(loader), _placements(dataset)

    def create_loader(path: Path, batch: int, epoch: int, workers: int, options: dict[str, Any]) -> Any:
        if workers:
            options = {"persistent_workers": True, **options}
        loader = js.create_loader(path, kind.split, batch, workers, epoch=epoch, **options)
        return epochs(js, loader, epoch), _placements(loader.dataset_obj)

    return {
        "plain-per-sample": plain_per_sample,
        "per-sample": per_sample,
        "dataloader": dataloader,
        "create_loader": create_loader,
    }


def _workers(count: int) -> dict[str, Any]:
    """Options of a DataLoader; workers stay from epoch to epoch, so that no start is measured."""
    return {"num_workers": count, "persistent_workers": count > 0}


def _placements(dataset: Any) -> dict[str, Any]:
    return {entry.name: entry.placement for entry in dataset.store.plan.entries}


def _again(loader: DataLoader[Any]) -> Iterator[Iterator[Batch]]:
    while True:
        yield iter(loader)


def epochs(js: Any, loader: Any, epoch: int) -> Iterator[Iterator[Batch]]:
    """Epoch after epoch, all with the same probabilities of the curriculum, which change every ten."""
    number = epoch
    while True:
        js.set_epoch(loader, number)
        yield iter(loader)
        number = number + 1 if (number + 1) % 10 else number - 9


def _serve(
    epochs: Iterator[Iterator[Batch]], batch: int, seconds: float
) -> tuple[int, float, float, tuple[float, float]]:
    """Samples and seconds after the first batch, bytes a sample, and the window for the memory peaks."""
    batches = (item for each in epochs for item in each)
    first = next(batches)
    nbytes = sum(value.nbytes for value in first.values()) / len(next(iter(first.values())))
    largest = max(first, key=lambda key: first[key].nbytes)
    corner = (0,) * first[largest].dim()
    began, begin, count, touched = time.monotonic(), time.perf_counter(), 0, 0.0
    while count < LEAST_BATCHES or time.perf_counter() - begin < seconds:
        batch_now = next(batches)
        if count % TOUCH_EVERY == 0:
            touched += float(batch_now[largest][corner])
        count += 1
    elapsed = time.perf_counter() - begin
    if math.isnan(touched):
        raise ValueError("a batch held NaN, and the generator writes none")
    return count * batch, elapsed, nbytes, (began, time.monotonic())


def _copies(nbytes: float) -> dict[str, float]:
    """Bytes a second of ``copy_``, three ways.

    ``ram``: a large tensor into another, the memory's copy bandwidth. ``fresh`` and ``kept``: batch-sized pieces of
    a large tensor into a new tensor each, or into one that stays in the processor's cache: a bound that no gather
    of scattered rows can reach.
    """
    count = max(int(nbytes) // 4, 1)
    source = torch.empty(max(SOURCE_NBYTES // 4, 4 * count)).fill_(0.5)
    half = len(source) // 2
    other = torch.empty(half)
    large = _copy_rate(source[: 2 * half].view(2, half), lambda: other)
    pieces = source[: len(source) // count * count].view(-1, count)
    kept = torch.empty(count)
    return {
        "copy_ram_bytes_per_s": large,
        "copy_fresh_bytes_per_s": _copy_rate(pieces, lambda: torch.empty(count)),
        "copy_kept_bytes_per_s": _copy_rate(pieces, lambda: kept),
    }


def _copy_rate(pieces: torch.Tensor, place: Callable[[], torch.Tensor]) -> float:
    for piece in pieces[:4]:
        place().copy_(piece)
    begin, done = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < COPY_S:
        place().copy_(pieces[done % len(pieces)])
        done += 1
    return done * pieces[0].nbytes / elapsed


def equal(dataset: str, count: int = 512, kind: str = "jasper") -> dict[str, Any]:
    """Whether batched access, one-by-one access and a plain dataset agree bit by bit on the same positions."""
    js = library()

    how = KINDS[kind]
    ours = how.open(js, Path(dataset), 0, {"use_mmap": False})
    plain = how.plain(Path(dataset))
    count = min(count, len(ours))
    positions = torch.randperm(len(ours), generator=torch.Generator().manual_seed(1))[:count]
    collated: Any = ours.__getitems__(positions)
    batch = dict(torch.utils.data.default_collate(collated))
    singles = [dict(ours[index]) for index in positions.tolist()]
    plains = [plain[index] for index in positions.tolist()]
    wrong = [key for key, value in batch.items() if not torch.equal(value, torch.stack([one[key] for one in singles]))]
    wrong += [
        key
        for key, value in batch.items()
        if key not in how.drawn and not torch.equal(value, torch.stack([one[key] for one in plains]))
    ]
    return {"equal": not wrong, "wrong": sorted(set(wrong)), "samples": count}


def growth(dataset: str, batch: int, batches: int) -> dict[str, Any]:
    """Serve some batches of an epoch over a mapped dataset; only the memory is of interest."""
    js = library()

    began = time.monotonic()
    begin = time.perf_counter()
    loader = js.create_loader(dataset, "train", batch, use_mmap=True)
    opened = time.perf_counter() - begin
    served = 0
    for served, _ in enumerate(loader, 1):
        if served >= batches:
            break
    elapsed = time.perf_counter() - begin - opened
    return {"open_s": opened, "batches": served, "seconds": elapsed, "window": (began, time.monotonic())}


def sharing(dataset: str, batch: int, workers: int, method: str, marks: list[float]) -> dict[str, Any]:
    """Private bytes of the larger worker at shares of an epoch over a preloaded dataset."""
    import multiprocessing

    import psutil

    js = library()

    loader = js.create_loader(
        dataset, "train", batch, workers, use_mmap=False, multiprocessing_context=method, persistent_workers=True
    )
    due = [min(int(mark * len(loader)), len(loader) - 1) for mark in marks]
    private: list[int] = []
    for number, _ in enumerate(loader):
        while len(private) < len(due) and number == due[len(private)]:
            private.append(max(_private(psutil.Process(child.pid)) for child in multiprocessing.active_children()))
    return {"private": private, "nbytes": loader.dataset_obj.store.nbytes}


def _private(process: Any) -> int:
    """Bytes that it wrote and nobody else has; a page of a mapped file is the kernel's, whoever maps it."""
    return sum(region.private_dirty for region in process.memory_maps(grouped=True))
