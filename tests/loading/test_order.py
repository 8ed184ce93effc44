"""The orders of an epoch: exact permutations at any size, statistically a shuffle, computed from nothing."""

from __future__ import annotations

import pickle
import resource
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from jasper_store.errors import IncompatibleOptionsError
from jasper_store.loading.order import (
    MAX_LENGTH,
    ROUNDS,
    TABLE_LIMIT,
    BlockOrder,
    Order,
    SequentialOrder,
    _Feistel,
    block_order,
    order,
)
from jasper_store.loading.shuffle_quality import shuffle_quality as mixing

GOLDEN = {
    "table": [3, 710, 625, 407, 910, 782],
    "feistel": [107383, 799296, 156253, 634252, 667858, 7094],
    "large": [862192562144, 99181099626, 821477100423],
    "block": [656387, 791711, 652546, 605843, 687731, 318398],
    "block end": [872732, 839946, 165511],
}
AWKWARD = [0, 1, 2, 3, 4, 5, 7, 31, 97, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 4099, 65535, 65536, 65537]


def is_permutation(permutation: Order) -> bool:
    return torch.equal(permutation[:].sort().values, torch.arange(len(permutation)))


@pytest.mark.parametrize("n", AWKWARD)
def test_every_size_is_an_exact_permutation(n: int) -> None:
    assert is_permutation(order(n, 1, 2))
    assert is_permutation(block_order(n, 1, 2))
    assert is_permutation(block_order(n, 1, 2, block=7, window=3 if n < 5000 else 500))


@given(
    n=st.integers(0, 9000),
    seed=st.integers(-(2**70), 2**70),
    epoch=st.integers(0, 2**40),
    block=st.integers(1, 300),
    window=st.integers(20, 400),
)
def test_any_seed_and_shape_is_an_exact_permutation(n: int, seed: int, epoch: int, block: int, window: int) -> None:
    assert is_permutation(order(n, seed, epoch))
    assert is_permutation(block_order(n, seed, epoch, block, window))


def test_windows_of_one_row_and_of_everything() -> None:
    assert is_permutation(block_order(50, 0, 0, 1, 1))
    assert is_permutation(block_order(50, 0, 0, 1000, 1000))


@pytest.mark.parametrize(
    "permutation", [order(10_000, 3, 4), block_order(10_000, 3, 4, 16, 8), SequentialOrder(10_000)]
)
def test_every_way_of_asking_agrees(permutation: Order) -> None:
    whole = permutation[:]
    places = torch.tensor([0, 9999, 17, 17, 5000])
    assert torch.equal(permutation[places], whole[places])
    assert torch.equal(permutation[places.int()], whole[places])
    assert torch.equal(permutation[places.numpy()], whole[places])
    assert torch.equal(permutation[places.tolist()], whole[places])
    assert torch.equal(permutation[range(9, 400, 7)], whole[9:400:7])
    assert torch.equal(permutation[400:9:-7], whole.flip(0)[9599:9990:7])
    assert permutation[5] == whole[5]
    assert permutation[np.int64(5)] == whole[5]
    assert permutation[-1] == whole[-1]
    assert list(permutation) == whole.tolist()
    assert len(permutation) == 10_000
    assert permutation[[]].dtype == torch.int64


def test_places_outside_the_epoch_are_refused() -> None:
    permutation = order(10, 0, 0)
    for place in (10, -11):
        with pytest.raises(IndexError):
            permutation[place]
    with pytest.raises(IndexError, match="position 10 is outside an epoch of 10"):
        permutation[torch.tensor([3, 10])]
    with pytest.raises(IndexError, match="position -1 "):
        permutation[[3, -1]]
    with pytest.raises(TypeError, match="one-dimensional integers"):
        permutation[torch.tensor([0.5])]
    with pytest.raises(TypeError, match="one-dimensional integers"):
        permutation[torch.zeros(2, 2, dtype=torch.int64)]


