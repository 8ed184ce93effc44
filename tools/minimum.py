"""The oldest allowed release of each dependency, as constraints for pip: what ``make test-min`` installs.

Written from pyproject.toml, so that a lower bound is never kept in two places::

    python tools/minimum.py --torch 2.13.0 > build/minimum.txt
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
EXTRA = "test"
"""What the tests import beyond the dependencies themselves."""

_BOUND = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[[\w,-]+\])?>=(?P<version>[\w.]+)(?P<rest>\s*;.*)?$")


def needed(project: dict[str, Any]) -> list[str]:
    """The dependencies and those of the tests, without the name of the project itself, whose other extras ``test`` asks for."""
    extras, found, todo = project["optional-dependencies"], list(project["dependencies"]), [EXTRA]
    while todo:
        for requirement in extras[todo.pop()]:
            own = re.fullmatch(rf"{project['name']}\[([\w,-]+)\]", requirement)
            if own is not None:
                todo += own[1].split(",")
            else:
                found.append(requirement)
    return found


def minimum(requirements: list[str]) -> list[str]:
    """``name==version`` for each ``name>=version``, with its marker if it has one.

    Raises:
        ValueError: a requirement that names no oldest release.
    """
    pins = []
    for requirement in requirements:
        found = _BOUND.match(requirement.strip())
        if found is None:
            raise ValueError(f"expected name>=version in pyproject.toml, found {requirement!r}")
        pins.append(f"{found['name']}=={found['version']}{found['rest'] or ''}")
    return pins


def read_project(path: Path = PROJECT) -> dict[str, Any]:
    """The table ``[project]``."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # pip is there wherever this runs, and brings a reader
        from pip._vendor import tomli as tomllib
    project: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    return project


def main() -> None:
    """Print the constraints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch", help="this release of torch in the place of the oldest")
    options = parser.parse_args()
    pins = minimum(needed(read_project()))
    if options.torch:
        pins = [f"torch=={options.torch}" if pin.startswith("torch==") else pin for pin in pins]
    print("\n".join(pins))


if __name__ == "__main__":
    main()
