"""Whatever the graph, the tensors, the format, the placement and the path: the bits are those that numpy gives."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import jasper_store as js
from jasper_store.conversion.writer import DirectoryWriter
from jasper_store.loading import coalescing, defaults, prefetcher, samplers
from jasper_store.loading.order import BlockOrder
from jasper_store.native import gather as native
from jasper_store.samples.dataset import Dataset
from jasper_store.store import assignment
from tests.samples.graphs import Case, Maker, expected, numpy_of

FORMATS = ("npy", "safetensors", "pt", "hdf5", "hdf5-gzip")
pytestmark = pytest.mark.filterwarnings("ignore::jasper_store.errors.PerformanceWarning")  # gzip cannot be mapped
PLACEMENTS = ("mapped", "preloaded", "hybrid")


def write(directory: Path, storage: str, case: Case) -> None:
    compression = "gzip" if storage == "hdf5-gzip" else None
    with DirectoryWriter(directory, storage.removesuffix("-gzip"), compression=compression) as writer:
        for name, tensor in case.tensors.items():
            if isinstance(tensor, list):
                for row in tensor:
                    writer.append_ragged(name, [row.tolist()])
            else:
                writer.append(name, tensor)


def opened(directory: Path, placement: str, case: Case) -> Dataset:
    split: Any = {"splits": case.splits, "split": "train"} if case.splits else {}
    if placement != "hybrid":
        return js.Dataset(directory, case.fields, use_mmap=placement == "mapped", **split)
    # Every other tensor is preloaded.
    with patch.object(assignment, "_choose", lambda items, must, _: must | {item.name for item in items[::2]}):
        return js.Dataset(directory, case.fields, **split)


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, np.ndarray], case: Case) -> None:
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        got = numpy_of(found[key])
        assert got.shape == value.shape or (got.size == 0 and value.size == 0), (key, case.fields)
        assert got.tobytes() == value.astype(got.dtype).tobytes(), (key, case.fields)


def check(seed: int, storage: str, placement: str, *, ragged: bool, choice: bool, split: bool) -> None:
    case = Maker(seed, ragged=ragged, choice=choice, split=split).case
    random = np.random.default_rng(seed)
    with TemporaryDirectory() as temporary:
        directory = Path(temporary, "data")
        write(directory, storage, case)
        with opened(directory, placement, case) as dataset:
            assert len(dataset) == case.length
            for size in (0, 1, 7, 40):
                positions = random.integers(0, case.length, size)
                wanted = expected(case, positions)
                assert_equal(dataset.__getitems__(positions).tensors, wanted, case)
                draw, reader = dataset.draw_now(), dataset.reader
                asked = torch.from_numpy(positions)
                assert_equal(reader.gather(reader.resolve(asked, draw), draw), wanted, case)
            served = {"batch_size": int(random.integers(1, 9)), "drop_last": False, "shuffle": bool(seed % 2)}
            for order in ("global", "block"):
                loader = js.create_loader(dataset, order=order, **served)  # type: ignore[arg-type]
                sampler: Any = loader.batch_sampler
                for batch, asked_for in zip(loader, list(sampler), strict=True):
                    assert_equal(batch, expected(case, np.asarray(asked_for)), case)


CASES = {"ragged": st.booleans(), "choice": st.booleans(), "split": st.booleans()}


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), storage=st.sampled_from(FORMATS), placement=st.sampled_from(PLACEMENTS), **CASES)
def test_every_path_gives_the_bits_of_numpy(seed: int, storage: str, placement: str, **kinds: bool) -> None:
    check(seed, storage, placement, **kinds)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), storage=st.sampled_from(FORMATS), placement=st.sampled_from(PLACEMENTS), **CASES)
def test_without_the_native_kernel_too(seed: int, storage: str, placement: str, **kinds: bool) -> None:
    with patch.object(native, "kernel", lambda: None):
        check(seed, storage, placement, **kinds)


@pytest.mark.slow
@settings(max_examples=1500)
@given(seed=st.integers(0, 2**32), storage=st.sampled_from(FORMATS), placement=st.sampled_from(PLACEMENTS), **CASES)
def test_many_more(seed: int, storage: str, placement: str, **kinds: bool) -> None:
    check(seed, storage, placement, **kinds)


def test_rows_that_are_read_past_the_page_cache_are_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Block order of small windows; every served tensor in the order of the file is staged."""
    if native.kernel() is None or not direct_reads(tmp_path):
        pytest.skip("needs the native kernel, and a file system that reads directly")
    monkeypatch.setattr(samplers, "_ORDERS", {**samplers._ORDERS, "block": partial(BlockOrder, block=8, window=4)})
    monkeypatch.setattr(coalescing, "_SAMPLES", 8)
    monkeypatch.setattr(prefetcher, "GROUP_SAMPLES", 8)
    monkeypatch.setattr(defaults, "_staged_nbytes", lambda _: 0)
    monkeypatch.setattr(defaults, "_mapped_and_left", lambda _: (2, 1))
    staged, whole = 0, 0
    for seed in range(40):
        # Without a split the rows are in the order of the file; with one, its list has to be in memory.
        case = Maker(seed, ragged=seed % 5 == 4, choice=bool(seed % 2), split=seed % 4 == 3).case
        write(tmp_path / str(seed), "safetensors", case)
        served = [name for name in case.tensors if name != "listed"]
        mapped = set(served if seed % 3 else served[1:])
        with patch.object(assignment, "_choose", lambda items, *_, mapped=mapped: {i.name for i in items} - mapped):
            split: Any = {"splits": case.splits, "split": "train"} if case.splits else {}
            dataset = js.Dataset(tmp_path / str(seed), case.fields, **split)
        loader = js.create_loader(dataset, batch_size=1 + seed % 8, drop_last=False, order="block")
        batches = iter(loader)
        sampler: Any = loader.batch_sampler
        for number, asked_for in enumerate(list(sampler)):
            assert_equal(next(batches), expected(case, np.asarray(asked_for)), case)
            context = batches._batches._indices.context
            staged += number == 0 and context.staged is not None
            whole += number == 0 and context.staged is not None and context.staged._batch_gather is not None
        assert next(batches, None) is None
        dataset.close()
    assert staged > 10
    assert whole, "some batches are one native call, staged rows included"


def direct_reads(directory: Path) -> bool:
    (directory / "probe").write_bytes(b"x" * 4096)
    try:
        os.close(os.open(directory / "probe", os.O_RDONLY | os.O_DIRECT))
    except (OSError, AttributeError):
        return False
    return True
