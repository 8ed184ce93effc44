"""Where products of bytes are used: on processors that make them in less time, if torch's are exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from jasper_store.building import quantized
from jasper_store.building.quantized import Quantized, product, quantize, quantizes


@pytest.fixture(autouse=True)
def asked_again() -> Iterator[None]:
    quantized._multiplies_exactly.cache_clear()
    yield
    quantized._multiplies_exactly.cache_clear()


def exact(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(left.double() @ right.double())


def saturated(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """As a processor does that multiplies bytes without a sign by others with one, and adds up two products in 16 bits."""
    wide = right.double()
    pairs = (left.double() + 128).unflatten(1, (-1, 2))[..., None] * wide.unflatten(0, (-1, 2))[None]
    out.copy_(pairs.sum(dim=2).clamp(-(1 << 15), (1 << 15) - 1).sum(dim=1) - 128 * wide.sum(dim=0))


def missing(*_: Any, **__: Any) -> None:
    raise RuntimeError("not implemented for 'CPU'")


@pytest.mark.parametrize(("found", "wanted"), [(exact, True), (saturated, False), (missing, False)])
def test_products_are_compared_before_they_are_used(found: Any, wanted: bool) -> None:
    with (
        mock.patch.object(quantized, "multiplies_bytes", return_value=True),
        mock.patch.object(torch, "_int_mm", found),
    ):
        assert quantizes(64) is wanted
        assert not quantizes(63)


def test_other_processors_make_products_of_floats() -> None:
    with (
        mock.patch.object(quantized, "multiplies_bytes", return_value=False),
        mock.patch.object(torch, "_int_mm", side_effect=AssertionError),
    ):
        assert not quantizes(384)


@pytest.mark.parametrize("dim", [64, 65, 384, 1000])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 700), (700, 1), (1100, 33)])
def test_products_of_this_processor(n: int, m: int, dim: int) -> None:
    if not quantizes(dim):
        pytest.skip("this processor makes no products of bytes, or not in less time")
    torch.manual_seed(n + m + dim)
    left, right = (quantize(torch.nn.functional.normalize(torch.randn(rows, dim), dim=1)) for rows in (n, m))
    out = torch.empty(n, m, dtype=torch.int32)
    product(left, right, out)
    assert torch.equal(out.double(), left.numbers.double() @ right.numbers.double().T)
    part: Quantized = left.part(slice(n // 2, n))
    product(part, right, out[n // 2 :])
    assert torch.equal(out[n // 2 :].double(), part.numbers.double() @ right.numbers.double().T)
