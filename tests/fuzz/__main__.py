"""Fuzzes all targets, or some, one after another, and prints the counts of all runs so far.

``python -m tests.fuzz --minutes 10 FOLDER [TARGET...]``. Without atheris, inputs are changed at random only. Ends with status 1 if
anything was found.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.fuzz.records import Counts, keep
from tests.fuzz.targets import TARGETS

_SHORTEST = 10
"""Seconds for one process, whose start takes some."""


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("folder", type=Path, help="where corpora, counts and findings are kept, and taken up again")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--minutes", type=float, default=10, help="in all")
    given = parser.parse_args()
    modes = ["guided", "bulk"] if importlib.util.find_spec("atheris") else ["bulk"]
    names = sorted(given.targets or TARGETS, key=lambda name: _inputs(name, given.folder))
    todo = [(name, mode) for name in names for mode in modes]
    end = time.monotonic() + 60 * given.minutes
    share = max(_SHORTEST, int(60 * given.minutes / len(todo)))
    for name, mode in todo:
        while (left := end - time.monotonic()) > 1:
            if _run(name, mode, int(min(share, left)), given.folder):
                break
    sys.exit(_report(given.folder))


def _inputs(name: str, folder: Path) -> int:
    """Inputs of a target so far; those that had few come first."""
    counts = Counts(folder / f"{name}.counts")
    return int(counts.traced + counts.untraced)


def _run(name: str, mode: str, seconds: int, folder: Path) -> bool:
    """Fuzz one target for a while; what ended the process is kept. Whether it ended by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    with log.open("ab") as output:
        command = [sys.executable, "-m", "tests.fuzz.child", name, mode, str(seconds), str(folder)]
        status = subprocess.run(command, check=False, stdout=output, stderr=output).returncode
    if not status:
        return True
    counts = Counts(folder / f"{name}.counts")
    if not counts.current():
        raise RuntimeError(f"the process for {name!r} could not start: {log.read_text(errors='replace')[-2000:]}")
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    counts.found += keep(folder / "found" / name, counts.current(), how, f"see {name}.log\n")
    counts.end()
    return False


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
