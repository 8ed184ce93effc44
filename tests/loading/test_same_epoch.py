"""One epoch, whatever serves it: format, placement, workers, start method, ranks, order and batch size, pairwise.

The full product has 2 592 rows. Pairwise covering proves that no two options together change anything, in as few
rows as a greedy search finds; rows with spawned workers are the dear ones, and are taken only where they are needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from jasper_store.conversion.converter import convert
from jasper_store.jasper.loader import create_loader
from jasper_store.jasper.schema import SCHEMA
from jasper_store.loading import samplers
from jasper_store.loading.loader import Loader
from jasper_store.loading.order import BlockOrder, GlobalOrder, Order
from tests.builders import build_pt_dataset, jasper_tensors
from tests.jasper.expected import assert_same, expected_batch

SIZES: dict[str, Any] = {"n_pairs": 190, "dim": 12, "n_neg": 2, "n_questions": 100, "n_sources": 110}
EPOCH, SEED = 23, 5
#: With blocks of the size that is right for disks, so small a dataset would be one window and fully shuffled.
BLOCK, WINDOW = 8, 3

OPTIONS: dict[str, tuple[Any, ...]] = {
    "format": ("pt", "hdf5", "safetensors", "npy"),
    "placement": ("mmap", "preload", "hybrid"),
    "workers": (0, 1, 2),
    "start": ("fork", "spawn"),
    "ranks": (1, 2, 3),
    "order": ("global", "block"),
    "batch": (1, 7, 64),
}


class Row(NamedTuple):
    """One way to serve the epoch."""

    format: str
    placement: str
    workers: int
    start: str
    ranks: int
    order: str
    batch: int

    def pairs(self) -> frozenset[tuple[str, Any, str, Any]]:
        """Pairs of options that this row tries together; without workers no start method is tried."""
        given = [(name, value) for name, value in self._asdict().items() if name != "start" or self.workers]
        return frozenset((a, x, b, y) for (a, x), (b, y) in itertools.combinations(given, 2))

    def cost(self) -> int:
        """Interpreters to start, above all."""
        return self.ranks * self.workers * (20 if self.start == "spawn" else 1)


def wanted_pairs() -> set[tuple[str, Any, str, Any]]:
    """Every two values of two options that can be tried together."""
    return {
        (a, x, b, y)
        for a, b in itertools.combinations(OPTIONS, 2)
        for x, y in itertools.product(OPTIONS[a], OPTIONS[b])
        if not (b == "start" and a == "workers" and x == 0)
    }


def pairwise() -> list[Row]:
    """Rows that cover every pair: each time the one with the most new pairs, of those the cheapest, then the first."""
    rows = [Row(*values) for values in itertools.product(*OPTIONS.values())]
    pairs = {row: row.pairs() for row in rows}
    left = wanted_pairs()
    chosen: list[Row] = []
    while left:
        best = max(rows, key=lambda row: (len(pairs[row] & left) - row.cost() / 50, -row.cost()))
        chosen.append(best)
        left -= pairs[best]
    return chosen


ROWS = pairwise()


def test_the_rows_cover_every_pair() -> None:
    tried = set().union(*(row.pairs() for row in ROWS))
    assert tried == wanted_pairs()
    assert len(ROWS) < 40
    assert sum(row.ranks * row.workers for row in ROWS if row.start == "spawn") < 15


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    source = build_pt_dataset(tmp_path_factory.mktemp("epoch") / "pt", **SIZES)
    found = {"pt": source}
    for name in OPTIONS["format"][1:]:
        found[name] = source.parent / name
        convert(source, found[name], format=name, schema=SCHEMA)
    return found


@pytest.fixture(scope="module")
def wanted() -> dict[str, torch.Tensor]:
    """The epoch in canonical order: by relevance, which is another for every pair."""
    tensors = jasper_tensors(**SIZES)
    whole = expected_batch(tensors, "train", range(len(tensors["train_idx"])), seed=SEED, epoch=EPOCH)
    assert len(whole["relevance"].unique()) == len(whole["relevance"])
    return canonical(whole)


def canonical(samples: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    place = samples["relevance"].argsort()
    return {key: value[place] for key, value in samples.items()}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(samplers._ORDERS, "block", partial(BlockOrder, block=BLOCK, window=WINDOW))


def loaders_of(directory: Path, row: Row) -> Iterator[Loader]:
    for rank in range(row.ranks):
        yield create_loader(
            directory,
            "train",
            row.batch,
            row.workers,
            drop_last=False,
            padding="none",
            epoch=EPOCH,
            seed=SEED,
            storage_format=row.format,
            use_mmap={"mmap": True, "preload": False, "hybrid": None}[row.placement],
            # Room for some of the tensors only.
            memory_limit=14_000 if row.placement == "hybrid" else None,
            order=row.order,  # type: ignore[arg-type]
            rank=rank,
            world_size=row.ranks,
            multiprocessing_context=row.start if row.workers else None,
        )


def whole_of(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row)))
def test_epoch_is_the_same(datasets: dict[str, Path], wanted: dict[str, torch.Tensor], row: Row) -> None:
    loaders = list(loaders_of(datasets[row.format], row))
    assert all(loader.dataset_obj.use_mmap == (row.placement != "preload") for loader in loaders)
    plan = loaders[0].dataset_obj.store.plan
    assert {entry.placement for entry in plan.entries if entry.reads_per_sample > 0} == {
        "mmap": {"mmap"},
        "preload": {"ram"},
        "hybrid": {"mmap", "ram"},
    }[row.placement]
    # All ranks run at once, as they do in life, and their workers start side by side.
    iterators = [iter(loader) for loader in loaders]
    served = [whole_of(list(iterator)) for iterator in iterators]
    assert_same(canonical(whole_of(served)), wanted)

    # And not only the same samples: rank r of R has taken every R-th place of the order, whatever the batch size.
    n = len(wanted["relevance"])
    order: Order = GlobalOrder(n, SEED, EPOCH)
    if row.order == "block":
        order = BlockOrder(n, SEED, EPOCH, BLOCK, WINDOW)
        assert order.n_windows > 3
    relevance = torch.empty(n)
    for rank, samples in enumerate(served):
        relevance[rank :: row.ranks] = samples["relevance"]
    tensors = jasper_tensors(**SIZES)
    assert torch.equal(relevance, tensors["pair_relevance"][tensors["train_idx"]][order[:]])
    for loader in loaders:
        loader.dataset_obj.close()
