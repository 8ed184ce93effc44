"""Fuzzes all targets, or some, one after another, and prints the counts of all runs so far.

``python -m tests.fuzz --minutes 10 FOLDER [TARGET...]``. Without atheris, inputs are changed at random only. Ends with status 1 if
anything was found. ``--page docs/reliability.md FOLDER`` writes the counts into the documentation.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

from tests.fuzz import table
from tests.fuzz.records import Counts
from tests.fuzz.targets import TARGETS

_GUIDED = 0.3
"""Share of the time that is guided by coverage."""
_SHORTEST = 2
"""Seconds of a target."""


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("folder", type=Path, help="where corpora, counts and findings are kept, and taken up again")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--minutes", type=float, default=10, help="of processor time, in all")
    parser.add_argument("--page", type=Path, help="write the counts of FOLDER into this page, and fuzz nothing")
    given = parser.parse_args()
    if given.page is not None:
        table.write(given.folder, given.page)
        return
    modes = {"guided": _GUIDED, "bulk": 1 - _GUIDED} if importlib.util.find_spec("atheris") else {"bulk": 1}
    names = sorted(given.targets or TARGETS, key=lambda name: _inputs(name, given.folder))
    for mode, part in modes.items():
        share = max(_SHORTEST, round(60 * given.minutes * part / len(names)))
        subprocess.run(
            [sys.executable, "-m", "tests.fuzz.child", mode, str(share), str(given.folder), *names], check=True
        )
    sys.exit(_report(given.folder))


def _inputs(name: str, folder: Path) -> int:
    """Inputs of a target so far; those that had few come first."""
    counts = Counts(folder / f"{name}.counts")
    return int(counts.traced + counts.untraced)


def _report(folder: Path) -> int:
    """Print a row for each target; 1 if anything was found."""
    found = 0
    for name in TARGETS:
        path = folder / f"{name}.counts"
        if path.exists():
            c = Counts(path)
            inputs = f"{c.traced:12,} guided{c.untraced:12,} bulk{c.opened:12,} opened"
            sys.stdout.write(f"{name:20}{inputs}{c.found:5} found{c.starts:5} starts\n")
            found += c.found
    return int(found > 0)


if __name__ == "__main__":
    main()
