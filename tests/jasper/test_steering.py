"""The curriculum and the draw: pure functions of the epoch, and of (seed, epoch, pair)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from jasper_store.errors import IntegrityError, UnknownNameError
from jasper_store.jasper.steering import (
    VARIANTS,
    default_curriculum,
    draw_variants,
    parse_curriculum,
    variant_number,
)

DEFAULTS = {
    0: (0.7, 0.2, 0.1, 0.0),
    9: (0.7, 0.2, 0.1, 0.0),
    10: (0.5, 0.3, 0.15, 0.05),
    19: (0.5, 0.3, 0.15, 0.05),
    20: (0.3, 0.3, 0.25, 0.15),
    30: (0.1, 0.3, 0.35, 0.25),
    39: (0.1, 0.3, 0.35, 0.25),
    40: (0.0, 0.2, 0.4, 0.4),
    1000: (0.0, 0.2, 0.4, 0.4),
}


@pytest.mark.parametrize(("epoch", "probs"), DEFAULTS.items())
def test_default_curriculum(epoch: int, probs: tuple[float, ...]) -> None:
    assert default_curriculum().probabilities(epoch) == probs
    assert parse_curriculum(None, None, "config.json").probabilities(epoch) == probs


def test_linear_curriculum_moves_zero_and_shares_the_rest_in_the_given_ratio() -> None:
    curriculum = parse_curriculum(
        {"zero_prob_start": 0.5, "zero_prob_end": 0.1, "epochs_total": 100},
        {"zero": 0.25, "centroid": 0.25, "keyword": 0.3, "residual": 0.2},
        "config.json",
    )
    assert curriculum.probabilities(0) == pytest.approx((0.5, 0.5 / 3, 0.2, 0.4 / 3))
    none, centroid, keyword, residual = curriculum.probabilities(50)
    assert none == pytest.approx(0.3)
    assert (centroid, keyword, residual) == pytest.approx((0.7 * 0.25 / 0.75, 0.7 * 0.3 / 0.75, 0.7 * 0.2 / 0.75))
    assert curriculum.probabilities(100)[0] == pytest.approx(0.1)
    assert curriculum.probabilities(10_000) == curriculum.probabilities(100)


def test_linear_curriculum_with_nothing_but_zero_gives_the_rest_to_centroid() -> None:
    curriculum = parse_curriculum(
        {"zero_prob_start": 0.5, "zero_prob_end": 0.5, "epochs_total": 1}, {"zero": 1.0}, "config.json"
    )
    assert curriculum.probabilities(3) == pytest.approx((0.5, 0.5, 0.0, 0.0))


@pytest.mark.parametrize(
    "probs", [{"none": 0.1, "centroid": 0.2, "keyword": 0.3, "residual": 0.4}, [0.1, 0.2, 0.3, 0.4]]
)
def test_probabilities_alone_are_fixed(probs: object) -> None:
    curriculum = parse_curriculum(None, probs, "config.json")
    assert curriculum.probabilities(0) == curriculum.probabilities(77) == (0.1, 0.2, 0.3, 0.4)


@pytest.mark.parametrize(
    ("curriculum", "probs", "error", "text"),
    [
        (None, {"none": 0.5}, IntegrityError, "add up to 1"),
        (None, [0.5, 0.5], IntegrityError, "four of them"),
        (None, {"none": -1.0, "centroid": 2.0}, IntegrityError, "at least 0"),
        (None, {"none": float("nan")}, IntegrityError, "at least 0"),
        (None, {"upwards": 1.0}, UnknownNameError, "upwards"),
        ({"zero_prob_start": 1.5}, None, IntegrityError, "zero_prob_start"),
        ({"epochs_total": "ten"}, None, IntegrityError, "epochs_total"),
        ("fast", None, IntegrityError, "object"),
    ],
)
def test_bad_configurations_are_refused(curriculum: object, probs: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        parse_curriculum(curriculum, probs, "config.json")


def test_names_and_aliases() -> None:
    assert [variant_number(name) for name in VARIANTS] == [0, 1, 2, 3]
    assert variant_number("zero") == 0
    assert variant_number("keyword") == 2
    with pytest.raises(UnknownNameError, match="residual"):
        variant_number("upwards")


@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10_000), n=st.integers(1, 300))
def test_draw_is_the_same_in_any_order_and_batch(seed: int, epoch: int, n: int) -> None:
    pairs = torch.arange(n)
    probs = (0.1, 0.2, 0.3, 0.4)
    whole = draw_variants(pairs, seed, epoch, probs)
    assert torch.equal(draw_variants(pairs.flip(0), seed, epoch, probs).flip(0), whole)
    assert torch.equal(torch.cat([draw_variants(part, seed, epoch, probs) for part in pairs.split(7)]), whole)


def reference(pair: int, seed: int, epoch: int) -> int:
    """The documented hash in plain integers, to hold the tensor arithmetic against."""
    mask = (1 << 64) - 1

    def mix(value: int) -> int:
        value &= mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    golden = 0x9E3779B97F4A7C15
    key = mix(mix(seed + golden) ^ mix((epoch + 1) * 0x94D049BB133111EB))
    return mix(pair * golden + key) >> 32


@given(pair=st.integers(0, 2**40), seed=st.integers(-(2**40), 2**40), epoch=st.integers(0, 2**20))
def test_draw_follows_the_documented_hash(pair: int, seed: int, epoch: int) -> None:
    number = reference(pair, seed, epoch) / 2**32
    expected = sum(number >= bound for bound in (0.25, 0.5, 0.75))
    assert int(draw_variants(torch.tensor([pair]), seed, epoch, (0.25, 0.25, 0.25, 0.25))) == expected


def test_frequencies_follow_the_probabilities_and_impossible_variants_never_come() -> None:
    pairs = torch.arange(200_000)
    drawn = draw_variants(pairs, 42, 3, (0.7, 0.2, 0.1, 0.0)).bincount(minlength=4) / len(pairs)
    # Six standard deviations of a share of one half at this size is 0.0067.
    assert torch.allclose(drawn, torch.tensor([0.7, 0.2, 0.1, 0.0]), atol=0.0067)
    assert drawn[3] == 0
    assert int(draw_variants(pairs, 42, 50, (0.0, 0.2, 0.4, 0.4)).min()) == 1


def test_epochs_and_seeds_draw_independently() -> None:
    pairs = torch.arange(100_000)
    even = (0.25, 0.25, 0.25, 0.25)
    base = draw_variants(pairs, 1, 1, even)
    for other in (
        draw_variants(pairs, 1, 2, even),
        draw_variants(pairs, 2, 1, even),
        draw_variants(pairs + 1, 1, 1, even),
    ):
        assert abs(float((base == other).float().mean()) - 0.25) < 0.01
