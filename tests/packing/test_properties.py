"""Random sample graphs, packed from any format: the same bits per sample, in the order of the permutation."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import jasper_store as js
from jasper_store.loading import coalescing, defaults, prefetcher
from jasper_store.loading.order import order
from jasper_store.packing import layout, pack
from jasper_store.samples.dataset import Dataset
from tests.samples.graphs import EPOCH, FORMATS, SEED, Expected, Graph, graphs
from tests.samples.test_properties import PLACEMENTS, opened, written

PACK_SEED = 11


def pack_and_check(graph: Graph, format: str, placement: str, number: int) -> None:  # noqa: A002
    """Blocks of few samples, and little memory, so that there are many passes."""
    expected = Expected(graph)
    with (
        pytest.MonkeyPatch.context() as patch,
        written(graph, format) as directory,
        tempfile.TemporaryDirectory() as made,
        opened(graph, directory, placement, number) as source,
    ):
        patch.setattr(layout, "BLOCK_NBYTES", 1)
        patch.setattr(layout, "_FEWEST", 1 + number % 7)
        patch.setattr(layout, "_WIDE", (1, 40, 1 << 20)[number % 3])
        patch.setattr(layout, "_HEADER_NBYTES", (2000, 8 << 20)[number % 2])
        patch.setattr(pack, "_LEAST_ROOM", 1)
        target = Path(made) / "packed"
        report = js.pack(source, target, seed=PACK_SEED, memory_limit=1 + number % 2000)
        assert sum(report.samples.values()) == graph.length
        positions = order(graph.length, PACK_SEED, 0)[:].tolist()
        for use_mmap in (True, False):
            with Dataset(target, split=source.split, seed=SEED, use_mmap=use_mmap) as packed:
                packed.set_epoch(EPOCH)
                assert packed.packed is not None
                assert list(packed.fields) == list(source.fields)
                expected.check(packed.__getitems__(torch.arange(graph.length)).tensors, positions)
                few = [place * 7 % graph.length for place in range(5)]
                expected.check(packed.__getitems__(few).tensors, [positions[place] for place in few])
        check_loader(target, source.split, expected, positions, 1 + number % 3)
        wrong = [found for found in js.verify(target).errors if found.check != "finite"]  # random bits may be NaN
        assert not wrong


def check_loader(target: Path, split: str | None, expected: Expected, positions: list[int], batch_size: int) -> None:
    """Blocks that are read whole serve the samples of their order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coalescing, "_SAMPLES", 2)
        patch.setattr(prefetcher, "GROUP_SAMPLES", 1)
        patch.setattr(defaults, "_blocks_nbytes", lambda *_: 0)
        patch.setattr(defaults, "_mapped_and_left", lambda _: (2, 1))
        with Dataset(target, split=split, seed=SEED, use_mmap=True) as packed:
            packed.set_epoch(EPOCH)
            loader = js.create_loader(packed, batch_size=batch_size, drop_last=False)
            assert loader.order == "block"
            order_of = loader.sampler_obj.order[:].tolist()
            assert sorted(order_of) == list(range(len(packed)))
            for number, batch in enumerate(loader):
                wanted = order_of[number * batch_size : (number + 1) * batch_size]
                expected.check(batch, [positions[place] for place in wanted])


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(graphs(), st.sampled_from(FORMATS), st.sampled_from(PLACEMENTS), st.integers(0, 2**20))
def test_packed_samples_have_the_bits_that_numpy_gives(
    graph: Graph,
    format: str,  # noqa: A002
    placement: str,
    number: int,
) -> None:
    pack_and_check(graph, format, placement, number)


@pytest.mark.slow
@settings(max_examples=2000, suppress_health_check=list(HealthCheck))
@given(graphs(), st.sampled_from(FORMATS), st.sampled_from(PLACEMENTS), st.integers(0, 2**20))
def test_many_more(graph: Graph, format: str, placement: str, number: int) -> None:  # noqa: A002
    pack_and_check(graph, format, placement, number)
