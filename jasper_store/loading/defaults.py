"""What a loader chooses by the plan of its dataset: the order, and how far to look ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jasper_store.jasper.schema import STEERING_TENSORS
from jasper_store.loading.order import BLOCK, WINDOW
from jasper_store.loading.prefetcher import Prefetcher, depth_for
from jasper_store.loading.window_prefetcher import READERS, WINDOWS
from jasper_store.native.reads import READER_NBYTES

if TYPE_CHECKING:
    from jasper_store.jasper.dataset import JASPERSteeringDataset

__all__ = ["choose_order", "prefetcher_for", "sample_nbytes_of"]


def prefetcher_for(
    dataset: JASPERSteeringDataset, batch_size: int, sample_nbytes: int, num_workers: int
) -> Prefetcher | None:
    """The look-ahead, if there is anything to announce."""
    if not dataset.use_mmap:
        return None
    mapped, left = _mapped_and_left(dataset)
    return Prefetcher(
        dataset,
        depth_for(batch_size, sample_nbytes, left),
        batch_size=batch_size,
        rely_on_faults=num_workers == 0,
        drop_behind=mapped > left,
        # Workers have memory of their own: what is staged here is not there.
        stage=mapped > left and num_workers == 0 and left >= _staged_nbytes(dataset),
    )


def _staged_nbytes(dataset: JASPERSteeringDataset) -> int:
    """Most memory that staged windows take, those that are being read among them, and what they are read into."""
    return WINDOWS * BLOCK * WINDOW * dataset.store[STEERING_TENSORS[0]].row_nbytes + READERS * READER_NBYTES


def _mapped_and_left(dataset: JASPERSteeringDataset) -> tuple[int, int]:
    """Bytes that are mapped and read per sample, and bytes of memory that are left for the page cache."""
    plan = dataset.store.plan
    mapped = sum(entry.nbytes for entry in plan.entries if entry.placement == "mmap" and entry.reads_per_sample > 0)
    return mapped, max(plan.budget.nbytes - plan.preloaded_nbytes, 0)


def choose_order(dataset: JASPERSteeringDataset, asked: str, ranks: int) -> tuple[str, str]:
    """The order, and why."""
    if asked != "auto":
        return asked, "it was asked for"
    if ranks > 1:
        # Ranks that each chose by the memory of their own machine could choose differently, and repeat samples.
        return (
            "global",
            "several ranks share the epoch; pass order='block' to all of them where the data is larger than memory",
        )
    mapped, left = _mapped_and_left(dataset)
    figures = f"{mapped / 2**20:.1f} MiB that are read per sample are mapped, and the page cache may hold {left / 2**20:.1f} MiB"
    if mapped > left:
        return "block", f"{figures}: blocks of rows are read in runs"
    return "global", "nothing that is read per sample is mapped" if not mapped else f"{figures}: they fit"


def sample_nbytes_of(dataset: JASPERSteeringDataset) -> int:
    """Bytes of one sample in a batch."""
    width = dataset.embedding_dim * dataset.store["source_embs"].dtype.itemsize
    numbers = 4 + dataset.n_neg
    return (3 + dataset.n_neg) * width + 8 * numbers
