"""What each order allows follows from the plan: more memory, fewer reads; packing reads what a sample takes."""

from __future__ import annotations

from pathlib import Path

import pytest

import jasper_store as js
from jasper_store.loading.estimate import DiskRates, estimates, packed_nbytes
from tests.builders import build_pt_dataset

DIM, N_NEG = 64, 3
SAMPLE = 4 * DIM * (2 + N_NEG + 3) + 8 + 4 + 4 + 8 * N_NEG


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pt_dataset(
        tmp_path_factory.mktemp("estimate") / "data",
        n_pairs=400,
        dim=DIM,
        n_neg=N_NEG,
        n_questions=3000,
        n_sources=3000,
    )


def test_a_packed_sample_takes_what_its_fields_take(data: Path) -> None:
    with js.JASPERSteeringDataset(data, "train") as dataset:
        assert packed_nbytes(dataset.graph) == SAMPLE


def test_orders_of_a_small_memory(data: Path) -> None:
    disk = DiskRates(1e8, 1e4)
    with js.JASPERSteeringDataset(data, "train", memory_limit=60_000) as dataset:
        found = {each.order: each for each in estimates(dataset.graph, dataset.store.plan, disk)}
    assert next(iter(found)) == "packed"
    assert found["packed"].nbytes == SAMPLE
    assert found["packed"].samples_per_s == pytest.approx(1e8 / SAMPLE)
    assert found["global"].reads > 0.5
    assert found["global"].samples_per_s < 1e4 / 0.5
    assert "block" not in found  # no memory for its windows beside questions that are named at random


def test_more_memory_reads_less(data: Path) -> None:
    reads = []
    for limit in (20_000, 60_000, 200_000, None):
        with js.JASPERSteeringDataset(data, "train", memory_limit=limit) as dataset:
            found = {each.order: each for each in estimates(dataset.graph, dataset.store.plan)}
        reads.append(found["global"].nbytes)
    assert reads == sorted(reads, reverse=True)
    assert reads[0] > 0
    assert reads[-1] == 0


def test_a_dataset_that_is_read_in_order_has_a_block_order(data: Path) -> None:
    with js.Dataset(data, {"some": "steering_centroid[i]"}, use_mmap=True, memory_limit=400) as dataset:
        found = {each.order: each for each in estimates(dataset.graph, dataset.store.plan)}
    assert found["block"].reads == 0
    assert found["block"].samples_per_s > found["global"].samples_per_s
