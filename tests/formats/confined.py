"""Opens files in forked children with limits of time and memory, so that a crash or a hang is seen and survived.

``python -m tests.formats.confined SECONDS NBYTES FORMAT FILE...`` prints one JSON object per file: what became of it
(``"refused"``, ``"opened"``, ``"raised <error>"`` or ``"signal <number>"``), why, and by how many bytes the child grew.
A child is a copy of this process, which has imported everything already: a fork takes milliseconds, an interpreter
seconds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from tests.formats import damage

if TYPE_CHECKING:
    from collections.abc import Iterable

CHILD_TIMEOUT = 240
# Each line costs several times as much where coverage is measured.
_SLOWER = 5 if any(name.startswith("COVERAGE_PROCESS") for name in os.environ) else 1


class Outcome(NamedTuple):
    """What became of one file.

    Attributes:
        what: ``"refused"``, ``"opened"``, ``"raised <error>"`` or ``"signal <number>"``; 27 is the time limit.
        why: text of the error.
        grown: bytes by which the child's resident memory grew, at most.
    """

    what: str
    why: str
    grown: int


def open_confined(name: str, paths: Iterable[Path], *, seconds: int, nbytes: int) -> dict[str, Outcome]:
    """Open and read each file in a child of its own, and return the outcomes by the files' stems."""
    paths = list(paths)
    done = subprocess.run(
        [sys.executable, "-m", "tests.formats.confined", str(seconds), str(nbytes), name, *map(str, paths)],
        check=False,
        capture_output=True,
        text=True,
        timeout=CHILD_TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [Outcome(*json.loads(line)) for line in done.stdout.splitlines()]
    return {path.stem: outcome for path, outcome in zip(paths, found, strict=True)}


def confine(seconds: int, nbytes: int) -> None:
    """Limit this process: a signal ends it after ``seconds`` of work, and it may map ``nbytes`` more than it has now."""
    import resource

    seconds *= _SLOWER
    # Of its own work, which other processes on this machine do not make longer; and of the clock, should it wait.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(20 * seconds)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + nbytes, mapped + nbytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def resident(field: str) -> int:
    """Bytes of this process's memory: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _child(name: str, path: Path, seconds: int, nbytes: int, pipe: int) -> NoReturn:
    before = resident("VmRSS")
    confine(seconds, nbytes)
    try:
        error = damage.error_of(name, path)
        what, why = ("refused", str(error)) if error else ("opened", "")
    except BaseException as exc:  # noqa: BLE001 - whatever it is, the parent hears of it
        what, why = f"raised {type(exc).__name__}", "".join(traceback.format_exception(exc))[-2000:]
    os.write(pipe, json.dumps([what, why[-2000:], resident("VmHWM") - before]).encode())
    # No destructor of a damaged library's objects runs after this.
    os._exit(0)


def _run(name: str, path: Path, seconds: int, nbytes: int) -> list[Any]:
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        _child(name, path, seconds, nbytes, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return [f"signal {os.WTERMSIG(status)}", "", 0]
    found: list[Any] = json.loads(said)
    return found


def main() -> None:
    """See the module's text."""
    seconds, nbytes, name, *paths = sys.argv[1:]
    for path in paths:
        sys.stdout.write(json.dumps(_run(name, Path(path), int(seconds), int(nbytes))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
