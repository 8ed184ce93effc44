"""What a run writes: a JSON document of cases, each with tables and targets, that can be redrawn and checked later."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tools.bench.stats import ratio

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["SCHEMA", "CaseResult", "Column", "Kind", "Table", "Target", "check", "joined", "load", "save", "target"]

SCHEMA = 1

Kind: TypeAlias = Literal["text", "int", "rate", "ratio", "share", "bytes", "bytes_per_s", "s", "ms", "us", "percent"]
KINDS: tuple[Kind, ...] = ("text", "int", "rate", "ratio", "share", "bytes", "bytes_per_s", "s", "ms", "us", "percent")
TARGET_KEYS = {"what", "against", "ratio", "target", "met", "at_most"}
STATUSES = ("measured", "skipped", "failed")


@dataclass(frozen=True)
class Column:
    """One column of a table: the key of the row's dictionary, the heading, and how a value is written."""

    key: str
    head: str
    kind: Kind = "text"


@dataclass(frozen=True)
class Table:
    """Measured rows as plain dictionaries; ``columns`` say which of their keys are shown and how.

    Rows may hold more than is shown (all repeats, checks, counters): it stays in the JSON.
    """

    title: str
    columns: tuple[Column, ...]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """A promise and what this run says of it. ``ratio`` and ``met`` are None where it could not be measured."""

    what: str
    against: str
    ratio: float | None
    target: float
    met: bool | None
    at_most: bool = False


@dataclass
class CaseResult:
    """Everything that one case found out; ``foreign`` is the processors' share of other programs."""

    name: str
    title: str
    status: Literal["measured", "skipped", "failed"] = "measured"
    why: str = ""
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    foreign: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; numbers that JSON cannot hold (NaN, infinity) become null."""
        return plain(asdict(self))  # type: ignore[no-any-return]


def target(
    what: str, against: str, value: float | None, base: float | None, wanted: float, *, at_most: bool = False
) -> Target:
    """A target judged: ``value`` is to be at least (or ``at_most``) ``wanted`` times ``base``."""
    found = ratio(value, base)
    met = None if found is None else (found <= wanted if at_most else found >= wanted)
    return Target(what, against, found, wanted, met, at_most)


def plain(value: Any) -> Any:
    """The same data with only what JSON knows."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def check(document: Any) -> list[str]:
    """Everything that is wrong with a document, in words; an empty list if it can be rendered."""
    if not isinstance(document, dict):
        return [f"expected an object, found {type(document).__name__}"]
    problems = [
        f"the key {key!r} is missing" for key in ("schema", "machine", "settings", "cases") if key not in document
    ]
    if document.get("schema") != SCHEMA:
        problems.append(f"schema is {document.get('schema')!r}, this program reads {SCHEMA}; run the benchmark again")
    cases = document.get("cases")
    if not isinstance(cases, dict):
        return [*problems, "cases is not an object"]
    for name, case in cases.items():
        problems += [f"{name}: {problem}" for problem in _check_case(case)]
    return problems


def _check_case(case: Any) -> list[str]:
    if not isinstance(case, dict):
        return ["is not an object"]
    problems = [f"{key} is missing" for key in ("title", "status", "tables", "targets", "notes") if key not in case]
    if case.get("status") not in STATUSES:
        problems.append(f"status {case.get('status')!r} is none of {', '.join(STATUSES)}")
    if case.get("status") != "measured" and not case.get("why"):
        problems.append("says neither figures nor why there are none")
    for table in case.get("tables", ()):
        odd = [column for column in table.get("columns", ()) if column.get("kind") not in KINDS]
        problems += [f"column {column.get('key')!r} has the unknown kind {column.get('kind')!r}" for column in odd]
        if not all(isinstance(row, dict) for row in table.get("rows", ())):
            problems.append(f"table {table.get('title')!r} has a row that is not an object")
    cut = [item for item in case.get("targets", ()) if not set(item) >= TARGET_KEYS]
    return problems + [f"target {item.get('what')!r} is incomplete" for item in cut]


def save(document: dict[str, Any], path: Path) -> None:
    """Write the document whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(plain(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def joined(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first document with the cases of the others, each of which names its machine itself."""
    first, *others = documents
    cases = dict(first["cases"])
    for other in others:
        cases |= other["cases"]
    return first | {"cases": cases}


def load(path: Path) -> dict[str, Any]:
    """Read a document back.

    Raises:
        ValueError: it is not one, with everything that is wrong with it.
    """
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    problems = check(document)
    if problems:
        raise ValueError(f"{path.name} is not a result of this benchmark: " + "; ".join(problems))
    return document
