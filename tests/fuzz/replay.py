"""Reads inputs within the fuzzer's limits: ``python -m tests.fuzz.replay TARGET FOLDER`` prints what became of each as JSON."""

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
    name, folder = sys.argv[1:]
    paths = sorted(Path(folder).iterdir())
    faulthandler.register(signal.SIGPROF, chain=True)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + NBYTES, mapped + NBYTES))
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for path in paths:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                found.append("opened" if accepted(TARGETS[name], path.read_bytes(), Path(scratch)) else "refused")
            except BaseException:
                sys.stderr.write(f"{name}, input {path.name}: {path.read_bytes()[:300]!r}\n")
                raise
        signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
