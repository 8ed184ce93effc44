"""No file imports another that imports it, whatever the way round: also for annotations, also inside functions.

import-linter holds the order of the rooms; this holds the files.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import jasper_store

PACKAGE = Path(jasper_store.__file__).parent
# Circles that are being taken apart, each as a set of modules. Must be empty in the end.
KNOWN: frozenset[frozenset[str]] = frozenset()


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                target = name if name in known else node.module
                if target in known:
                    yield target


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Groups of modules that reach one another."""
    reach = {name: set(targets) for name, targets in graph.items()}
    changed = True
    while changed:
        changed = False
        for name, targets in reach.items():
            further = targets.union(*(reach[target] for target in targets))
            changed |= len(further) > len(targets)
            reach[name] = further
    return {
        frozenset({name, *(other for other in targets if name in reach[other])})
        for name, targets in reach.items()
        if name in targets
    }


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}, "e": {"a", "d"}}
    assert circles(graph) == {frozenset("bc"), frozenset("d")}


def test_no_file_imports_itself_through_others():
    known = modules()
    found = circles({name: {*imported(path, known)} - {name} for name, path in known.items()})
    assert found == KNOWN
