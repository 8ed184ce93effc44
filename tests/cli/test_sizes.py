"""Sizes on the command line; what they mean is tested in tests/memory/test_sizes.py."""

from __future__ import annotations

import pytest
import typer

from jasper_store.cli.sizes import parse_size


def test_a_size() -> None:
    assert parse_size("8GiB") == 8 << 30


@pytest.mark.parametrize("text", ["", "-1", "9000PiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"expected"):
        parse_size(text)
