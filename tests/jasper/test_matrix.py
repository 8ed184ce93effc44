"""One epoch, however it is served, is bit for bit the same: format, placement, workers, start method, loader."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from jasper_store.conversion.converter import convert
from jasper_store.errors import PerformanceWarning
from jasper_store.jasper.dataset import JASPERSteeringDataset
from jasper_store.jasper.loader import create_loader
from jasper_store.jasper.schema import SCHEMA
from jasper_store.loading.order import order
from tests.builders import build_pt_dataset, jasper_tensors
from tests.jasper.expected import assert_same, expected_batch

SIZES: dict[str, Any] = {"n_pairs": 120, "dim": 12, "n_neg": 2, "n_questions": 100, "n_sources": 110}
EPOCH, SEED = 23, 5
FORMATS = {
    "pt": ("pt", None),
    "hdf5-gzip": ("hdf5", "gzip"),
    "hdf5-contiguous": ("hdf5", None),
    "safetensors": ("safetensors", None),
    "npy": ("npy", None),
}
WORKERS = {
    "0": {},
    "2-fork": {"num_workers": 2, "multiprocessing_context": "fork"},
    "2-spawn": {"num_workers": 2, "multiprocessing_context": "spawn"},
}
#: Interpreters that start are what costs, so every format is spawned for once; both placements and loaders are among them.
SPAWNED = {
    ("pt", "mapped", "loader"),
    ("hdf5-gzip", "mapped", "plain"),
    ("hdf5-contiguous", "preloaded", "loader"),
    ("safetensors", "mapped", "loader"),
    ("npy", "preloaded", "plain"),
}


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    source = build_pt_dataset(tmp_path_factory.mktemp("matrix") / "pt", **SIZES)
    found = {"pt": source}
    for name, (target, compression) in FORMATS.items():
        if name != "pt":
            found[name] = source.parent / name
            convert(source, found[name], format=target, compression=compression, schema=SCHEMA)
    return found


@pytest.fixture(scope="session")
def wanted() -> dict[str, dict[str, torch.Tensor]]:
    tensors = jasper_tensors(**SIZES)
    size = len(tensors["train_idx"])
    return {
        "plain": expected_batch(tensors, "train", range(size), seed=SEED, epoch=EPOCH),
        "loader": expected_batch(
            tensors, "train", order(size, SEED, EPOCH)[torch.arange(size)], seed=SEED, epoch=EPOCH
        ),
    }


@pytest.mark.parametrize(
    ("name", "placement", "loader", "workers"),
    [
        case
        for case in itertools.product(FORMATS, ["mapped", "preloaded", "planned"], ["plain", "loader"], WORKERS)
        # A hybrid is made of the two placements that are tested with workers.
        if case[3] == "0" or (case[1] != "planned" and (case[3] != "2-spawn" or case[:3] in SPAWNED))
    ],
)
def test_epoch_is_the_same(
    datasets: dict[str, Path],
    wanted: dict[str, dict[str, torch.Tensor]],
    name: str,
    placement: str,
    loader: str,
    workers: str,
) -> None:
    how: dict[str, Any] = {
        "storage_format": FORMATS[name][0],
        "use_mmap": {"mapped": True, "preloaded": False, "planned": None}[placement],
        # Room for some of the tensors only.
        "memory_limit": 12_000 if placement == "planned" else None,
        "seed": SEED,
        "epoch": EPOCH,
    }
    options: dict[str, Any] = {"batch_size": 32, **WORKERS[workers]}
    with warnings.catch_warnings():
        # A compressed file cannot be mapped; it says so.
        warnings.simplefilter("ignore" if name == "hdf5-gzip" else "error", PerformanceWarning)
        if loader == "plain":
            dataset = JASPERSteeringDataset(datasets[name], "train", **how)
            batches = list(DataLoader(dataset, **options))
        else:
            created = create_loader(datasets[name], "train", drop_last=False, order="global", **how, **options)
            dataset = created.dataset_obj
            batches = list(created)
    assert dataset.use_mmap == (placement != "preloaded" and name != "hdf5-gzip")
    assert dataset.storage_format == FORMATS[name][0]
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    assert_same(whole, wanted[loader])
    dataset.close()
