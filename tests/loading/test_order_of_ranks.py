"""Ranks that measure different memory must shuffle alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from jasper_store.jasper.loader import create_loader
from tests.builders import build_pt_dataset


def test_auto_is_the_same_order_on_every_rank_whatever_its_memory(tmp_path: Path) -> None:
    data = build_pt_dataset(tmp_path / "data", n_pairs=400, dim=64)
    limits = (1 << 30, 1 << 16)  # everything fits, nothing does
    alone = [create_loader(data, "train", 8, memory_limit=limit).order for limit in limits]
    assert alone == ["global", "block"]
    ranks = [
        create_loader(data, "train", 8, memory_limit=limit, rank=rank, world_size=2)
        for rank, limit in enumerate(limits)
    ]
    assert [loader.order for loader in ranks] == ["global", "global"]
    assert "several ranks" in ranks[1].explain()
    samplers: list[Any] = [loader.batch_sampler for loader in ranks]
    served = torch.cat([torch.as_tensor(positions) for sampler in samplers for positions in sampler])
    assert len(torch.unique(served)) == len(served)
    assert create_loader(data, "train", 8, order="block", rank=0, world_size=2).order == "block"