def test_impossible_sizes_are_refused() -> None:
    for n in (-1, MAX_LENGTH + 1):
        with pytest.raises(IncompatibleOptionsError, match="n="):
            order(n, 0, 0)
    with pytest.raises(IncompatibleOptionsError, match="block=0"):
        block_order(10, 0, 0, block=0)


def test_the_argument_is_kept() -> None:
    places = torch.arange(5000)
    order(5000, 0, 0).at(places)
    block_order(5000, 0, 0).at(places)
    assert torch.equal(places, torch.arange(5000))


def test_it_is_the_same_forever() -> None:
    """A state saved by an older release must mean the same samples: these numbers may never change."""
    assert order(1000, 42, 0)[:6].tolist() == GOLDEN["table"]
    assert order(1_000_003, 42, 7)[:6].tolist() == GOLDEN["feistel"]
    assert order(10**12, 42, 7)[:3].tolist() == GOLDEN["large"]
    assert block_order(1_000_003, 42, 7, 256, 128)[:6].tolist() == GOLDEN["block"]
    assert block_order(1_000_003, 42, 7, 256, 128)[-3:].tolist() == GOLDEN["block end"]
    assert block_order(1_000_003, 42, 7) == block_order(1_000_003, 42, 7, 64, 128)


def test_a_pickle_is_small_and_the_same() -> None:
    for permutation in (order(10**9, 1, 2), block_order(10**9, 1, 2)):
        permutation[0]
        packed = pickle.dumps(permutation)
        assert len(packed) < 4096
        assert pickle.loads(packed)[12345] == permutation[12345]


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_a_billion_samples_need_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for permutation in (order(10**9, 3, 4), block_order(10**9, 3, 4)):
        batch = permutation[torch.arange(256)]
        assert torch.unique(batch).numel() == 256
        assert 0 <= int(batch.min()) <= int(batch.max()) < 10**9
        permutation[torch.arange(10**9 - 256, 10**9)]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


# --- statistics: bounds so wide that a sound shuffle never meets them, and a broken one always does ---------------


