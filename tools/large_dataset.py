"""Fill the table of docs/formats.md: how long a large dataset takes, from the rates of a benchmark's JSON.

Usage: ``python tools/large_dataset.py [docs/bench/measured.json] [docs/formats.md]``
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

_NBYTES = 300e9
_STEPS = (
    ("Convert to safetensors, with the proof", "convert", "source cold", "safetensors"),
    ("Verify", "verify", "", "cold"),
)
_MARKER = re.compile(r"(<!-- large -->\n).*?(<!-- /large -->)", re.DOTALL)


def rate(document: dict[str, Any], case: str, title: str, key: str) -> float | None:
    """Bytes a second of one way in one case; ``None`` where the run did not measure it."""
    for table in document["cases"].get(case, {}).get("tables", ()):
        for row in table["rows"]:
            if title in table["title"] and row.get("key") == key and row.get("bytes_per_s"):
                return float(row["bytes_per_s"])
    return None


def table(document: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = ["| step | measured rate | 300 GB take |", "|---|---:|---:|"]
    for step, case, title, key in _STEPS:
        found = rate(document, case, title, key)
        cells = "not measured | " if found is None else f"{found / 1e9:.2f} GB/s | {_NBYTES / found / 60:.0f} min"
        lines.append(f"| {step} | {cells} |")
    return "\n".join(lines) + "\n"


def main(source: str = "docs/bench/measured.json", page: str = "docs/formats.md") -> None:
    """Write the table into the page."""
    text = table(json.loads(Path(source).read_text(encoding="utf-8")))
    path = Path(page)
    before = path.read_text(encoding="utf-8")
    path.write_text(_MARKER.sub(lambda found: found[1] + text + found[2], before), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
