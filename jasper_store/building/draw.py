"""Random sources: numbers that are a pure function of seed, pair and attempt, so that the order of work changes nothing.

The mixer is that of :mod:`jasper_store.samples.draw`, in numpy.
"""

from __future__ import annotations

import numpy as np

__all__ = ["numbers"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def numbers(seed: int, pairs: np.ndarray, attempt: int) -> np.ndarray:
    """A number of 64 bits for each pair, uint64 [n].

    Args:
        seed: any whole number.
        pairs: numbers of the pairs [n].
        attempt: how often this pair has drawn before.
    """
    with np.errstate(over="ignore"):
        key = _mixed(np.array([seed % 2**64], np.uint64) + _GOLDEN)
        key = _mixed(key ^ (np.uint64(attempt + 1) * _MIX_2))
        return _mixed(pairs.astype(np.uint64) * _GOLDEN + key)


def _mixed(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    found: np.ndarray = value ^ (value >> np.uint64(31))
    return found
