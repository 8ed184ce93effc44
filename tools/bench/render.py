"""From the JSON to Markdown: every figure of the documentation is written here and nowhere else.

A Markdown file holds markers, and what lies between them is replaced::

    <!-- bench:cold -->       all tables, targets and notes of a case
    <!-- bench:targets -->    every target of the run
    <!-- bench:headline -->   the readers' rates side by side, for the README
    <!-- bench:machine -->    what it was measured on
    <!-- bench:plot:cold -->  a plot, drawn beside the file
    <!-- /bench -->
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tools.bench import plot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["section", "table", "update", "written"]

MARKER = re.compile(r"(<!-- bench:(?P<what>[\w:-]+) -->\n)(?P<body>.*?)(<!-- /bench -->)", re.DOTALL)
ABSENT = "\u2013"  # en dash
THIN = "\u202f"  # narrow no-break space


def update(path: Path, document: dict[str, Any], *, write: bool = True) -> bool:
    """Fill the markers of a file; whether it changed (or would)."""
    before = path.read_text(encoding="utf-8")

    def replace(match: re.Match[str]) -> str:
        body = section(match["what"], document, path, draw=write)
        return f"{match[1]}{body}\n{match[4]}" if body else match[0]

    after = MARKER.sub(replace, before)
    if write and after != before:
        path.write_text(after, encoding="utf-8")
    return after != before


def section(what: str, document: dict[str, Any], path: Path, *, draw: bool = True) -> str:
    """What belongs between the markers of this name; empty if the document does not hold it (the text stays).

    Raises:
        ValueError: there is no such marker.
    """
    cases = document["cases"]
    if what == "machine":
        return _machine(document)
    if what == "targets":
        return _targets([item for case in cases.values() for item in case["targets"]])
    if what == "headline":
        return _headline(cases)
    if what.startswith("plot:"):
        return _plot(what.removeprefix("plot:"), document, path, draw=draw)
    if not re.fullmatch(r"[a-z]+", what):
        raise ValueError(f"{path.name}: the marker bench:{what} means nothing to this program")
    return _case(cases[what]) if what in cases else ""


def _case(case: dict[str, Any]) -> str:
    if case["status"] != "measured":
        return f"*{case['status']}: {case['why']}*"
    parts = [f"**{item['title']}**\n\n{table(item)}" for item in case["tables"] if item["rows"]]
    if case["targets"]:
        parts.append(_targets(case["targets"]))
    parts += [f"{note}" for note in case["notes"]]
    return "\n\n".join(parts) + "\n"


def table(item: dict[str, Any]) -> str:
    """A Markdown table; a row with nothing but a reason shows the reason."""
    columns = item["columns"]
    lines = [_line([column["head"] for column in columns])]
    lines.append(_line(["---" if column["kind"] == "text" else "---:" for column in columns]))
    for row in item["rows"]:
        cells = [written(row.get(column["key"]), column["kind"]) for column in columns]
        if row.get("why"):
            empty = next((place for place, cell in enumerate(cells) if cell == ABSENT), len(cells) - 1)
            cells[empty] = f"*{row['why']}*"
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def written(value: Any, kind: str) -> str:
    """One value as people read it."""
    if value is None:
        return ABSENT
    writers: dict[str, Callable[[Any], str]] = {
        "text": str,
        "int": lambda v: f"{int(v):,}".replace(",", THIN),
        "rate": lambda v: f"{round(v):,}".replace(",", THIN) if v >= 100 else f"{v:.1f}",
        "ratio": lambda v: f"{v:.2f}" if abs(v) < 100 else f"{v:.0f}",
        "share": lambda v: f"{v:.4f}",
        "percent": lambda v: f"{v:.0%}",
        "bytes": _bytes,
        "bytes_per_s": lambda v: f"{_bytes(v)}/s",
        "s": lambda v: f"{v:.2f} s",
        "ms": lambda v: f"{v:.2f} ms",
        "us": lambda v: f"{v:.2f} µs",
    }
    return writers[kind](value)


def _bytes(value: float) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= factor:
            return f"{value / factor:.2f} {unit}" if value < 100 * factor else f"{value / factor:.0f} {unit}"
    return f"{value:.0f} B"


def _targets(targets: list[dict[str, Any]]) -> str:
    lines = ["| case | against | ratio | target | |", "| --- | --- | ---: | ---: | --- |"]
    for item in targets:
        sign = "≤" if item["at_most"] else "≥"
        verdict = {True: "met", False: "**missed**", None: "not measured"}[item["met"]]
        found = written(item["ratio"], "ratio")
        lines.append(_line([item["what"], item["against"], found, f"{sign} {item['target']:g}", verdict]))
    return "\n".join(lines)


def _headline(cases: dict[str, Any]) -> str:
    """Cold rates of everybody at the smallest batch and both read-ahead settings, warm ones at the same batch beside them."""
    if "cold" not in cases or cases["cold"]["status"] != "measured":
        return ""
    cold = [row for item in cases["cold"]["tables"] for row in item["rows"] if row.get("rows_per_s") and "key" in row]
    batch = min(row["batch"] for row in cold)
    warm = {
        row["key"]: row["rows_per_s"]
        for item in cases.get("warm", {}).get("tables", ())
        for row in item["rows"]
        if "key" in row and row.get("rows_per_s") and row["batch"] == batch
    }
    settings = sorted({row["read_ahead_kib"] for row in cold}, reverse=True)
    heads = ["reader", *(f"cold, read-ahead {kib} KiB" for kib in settings), "warm"]
    lines = [_line(heads), _line(["---", *["---:"] * (len(settings) + 1)])]
    for key in dict.fromkeys(row["key"] for row in cold):
        mine = {row["read_ahead_kib"]: row for row in cold if row["key"] == key and row["batch"] == batch}
        rates = [written(mine[kib]["rows_per_s"] if kib in mine else None, "rate") for kib in settings]
        label = next(iter(mine.values()))["label"] if mine else key
        lines.append(_line([label, *rates, written(warm.get(key), "rate")]))
    return "\n".join(lines) + f"\n\nRows a second, batches of {batch} random rows."


def _machine(document: dict[str, Any]) -> str:
    facts = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    text = (
        f"{facts['system']}, {facts['processor']}, {facts['cores']} cores, {_bytes(facts['memory'])} of memory; "
        f"{facts['file_system']} on {facts['disk'] or 'no disk of its own'}, read-ahead "
        f"{facts['read_ahead_kib'] or 'unknown'} KiB; Python {facts['python']}; {versions}. "
        f"Measured {document['measured'][:10]}, load average before: {facts['load_before']:.2f}."
    )
    if document.get("quick"):
        text += " **A quick run over small data: it shows that the harness works, and no speed.**"
    return text


def _plot(name: str, document: dict[str, Any], path: Path, *, draw: bool) -> str:
    # Plots lie with the documentation, whichever page shows them.
    folder = path.parent / "docs" if (path.parent / "docs").is_dir() else path.parent
    drawn = plot.draw(name, document, folder, write=draw)
    return f"![{drawn.title}]({(folder / drawn.path).relative_to(path.parent).as_posix()})" if drawn else ""
