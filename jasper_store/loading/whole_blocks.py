"""Windows of packed samples, read in whole blocks: everything that a sample reads lies in one run with its neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jasper_store.loading.window_prefetcher import READERS, StagedNode
from jasper_store.store.direct_blocks import BlockReader, block_table
from jasper_store.store.direct_rows import rows_anywhere

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jasper_store.loading.order import BlockOrder
    from jasper_store.loading.window_prefetcher import PrefetchSource, Wanted
    from jasper_store.samples.draw import VariantSampler

__all__ = ["WholeBlocks", "held_windows", "whole_blocks"]


def held_windows(order: BlockOrder, in_flight: int, ahead: int) -> int:
    """Windows that are held: those of batches on their way, the one that is served, and some ahead."""
    return -(-in_flight // order.span) + 1 + ahead


def whole_blocks(
    dataset: PrefetchSource, numbers: Sequence[int], order: BlockOrder, in_flight: int, ahead: int
) -> WholeBlocks | None:
    """What reads these nodes in whole blocks; ``None`` where they do not lie so, or cannot be read directly."""
    try:
        return WholeBlocks(dataset, numbers, order, held_windows(order, in_flight, ahead), dataset.draw_now())
    except OSError:
        return None


class WholeBlocks:
    """Reads blocks of packed samples. See :class:`~jasper_store.loading.window_prefetcher.ReadAhead`.

    Args:
        dataset: whose samples.
        numbers: nodes of its graph, each a row of a tensor in blocks, or of a choice among such tensors.
        order: the pass's; its blocks are those on the disk.
        windows: windows that are held at a time.
        draw: of the pass. Tensors of variants that it never draws are not read.

    Raises:
        OSError: the tensors do not lie in blocks, or a file cannot be opened directly.
    """

    def __init__(
        self,
        dataset: PrefetchSource,
        numbers: Sequence[int],
        order: BlockOrder,
        windows: int,
        draw: VariantSampler | None,
    ) -> None:
        graph, store = dataset.graph, dataset.store
        self._graph, self._numbers = graph, tuple(numbers)
        self.windows = windows
        read: list[Any] = []
        self._columns: list[list[int]] = []
        self.nodes: list[StagedNode] = []
        for number in numbers:
            node = graph.nodes[number]
            columns = []
            for variant, name in enumerate(node.tensors, start=1):
                drawn = not node.choice or draw is None or draw.draws(variant)
                columns.append(len(read) if drawn else -1)
                read += [store[name]] if drawn else []
            self._columns.append(columns)
            tensor = store[node.tensor]
            zeros = torch.zeros(tuple(tensor.row_shape), dtype=tensor.dtype, device="cpu")
            self.nodes.append(StagedNode(number, rows_anywhere(zeros), tensor.dtype))
        table = block_table(read)
        if table is None:
            raise OSError("the tensors do not lie in blocks that can be read directly")
        self._starts = table.starts
        self._reader = BlockReader(table, READERS, _largest(table.nbytes, order.window))

    def begin(self, wanted: Wanted) -> Any:
        """See :class:`~jasper_store.loading.window_prefetcher.ReadAhead`."""
        rows = wanted.rows.numpy()
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        blocks, place = np.unique(parts, return_inverse=True)
        within = rows - self._starts[parts]
        variants = [wanted.variants_of(self._graph.nodes[number]) for number in self._numbers]
        return self._reader.begin(blocks), place.reshape(-1), within, variants

    def finish(self, job: Any) -> tuple[list[np.ndarray], object]:
        """See :class:`~jasper_store.loading.window_prefetcher.ReadAhead`."""
        begun, place, within, variants = job
        bases, memory = self._reader.finish(begun)
        found = []
        for staged, columns, which in zip(self.nodes, self._columns, variants, strict=True):
            row_nbytes, zeros = staged.anywhere.row_nbytes, staged.anywhere.tensor.data_ptr()
            rows = within * row_nbytes
            if len(columns) == 1 and not self._graph.nodes[staged.number].choice:
                found.append(bases[columns[0]][place] + rows)
                continue
            addresses = np.full(len(place), zeros, np.int64)
            for variant, column in enumerate(columns):
                drawn = np.flatnonzero(which == variant)
                if len(drawn):
                    addresses[drawn] = bases[column][place[drawn]] + rows[drawn]
            found.append(addresses)
        return found, memory

    def release(self, memory: Any) -> None:
        """See :class:`~jasper_store.loading.window_prefetcher.ReadAhead`."""
        self._reader.release(memory)

    def close(self) -> None:
        """See :class:`~jasper_store.loading.window_prefetcher.ReadAhead`."""
        self._reader.close()


def _largest(nbytes: np.ndarray, window: int) -> int:
    """Bytes of the largest blocks that a window can have."""
    return int(np.sort(nbytes)[-window:].sum())
