"""What a sample must be, worked out from the raw tensors one at a time, owing nothing to the code under test."""

from __future__ import annotations

from typing import Any

import torch

MASK = (1 << 64) - 1
VARIANTS = ("none", "centroid", "keyword_weighted", "residual")
STEERING = (None, "steering_centroid", "steering_keyword_weighted", "steering_residual")


def mix(value: int) -> int:
    """The finaliser of SplitMix64."""
    value &= MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def draw(pair: int, seed: int, epoch: int, probs: tuple[float, ...]) -> int:
    """The documented hash of (seed, epoch, pair), in plain integers."""
    key = mix(mix(seed + 0x9E3779B97F4A7C15) ^ mix((epoch + 1) * 0x94D049BB133111EB))
    number = (mix(pair * 0x9E3779B97F4A7C15 + key) >> 32) / 2**32
    below = 0.0
    for variant, probability in enumerate(probs):
        below += probability
        if number < below:
            return variant
    return max(variant for variant, probability in enumerate(probs) if probability > 0)


def default_probabilities(epoch: int) -> tuple[float, ...]:
    """The default curriculum of the design, as a table."""
    table = ((40, (0.0, 0.2, 0.4, 0.4)), (30, (0.1, 0.3, 0.35, 0.25)), (20, (0.3, 0.3, 0.25, 0.15)))
    for first, probs in (*table, (10, (0.5, 0.3, 0.15, 0.05))):
        if epoch >= first:
            return probs
    return (0.7, 0.2, 0.1, 0.0)


def expected_sample(
    tensors: dict[str, Any], split: str, position: int, *, seed: int = 42, epoch: int = 0, forced: int | None = None
) -> dict[str, torch.Tensor]:
    """The sample at a position of a split, by the default curriculum."""
    pair = int(tensors[f"{split}_idx"][position])
    question, source = (int(row) for row in tensors["pair_index"][pair])
    variant = draw(pair, seed, epoch, default_probabilities(epoch)) if forced is None else forced
    name = STEERING[variant]
    first = tensors["steering_centroid"]
    return {
        "question_emb": tensors["question_embs"][question],
        "target_source_emb": tensors["source_embs"][source],
        "steering": torch.zeros(first.shape[1], dtype=first.dtype) if name is None else tensors[name][pair],
        "negative_embs": tensors["source_embs"][tensors["hard_negatives"][pair]],
        "cluster_id": tensors["pair_cluster_id"][pair],
        "relevance": tensors["pair_relevance"][pair],
        "centroid_distance": tensors["centroid_distances"][pair],
        "steering_variant": torch.tensor(variant),
        "negative_tiers": tensors["negative_tiers"][pair],
    }


def expected_batch(tensors: dict[str, Any], split: str, positions: Any, **how: Any) -> dict[str, torch.Tensor]:
    """Samples at these positions, stacked."""
    samples = [expected_sample(tensors, split, int(position), **how) for position in positions]
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Equal keys, dtypes, shapes and bits."""
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].shape == value.shape, key
        assert torch.equal(found[key].cpu(), value), key
