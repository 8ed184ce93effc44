"""Sizes as people write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from jasper_store.errors import IncompatibleOptionsError
from jasper_store.memory.sizes import nbytes_of, parse_size

BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "p": 2**50}


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("123", 123),
        ("123b", 123),
        ("8GiB", 8 << 30),
        ("8 GiB", 8 << 30),
        ("8G", 8 << 30),
        ("8gb", 8 * 10**9),
        ("1.5k", 1536),
        ("1.5kB", 1500),
        (" 2 TiB ", 2 << 40),
        ("0.1KiB", 102),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_known_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@given(st.integers(0, 2**63 - 1))
def test_plain_numbers_are_bytes(nbytes: int) -> None:
    assert parse_size(str(nbytes)) == nbytes


@given(st.integers(0, 1000), st.sampled_from(sorted(BINARY)), st.sampled_from(["", "ib"]), st.booleans())
def test_binary_units_are_exact(number: int, unit: str, kind: str, upper: bool) -> None:
    text = f"{number}{unit}{kind if unit else ''}"
    assert parse_size(text.upper() if upper else text) == number * BINARY[unit]


@given(st.integers(0, 10**6), st.integers(0, 999), st.sampled_from("kmg"))
def test_decimals_lose_nothing_but_the_part_of_a_byte(whole: int, thousandths: int, unit: str) -> None:
    nbytes = parse_size(f"{whole}.{thousandths:03}{unit}b")
    assert nbytes == (whole * 1000 + thousandths) * 1000 ** " kmg".index(unit) // 1000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "-1",
        "-1GiB",
        "1e9",
        "nan",
        "inf",
        "8 GiBs",
        "8Gib8",
        "1,5G",
        "0x10",
        "٣",
        "9223372036854775808",
        "9000PiB",
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected"):
        parse_size(text)


@given(st.text())
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    try:
        assert 0 <= parse_size(text) < 2**63
    except ValueError as exc:
        assert "expected" in str(exc)  # noqa: PT017 (either outcome is right)


def test_an_option_is_bytes_or_a_text() -> None:
    assert nbytes_of(5, "budget") == 5
    assert nbytes_of("5 kB", "budget") == 5000


@pytest.mark.parametrize("value", [-1, 1.5, True, None, b"8", 2**63, "", "-1", "8 elephants"])
def test_an_option_that_is_neither_names_itself(value: Any) -> None:
    with pytest.raises(IncompatibleOptionsError, match=r"budget=.*expected .*8GiB"):
        nbytes_of(value, "budget")
