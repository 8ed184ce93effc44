"""What a loader chooses by the plan of its dataset: the order, and how far to prefetch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jasper_store.loading.estimate import FEW_READS, windows_nbytes
from jasper_store.loading.order import BlockOrder
from jasper_store.loading.prefetcher import GROUP_SAMPLES, Prefetcher, depth_for
from jasper_store.loading.whole_blocks import held_windows

if TYPE_CHECKING:
    from jasper_store.samples.dataset import Dataset
    from jasper_store.samples.packed import Packed

__all__ = ["choose_order", "fits_ahead", "prefetcher_for"]


def prefetcher_for(dataset: Dataset, batch_size: int, num_workers: int) -> Prefetcher | None:
    """The prefetcher, if there is anything to prefetch."""
    if not dataset.use_mmap:
        return None
    mapped, left = _mapped_and_left(dataset)
    ahead, needed = 0, 0
    if dataset.packed is None:
        needed = _staged_nbytes(dataset)
    else:
        ahead = 2 if left >= _blocks_nbytes(dataset.packed, dataset, batch_size, 2) else 1
        needed = _blocks_nbytes(dataset.packed, dataset, batch_size, ahead)
    return Prefetcher(
        dataset,
        depth_for(batch_size, dataset.graph.sample_nbytes, left),
        batch_size=batch_size,
        rely_on_faults=num_workers == 0,
        drop_behind=mapped > left,
        # Workers cannot see rows that are staged in this process's memory.
        stage=mapped > left and num_workers == 0 and left >= needed,
        blocks_ahead=ahead,
    )


def fits_ahead(dataset: Dataset, nbytes: int) -> bool:
    """Whether so many bytes of batches may be gathered while the trainer uses as many, within the memory budget."""
    return not dataset.use_mmap and _mapped_and_left(dataset)[1] >= 2 * nbytes


def _blocks_nbytes(packed: Packed, dataset: Dataset, batch_size: int, ahead: int) -> int:
    """Most memory that windows of whole blocks take."""
    order = BlockOrder(len(dataset), block=packed.block, window=packed.window)
    windows = held_windows(order, GROUP_SAMPLES + 3 * batch_size, ahead)
    nbytes = sum(dataset.store[name].row_nbytes for node in dataset.graph.nodes for name in node.tensors)
    return windows * min(order.span, len(dataset)) * nbytes


def _staged_nbytes(dataset: Dataset) -> int:
    """Most memory that staged windows take, those that are being read among them, and what they are read into."""
    return windows_nbytes(dataset.graph, {name for name, each in dataset.store.items() if each.placement == "mmap"})


def _mostly_in_order(dataset: Dataset) -> bool:
    """Whether most rows that a sample reads from maps lie in the order of the samples."""
    in_order = dataset.graph.in_row_order
    mapped = [each for each in dataset.store.plan.entries if each.placement == "mmap" and each.reads_per_sample > 0]
    random = sum(each.reads_per_sample for each in mapped if each.name not in in_order)
    return random <= FEW_READS


def _mapped_and_left(dataset: Dataset) -> tuple[int, int]:
    """Bytes that are mapped and read per sample, and bytes of memory that are left for the page cache."""
    plan = dataset.store.plan
    mapped = sum(entry.nbytes for entry in plan.entries if entry.placement == "mmap" and entry.reads_per_sample > 0)
    return mapped, max(plan.budget.nbytes - plan.preloaded_nbytes, 0)


def choose_order(dataset: Dataset, asked: str, ranks: int, num_workers: int = 0) -> tuple[str, str]:
    """The order, and why.

    A block order pays where the rows that lie in the order of the samples are read past the page cache, or are most of
    what is read. Else its windows and the rows that are named at random evict each other from a page cache that is too
    small for both, and single rows prefetched some batches ahead are twice as fast (docs/notes-paging.md).
    """
    if asked != "auto":
        return asked, "it was asked for"
    if dataset.packed is not None:
        return "block", "the samples are packed: blocks are read whole, in another order each epoch"
    if ranks > 1:
        # Each rank measures only its own machine: ranks that chose differently would repeat samples.
        return (
            "global",
            "several ranks share the epoch; pass order='block' to all of them where the data is larger than memory",
        )
    mapped, left = _mapped_and_left(dataset)
    figures = f"{mapped / 2**20:.1f} MiB that are read per sample are mapped, and the page cache may hold {left / 2**20:.1f} MiB"
    if mapped > left:
        staged = num_workers == 0 and left >= _staged_nbytes(dataset)
        if staged or _mostly_in_order(dataset):
            return "block", f"{figures}: blocks of rows are read in runs"
        return "global", f"{figures}, too little for windows of blocks beside rows that are named at random"
    return "global", "nothing that is read per sample is mapped" if not mapped else f"{figures}: they fit"
