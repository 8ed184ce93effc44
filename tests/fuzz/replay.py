"""Reads inputs within the fuzzer's limits: ``python -m tests.fuzz.replay FOLDER`` with a folder of inputs for each target.

Prints a line of JSON for each target, as it goes: its name, and what became of each input.
"""

from __future__ import annotations

import faulthandler
import json
import resource
import signal
import sys
import tempfile
from pathlib import Path

from tests.fuzz.child import NBYTES, SECONDS
from tests.fuzz.targets import TARGETS, accepted


def main() -> None:
    """See the module's text."""
    faulthandler.register(signal.SIGPROF, chain=True)  # ends the process
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + NBYTES, mapped + NBYTES))
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        with tempfile.TemporaryDirectory() as scratch:
            found = [_read(folder.name, path, Path(scratch)) for path in sorted(folder.iterdir())]
        sys.stdout.write(json.dumps([folder.name, found]) + "\n")
        sys.stdout.flush()


def _read(name: str, path: Path, scratch: Path) -> str:
    sys.stderr.write(f"{name}, input {path.name}: {path.read_bytes()[:300]!r}\n")  # the last one is what a crash leaves
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return "opened" if accepted(TARGETS[name], path.read_bytes(), scratch) else "refused"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
