"""Looking ahead: every row is announced before it is read, in stages, and an iterator may be left at any time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from jasper_store.errors import CorruptFileError
from jasper_store.jasper.schema import declaration_for
from jasper_store.jasper.steering import default_curriculum
from jasper_store.loading.advisor import Stopwatch
from jasper_store.loading.batches import BatchSampler
from jasper_store.loading.order import block_order
from jasper_store.loading.prefetcher import MAX_NBYTES, MIN_BATCHES, Prefetcher, depth_for
from jasper_store.loading.samplers import EpochSampler
from jasper_store.samples.compiler import build_graph
from jasper_store.samples.reader import SampleReader

PAIRS = 400
PAIRWISE = ("pair_index", "pair_cluster_id", "pair_relevance", "hard_negatives", "negative_tiers", "centroid_distances")
STEERING = ("steering_centroid", "steering_keyword_weighted", "steering_residual")
EMBEDDINGS = ("question_embs", "source_embs", *STEERING)


@dataclass
class FakeTensor:
    """Remembers which rows were announced and dropped."""

    name: str
    values: torch.Tensor
    placement: str
    log: list[tuple[str, str]]
    prefetching: bool = True
    announced: set[int] = field(default_factory=set)
    dropped: set[int] = field(default_factory=set)
    calls: int = 0
    in_memory: Any = None

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def row_shape(self) -> torch.Size:
        return self.values.shape[1:]

    def prefetch(self, rows: torch.Tensor) -> None:
        self.calls += 1
        self.log.append((self.name, "prefetch"))
        self.announced.update(torch.as_tensor(rows).tolist())

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        rows = torch.as_tensor(rows)
        if self.placement == "mmap":
            assert set(rows.tolist()) <= self.announced, f"{self.name}: rows were read before they were announced"
        return self.values[rows]

    def drop_runs(self, starts: np.ndarray, stops: np.ndarray) -> None:
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            self.dropped.update(range(start, stop))


class Draw:
    """Pair p steers by variant p % 4."""

    epoch, forced = 0, None

    def requests(self, rows: torch.Tensor) -> list[Any]:
        return []

    def variants(self, rows: torch.Tensor) -> torch.Tensor:
        return rows % 4


class FakeDataset:
    """Pair p asks question p, reads source 2p for its positive and its negative, and steers by variant p % 4."""

    def __init__(self, mapped: set[str], n: int = PAIRS) -> None:
        self.log: list[tuple[str, str]] = []
        self.n = n
        pairs = torch.arange(n)
        values = dict.fromkeys(PAIRWISE, pairs) | {"train_idx": pairs}
        values |= dict.fromkeys((*EMBEDDINGS, "keyword_embs"), torch.zeros(2 * n, 1)) | dict.fromkeys(
            STEERING, torch.zeros(n, 1)
        )
        values |= {"pair_index": torch.stack([pairs, 2 * pairs], 1), "hard_negatives": 2 * pairs[:, None]}
        self.store: dict[str, FakeTensor] = {
            name: FakeTensor(name, value, "mmap" if name in mapped else "ram", self.log)
            for name, value in values.items()
        }
        self.graph = build_graph(declaration_for(default_curriculum()), self.store, "train")
        self.reader = SampleReader(self.graph, FakeStore(self.store))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.n

    def draw_now(self) -> Any:
        return Draw()

    def read(self, batch: torch.Tensor) -> None:
        """What making a batch reads."""
        self.reader.gather(self.reader.resolve(torch.as_tensor(batch), self.draw_now()), self.draw_now())


class FakeStore(dict[str, Any]):
    device = torch.device("cpu")

    def stacked(self, names: Any) -> None:
        return None


ALL = {"train_idx", *PAIRWISE, *EMBEDDINGS, "keyword_embs"}


def batches(n: int, size: int) -> Iterator[torch.Tensor]:
    return iter(torch.split(torch.arange(n), size))


@pytest.mark.parametrize("mapped", [ALL, {"source_embs"}, set(PAIRWISE), {"train_idx"}, set(STEERING), set()])
@pytest.mark.parametrize("size", [1, 7, 64, 256, 1000])
@pytest.mark.parametrize("depth", [1, 4, 64])
def test_every_row_is_announced_before_it_is_read(mapped: set[str], size: int, depth: int) -> None:
    dataset = FakeDataset(mapped)
    served = []
    for batch in Prefetcher(dataset, depth, batch_size=size).wrap(batches(PAIRS, size)):
        dataset.read(batch)
        served.append(batch)
    assert torch.equal(torch.cat(served), torch.arange(PAIRS))
    for name, tensor in dataset.store.items():
        assert bool(tensor.announced) == (name in mapped - {"keyword_embs"}), name


def test_only_the_variant_that_is_drawn_is_announced() -> None:
    dataset = FakeDataset(set(STEERING))
    list(Prefetcher(dataset).wrap(batches(PAIRS, 50)))
    for number, name in enumerate(STEERING, start=1):
        assert dataset.store[name].announced == set(range(number, PAIRS, 4))


def test_it_stays_a_few_batches_ahead() -> None:
    dataset = FakeDataset({"source_embs"})
    found: Any = Prefetcher(dataset, 3, batch_size=32).wrap(batches(PAIRS, 32)).batches
    assert dataset.store["source_embs"].calls == 0
    next(found)
    # 32 samples a batch are announced in groups of three, the depth: two groups are drawn before the first batch
    # leaves, and the thread may be at the second.
    found.close()
    assert len(dataset.store["source_embs"].announced) in {3 * 32, 6 * 32}


def test_small_batches_are_announced_together() -> None:
    dataset = FakeDataset({"source_embs"})
    assert len(list(Prefetcher(dataset, 64, batch_size=4).wrap(batches(PAIRS, 4)))) == PAIRS // 4
    assert dataset.store["source_embs"].calls == -(-PAIRS // 256)


def test_it_stops_when_pages_are_in_memory() -> None:
    dataset = FakeDataset({"source_embs"})
    dataset.store["source_embs"].prefetching = False
    list(Prefetcher(dataset).wrap(batches(PAIRS, 50)))
    assert dataset.store["source_embs"].calls == 0
    # Faults of workers are not seen here, so the store is told all the same and looks again now and then.
    list(Prefetcher(dataset, rely_on_faults=False).wrap(batches(PAIRS, 50)))
    assert dataset.store["source_embs"].calls == PAIRS // 50


def test_a_variant_that_is_never_drawn_does_not_keep_it_going() -> None:
    dataset = FakeDataset({"source_embs", "steering_residual"})
    dataset.store["source_embs"].prefetching = False
    pairs = torch.arange(0, PAIRS, 4)  # all of them steer by variant 0
    list(Prefetcher(dataset).wrap(iter(torch.split(pairs, 2))))
    assert 0 < dataset.store["source_embs"].calls < 30


def test_nothing_mapped_costs_nothing() -> None:
    dataset = FakeDataset(set())
    source = batches(PAIRS, 10)
    assert not list(Prefetcher(dataset).wrap(source).batches) or source is not None


def test_an_abandoned_iterator_leaves_nothing_behind() -> None:
    dataset = FakeDataset(ALL)
    sampler = BatchSampler(EpochSampler(dataset, 1, 0), 16, False, prefetcher=Prefetcher(dataset))
    for _ in range(3):
        iterator = iter(sampler)
        next(iterator)
        del iterator
    assert sum(len(batch) for batch in sampler) == PAIRS


def test_the_state_counts_what_was_yielded_and_not_what_was_drawn() -> None:
    dataset = FakeDataset({"source_embs"})
    sampler = BatchSampler(EpochSampler(dataset, 1, 0), 16, False, prefetcher=Prefetcher(dataset, 8))
    iterator: Any = iter(sampler)
    first = [next(iterator) for _ in range(3)]
    state = iterator.state_dict()
    assert state["consumed"] == 48
    resumed: Any = iter(BatchSampler(EpochSampler(dataset, 1, 0), 10, False))
    resumed.load_state_dict(state)
    assert sorted(torch.cat([torch.as_tensor(batch) for batch in (*first, *resumed)]).tolist()) == list(range(PAIRS))


def test_the_thread_ends_with_the_pass_and_with_an_abandoned_one() -> None:
    def threads() -> int:
        return sum(thread.name.startswith("jasper-prefetch") for thread in threading.enumerate())

    before = threads()
    dataset = FakeDataset(ALL)
    sampler = BatchSampler(EpochSampler(dataset, 1, 0), 10, False, prefetcher=Prefetcher(dataset))
    iterator = iter(sampler)
    next(iterator)
    assert threads() == before + 1
    del iterator  # without a collection: the thread would go on reading
    assert threads() == before
    assert len(list(sampler)) == PAIRS // 10
    assert threads() == before


def test_no_thread_is_started_while_pages_are_in_memory() -> None:
    dataset = FakeDataset({"source_embs"})
    dataset.store["source_embs"].prefetching = False
    before = threading.active_count()
    for _ in Prefetcher(dataset).wrap(batches(PAIRS, 50)):
        assert threading.active_count() == before


def test_an_error_while_announcing_reaches_the_trainer() -> None:
    dataset = FakeDataset(ALL)

    def broken(rows: torch.Tensor) -> None:
        raise CorruptFileError("the file was truncated")

    dataset.store["source_embs"].prefetch = broken  # type: ignore[method-assign]
    with pytest.raises(CorruptFileError, match="truncated"):
        list(Prefetcher(dataset).wrap(batches(PAIRS, 50)))


def test_lists_of_a_foreign_sampler_are_announced_too() -> None:
    dataset = FakeDataset({"source_embs"})
    served = list(BatchSampler(range(20), 6, False, prefetcher=Prefetcher(dataset)))
    assert [list(batch) for batch in served] == [list(range(i, min(i + 6, 20))) for i in range(0, 20, 6)]
    assert dataset.store["source_embs"].announced == set(range(0, 40, 2))


@settings(max_examples=40)
@given(
    n=st.integers(1, 400),
    size=st.integers(3, 90),
    ranks=st.integers(1, 3),
    block=st.integers(1, 20),
    window=st.integers(2, 6),
    start=st.integers(0, 300),
    drop_behind=st.booleans(),
)
def test_windows_of_a_block_order(
    n: int, size: int, ranks: int, block: int, window: int, start: int, drop_behind: bool
) -> None:
    dataset = FakeDataset({"train_idx", *PAIRWISE, *STEERING}, n)
    order = block_order(n, 0, 0, block, window)
    for rank in range(ranks):
        places = torch.tensor(range(min(start, n) + rank, n, ranks), dtype=torch.int64)
        drawn = iter(torch.split(order.at(places), size)) if len(places) else iter(())
        ahead = Prefetcher(dataset, 4, batch_size=size, drop_behind=drop_behind)
        served = 0
        whole = order.at(places).tolist()
        for batch in ahead.wrap(drawn, order, min(start, n) + rank, size * ranks, ranks):
            dataset.read(batch)
            # Nothing is dropped that this rank has still to read.
            assert dataset.store["steering_centroid"].dropped.isdisjoint(whole[served:])
            served += len(batch)
        assert served == len(places)
        for tensor in dataset.store.values():
            tensor.dropped.clear()


def test_windows_are_dropped_behind() -> None:
    n = 20_000
    dataset = FakeDataset({"steering_centroid"}, n)
    order = block_order(n, 0, 0, 10, 10)
    ahead = Prefetcher(dataset, 2, batch_size=50, drop_behind=True)
    list(ahead.wrap(iter(torch.split(order[:], 50)), order, 0, 50))
    assert n - 700 < len(dataset.store["steering_centroid"].dropped) < n


def test_time_is_written_down() -> None:
    watch = Stopwatch()
    dataset = FakeDataset(ALL)
    list(Prefetcher(dataset, stopwatch=watch).wrap(batches(PAIRS, 10)))
    assert watch.prefetch.wall > 0


def test_depth() -> None:
    assert depth_for(256, 10_000) == MIN_BATCHES
    assert depth_for(32, 10_000) == 32
    assert depth_for(65_536, 10_000) == 1
    assert depth_for(4096, 10_000) == min(MIN_BATCHES, MAX_NBYTES // (4096 * 10_000))
    assert depth_for(256, 10_000, memory=0) == 1
    assert depth_for(1, 0) == 1024