def chi_square(counts: torch.Tensor) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("n", [20, TABLE_LIMIT + 1, 100_000])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_every_place_is_uniform_over_seeds(n: int, place: int) -> None:
    found = torch.tensor([order(n, seed, 0)[place] for seed in range(2000)])
    counts = torch.bincount(found * 20 // n, minlength=20).double()
    # 19 degrees of freedom: mean 19, deviation 6.2.
    assert chi_square(counts) < 19 + 6 * 6.2


@pytest.mark.parametrize("n", [TABLE_LIMIT, TABLE_LIMIT + 1, 50_021, 262_144])
@pytest.mark.parametrize("make", [order, block_order])
def test_neighbours_are_not_related(n: int, make: type[Order]) -> None:
    index = make(n, 5, 6)[:].double()
    for lag in (1, 2, 64):
        correlation = torch.corrcoef(torch.stack((index[:-lag], index[lag:])))[0, 1]
        assert abs(float(correlation)) < 6 / n**0.5
    if make is order:
        assert abs(float(torch.corrcoef(torch.stack((index, torch.arange(n).double())))[0, 1])) < 6 / n**0.5


@pytest.mark.parametrize("n", [1000, 50_021])
def test_epochs_and_seeds_are_unrelated(n: int) -> None:
    base = order(n, 1, 1)[:]
    for other in (order(n, 1, 2), order(n, 2, 1), order(n, -1, 1)):
        # A random permutation agrees with another in about one place.
        assert int((other[:] == base).sum()) < 12


def test_pairs_of_places_are_uniform() -> None:
    """Joint distribution of the first two places over seeds, on a grid of 5 x 5."""
    n = 5003
    pairs = torch.stack([order(n, seed, 3)[:2] for seed in range(5000)]) * 5 // n
    counts = torch.bincount(pairs[:, 0] * 5 + pairs[:, 1], minlength=25).double()
    assert chi_square(counts) < 24 + 6 * 6.9


@pytest.mark.parametrize("n", [3, 4])
def test_tiny_shuffles_reach_every_permutation(n: int) -> None:
    seen = [tuple(order(n, seed, 0)[:].tolist()) for seed in range(1200)]
    counts = torch.tensor([seen.count(one) for one in set(seen)]).double()
    assert len(counts) == {3: 6, 4: 24}[n]
    assert chi_square(counts) < len(counts) + 6 * (2 * len(counts)) ** 0.5


# --- the block order ---------------------------------------------------------------------------------------------


def windows_of(permutation: BlockOrder) -> list[torch.Tensor]:
    bounds = [permutation.window_bounds(number) for number in range(permutation.n_windows)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == permutation.n
    assert all(left[1] == right[0] for left, right in pairwise(bounds))
    return [permutation[start:stop] for start, stop in bounds]


@given(n=st.integers(1, 3000), block=st.integers(1, 64), window=st.integers(5, 40), seed=st.integers(0, 99))
def test_a_window_is_made_of_whole_blocks(n: int, block: int, window: int, seed: int) -> None:
    permutation = block_order(n, seed, 0, block, window)
    for number, rows in enumerate(windows_of(permutation)):
        start, stop = permutation.window_bounds(number)
        assert {permutation.window_of(place) for place in (start, stop - 1)} == {number}
        expected = [
            row
            for first in (permutation.blocks_of(number) * block).tolist()
            for row in range(first, min(first + block, n))
        ]
        assert sorted(rows.tolist()) == sorted(expected)


def test_rows_of_a_window_are_mixed() -> None:
    permutation = block_order(100_000, 1, 1, 256, 128)
    rows = permutation[:256]
    assert torch.unique(rows // 256).numel() > 80


def test_a_block_order_of_one_window_mixes_like_a_full_shuffle() -> None:
    one, full = mixing(block_order(8_000, 1, 1)), mixing(order(8_000, 1, 1))
    for figures in (one, full):
        assert figures.displacement == pytest.approx(1 / 3, abs=0.02)
        assert figures.displacement_gap < 0.03
        assert figures.neighbours == pytest.approx(1 / 3, abs=0.02)


def test_mixing_tells_orders_apart() -> None:
    block = mixing(block_order(1_000_000, 1, 1))
    assert block.displacement == pytest.approx(1 / 3, abs=0.03)
    assert block.neighbours < 0.02
    lying = mixing(SequentialOrder(10_000))
    assert lying.displacement == 0
    assert lying.displacement_gap > 0.9
    assert "full shuffle" in str(block)
    with pytest.raises(IncompatibleOptionsError, match="at least 2"):
        mixing(order(1, 0, 0))


@pytest.mark.parametrize("permutation", [order(100_003, 1, 2), order(2000, 1, 2), block_order(100_003, 1, 2)])
def test_tensors_and_arrays_compute_the_same(permutation: Order) -> None:
    """What runs on a device, run on the host."""
    places = torch.arange(len(permutation))
    assert torch.equal(permutation._at(places), permutation.at(places))


@pytest.mark.cuda
def test_a_device_computes_the_same() -> None:
    places = torch.arange(100_000, device="cuda")
    for permutation in (order(100_003, 1, 2), order(2000, 1, 2), block_order(100_003, 1, 2)):
        some = places[: len(permutation)]
        found = permutation.at(some)
        assert found.device == some.device
        assert torch.equal(found.cpu(), permutation.at(some.cpu()))


@pytest.mark.parametrize(
    "n", [2, 3, 17, 4097, 10_000, 65536, 65537, 2**31 - 1, 2**31 + 7, 2**40 + 12345, MAX_LENGTH - 1, MAX_LENGTH]
)
def test_the_compiled_shuffle_gives_the_same_numbers_as_arrays(n: int) -> None:
    rng = np.random.default_rng(n)
    network = _Feistel(n, rng.integers(0, 1 << 62, ROUNDS).tolist())
    numbers = np.arange(n) if n < 20_000 else rng.integers(0, n, 20_000)
    for some in (numbers, numbers[::3], numbers[:0]):
        kept = some.copy()
        assert np.array_equal(network.apply(some), network.by_arrays(kept))
        assert np.array_equal(some, kept)
