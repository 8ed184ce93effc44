"""What the tests of packing share: small blocks, and packed samples compared with those of the source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import jasper_store as js
from jasper_store.jasper.schema import Split
from jasper_store.packing import layout

BLOCK = 16


def small_blocks(patch: pytest.MonkeyPatch, samples: int = BLOCK) -> None:
    """Blocks of some samples, mixed four at a time, whose wide columns are written one by one."""
    patch.setattr(layout, "BLOCK_NBYTES", 1)
    patch.setattr(layout, "_FEWEST", samples)
    patch.setattr(layout, "WINDOW_NBYTES", 1)
    patch.setattr(layout, "WINDOW_BLOCKS", (4, 4))
    patch.setattr(layout, "_WIDE", 512)


def positions_in_source(source: js.JASPERSteeringDataset, packed: js.JASPERSteeringDataset) -> list[int]:
    """Position in the source's split of each packed sample, by the rows that both name."""
    where = {int(row): position for position, row in enumerate(source.split_indices)}
    rows = packed.store["packed_row"].take(packed.split_indices.long())
    return [where[int(row)] for row in rows]


def require_same(source: Path, packed: Path, split: Split = "train", epochs: tuple[int, ...] = (0, 25, 40)) -> None:
    """Every sample of a split has the same bits, also those that are drawn."""
    with js.JASPERSteeringDataset(source, split) as one, js.JASPERSteeringDataset(packed, split) as other:
        positions = positions_in_source(one, other)
        assert sorted(positions) == list(range(len(one)))
        assert len(one) < 2 or positions != sorted(positions)
        for epoch in epochs:
            one.set_epoch(epoch)
            other.set_epoch(epoch)
            same(one[positions], other[list(range(len(other)))])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Equal keys in the same order, dtypes, shapes and values."""
    assert list(one) == list(other)
    for key, values in one.items():
        assert values.dtype == other[key].dtype, key
        assert torch.equal(values, other[key]), key
