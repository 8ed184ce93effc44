"""Random sample graphs: whatever the format, the placement and the way, a batch has the bits that numpy gives."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from jasper_store.errors import PerformanceWarning
from jasper_store.jasper.loader import create_loader
from jasper_store.loading import coalescing, defaults, prefetcher, samplers, window_prefetcher
from jasper_store.loading.order import BlockOrder, order
from jasper_store.native import gather
from jasper_store.samples.dataset import Dataset
from jasper_store.samples.declaration import Choice, Variant
from jasper_store.store import assignment
from tests.samples.graphs import EPOCH, FORMATS, SEED, Expected, Graph, Look, Pick, graphs

PLACEMENTS = ("mapped", "preloaded", "hybrid", "limited")
BLOCK, WINDOW = 4, 2

few = settings(max_examples=150, suppress_health_check=list(HealthCheck))
many = settings(max_examples=3000, suppress_health_check=list(HealthCheck))


@contextmanager
def written(graph: Graph, format: str) -> Iterator[Path]:  # noqa: A002 - the word that users pass
    directory = Path(tempfile.mkdtemp())
    try:
        yield graph.write(directory / "data", format)
    finally:
        shutil.rmtree(directory)


def declared(graph: Graph) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in graph.fields.items():
        if isinstance(value, Look):
            fields[name] = str(value)
        elif isinstance(value, Pick):
            fields[name] = Choice(value.tensors, value.probabilities, rows=str(value.rows))
        else:
            fields[name] = Variant(value)
    return fields


@contextmanager
def opened(graph: Graph, directory: Path, placement: str, number: int = 0) -> Iterator[Dataset]:
    """Open a graph's dataset; ``number`` decides which tensors a hybrid preloads."""
    options: dict[str, dict[str, Any]] = {
        "mapped": {"use_mmap": True},
        "preloaded": {"use_mmap": False},
        "hybrid": {},
        "limited": {"memory_limit": 100 + 37 * (number % 60)},
    }
    splits = None if graph.split is None else {"train": graph.split}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", PerformanceWarning)  # compressed files cannot be mapped, and say so
        if placement == "hybrid":

            def choose(items: Any, must: set[str], _: int) -> set[str]:
                return must | {item.name for place, item in enumerate(items) if number >> place % 10 & 1}

            patch.setattr(assignment, "_choose", choose)
        dataset = Dataset(
            directory,
            declared(graph),
            splits=splits,
            split=None if splits is None else "train",
            seed=SEED,
            **options[placement],
        )
    with dataset:
        dataset.set_epoch(EPOCH)
        yield dataset


def batches_of(graph: Graph, number: int) -> list[torch.Tensor]:
    """Positions: some with repeats, none, one, all."""
    random = torch.Generator().manual_seed(number)
    n = graph.length
    return [
        torch.randint(n, (11,), generator=random),
        torch.empty(0, dtype=torch.int64),
        torch.tensor([n - 1]),
        torch.randperm(n, generator=random),
    ]


def check_every_way(graph: Graph, format: str, placement: str, number: int) -> None:  # noqa: A002
    expected = Expected(graph)
    with written(graph, format) as directory, opened(graph, directory, placement, number) as dataset:
        assert len(dataset) == graph.length
        for positions in batches_of(graph, number):
            wanted = positions.tolist()
            expected.check(dataset.__getitems__(positions).tensors, wanted)
            draw = dataset.draw_now()
            stepwise = dataset.reader.gather(dataset.reader.resolve(positions, draw), draw)
            expected.check(stepwise, wanted)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gather, "kernel", lambda: None)
            with opened(graph, directory, placement, number) as slow:
                positions = batches_of(graph, number)[0]
                expected.check(slow.__getitems__(positions).tensors, positions.tolist())
        check_loader(dataset, expected, 1 + number % 5, ("auto", "global")[number % 2])


def check_loader(dataset: Dataset, expected: Expected, batch_size: int, kind: Any) -> None:
    loader = create_loader(dataset, batch_size=batch_size, drop_last=False, order=kind)
    n = len(dataset)
    positions = loader.sampler_obj.order[:].tolist()
    assert sorted(positions) == list(range(n))
    if kind == "global":
        assert positions == order(n, SEED, EPOCH)[:].tolist()
    served = list(loader)
    assert len(served) == -(-n // batch_size)
    for place, batch in enumerate(served):
        expected.check(batch, positions[place * batch_size : (place + 1) * batch_size])


# --- rows that are read past the page cache -------------------------------------------------------------------------


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Windows of some samples, and a plan that says that what is mapped does not fit."""
    if gather.kernel() is None:
        pytest.skip("the kernel was not built: no C compiler here")
    try:
        (tmp_path / "probe").write_bytes(b"x" * 4096)
        os.close(os.open(tmp_path / "probe", os.O_RDONLY | os.O_DIRECT))
    except (OSError, AttributeError):
        pytest.skip("this file system does not read directly")
    monkeypatch.setitem(samplers._ORDERS, "block", partial(BlockOrder, block=BLOCK, window=WINDOW))
    monkeypatch.setattr(coalescing, "_SAMPLES", 2)
    monkeypatch.setattr(prefetcher, "GROUP_SAMPLES", 1)
    monkeypatch.setattr(defaults, "_staged_nbytes", lambda _: 0)
    monkeypatch.setattr(defaults, "_mapped_and_left", lambda _: (2, 1))


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("examples", [150, pytest.param(600, marks=pytest.mark.slow)])
def test_rows_read_past_the_page_cache_are_the_same(examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    staged = 0
    real = window_prefetcher.WindowPrefetcher

    def counted(*arguments: Any) -> Any:
        nonlocal staged
        staged += 1
        return real(*arguments)

    monkeypatch.setattr(prefetcher, "WindowPrefetcher", counted)

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(graphs(), st.sampled_from([name for name in FORMATS if name != "gzip"]), st.integers(0, 2**20))
    def check(graph: Graph, format: str, number: int) -> None:  # noqa: A002 - the word that users pass
        expected = Expected(graph)
        with (
            written(graph, format) as directory,
            opened(graph, directory, ("mapped", "hybrid")[number % 2], number) as ds,
        ):
            for _ in range(2):
                check_loader(ds, expected, 1 + number % 3 % 2, "block")

    check()
    assert staged > examples // 4


# --- any way ----------------------------------------------------------------------------------------------------------


@few
@given(graphs(), st.sampled_from(FORMATS), st.sampled_from(PLACEMENTS), st.integers(0, 2**20))
def test_a_batch_has_the_bits_that_numpy_gives(
    graph: Graph,
    format: str,  # noqa: A002
    placement: str,
    number: int,
) -> None:
    check_every_way(graph, format, placement, number)


@pytest.mark.slow
@many
@given(graphs(), st.sampled_from(FORMATS), st.sampled_from(PLACEMENTS), st.integers(0, 2**20))
def test_many_more_batches(graph: Graph, format: str, placement: str, number: int) -> None:  # noqa: A002
    check_every_way(graph, format, placement, number)
