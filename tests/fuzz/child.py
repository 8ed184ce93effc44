"""Targets, each in a process that may end at any input; ``__main__`` starts this one.

``python -m tests.fuzz.child MODE SECONDS FOLDER TARGET...``. ``MODE`` is ``guided``: atheris changes inputs and keeps those that
reach new code in the corpus; or ``bulk``: inputs of the corpus are changed at random, many times as fast since nothing is
traced. ``SECONDS`` of processor time go to each target.

The parsers are imported once, which takes longer than thousands of inputs; each target then is a fork, and another one where an
input ended it. What the parent has to know is in a shared file: the counts, and the input that is being read, which is all
that is left after a crash. No alarm of the clock is set, since a machine that stands still for a while makes no input slow:
the process's own work is limited.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.fuzz.mutate import changed
from tests.fuzz.records import Counts, keep

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 10
NBYTES = 1 << 30
GROWTH_NBYTES = 512 << 20
_FUZZERS_NBYTES = 512 << 20
"""What atheris may take for itself."""
_SHM = Path("/dev/shm")
_TRACED = ["jasper_store.formats", "jasper_store.store.manifest", "jasper_store.samples", "jasper_store.jasper.config"]


def main() -> None:
    """See the module's text."""
    mode, seconds, where, *names = sys.argv[1:]
    kept = Path(where)
    kept.mkdir(parents=True, exist_ok=True)
    targets = _import(mode)
    for name in names:
        ended, left = False, float(seconds)
        while not ended and left > 0:
            before = _children_seconds()
            # In memory where there is such a file system. libFuzzer ends its process without cleaning up.
            with tempfile.TemporaryDirectory(dir=_SHM if _SHM.is_dir() else None, prefix="jasper-fuzz-") as scratch:
                ended = _forked(targets[name], name, mode, left, kept, Path(scratch))
            left -= _children_seconds() - before


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _import(mode: str) -> Any:
    """The targets. Where they are guided, atheris has to see how the parsers are imported."""
    if mode != "guided":
        return importlib.import_module("tests.fuzz.targets").TARGETS
    import atheris

    with atheris.instrument_imports(include=_TRACED):
        return importlib.import_module("tests.fuzz.targets").TARGETS


def _forked(target: Any, name: str, mode: str, seconds: float, kept: Path, scratch: Path) -> bool:
    """Fuzz one target in a fork; what ended it is kept. Whether it ended by itself."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            with (kept / f"{name}.log").open("ab") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            counts = Counts(kept / f"{name}.counts")
            counts.starts += 1
            run = _guided if mode == "guided" else _bulk
            run(target, name, seconds, kept, counts, scratch)
            status = 0
        except SystemExit as exc:  # atheris ends so
            status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        except BaseException:  # noqa: BLE001 - whatever it is, the parent hears of it
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)  # destructors of a damaged library's objects do not run
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    counts = Counts(kept / f"{name}.counts")
    if not status:
        counts.end()
        return True
    if not counts.current():
        log_text = (kept / f"{name}.log").read_text(errors="replace")
        raise RuntimeError(f"the process for {name!r} could not start: {log_text[-2000:]}")
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    counts.found += keep(kept / "found" / name, counts.current(), how, f"see {name}.log\n")
    counts.end()
    return False


def _reader(target: Any, name: str, kept: Path, counts: Counts, scratch: Path) -> Callable[[bytes], None]:
    """Reads one input within limits, and writes it down if it shows a defect."""
    accepted = importlib.import_module("tests.fuzz.targets").accepted
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)  # ends the process
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = mapped + _FUZZERS_NBYTES + NBYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    def one(data: bytes) -> None:
        nonlocal peak
        counts.begin(data)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        kind = why = ""
        try:
            counts.opened += accepted(target, data, scratch)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is written down
            last = traceback.extract_tb(exc.__traceback__)[-1]
            kind, why = f"{type(exc).__name__} {last.filename.rpartition('/')[2]}:{last.lineno}", traceback.format_exc()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - peak
        peak += max(grown, 0)
        if grown > GROWTH_NBYTES:
            kind, why = "memory", f"it grew by {grown} bytes\n{why}"
        if kind:
            counts.found += keep(kept / "found" / name, data, kind, why)

    return one


def _guided(target: Any, name: str, seconds: float, kept: Path, counts: Counts, scratch: Path) -> None:
    import atheris

    counts.guided = True
    corpus, sound = kept / "corpus" / name, kept / "seeds" / name
    for folder in (corpus, sound):
        folder.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(target.seeds()):
        (sound / str(i)).write_bytes(seed)
    tokens = kept / "seeds" / f"{name}.dict"
    tokens.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in token) + '"\n' for token in target.tokens))
    # libFuzzer's own limits are off: the time of one input is that of the clock, and the memory that of the process.
    limits = [
        "-timeout=100000",
        "-report_slow_units=100000",
        "-rss_limit_mb=0",
        "-malloc_limit_mb=0",
        "-detect_leaks=0",
    ]
    options = [f"-max_len={target.most}", "-reload=0", f"-artifact_prefix={kept}/"]
    options += [f"-dict={tokens}"] if target.tokens else []  # libFuzzer refuses an empty one
    one = _reader(target, name, kept, counts, scratch)
    end = time.process_time() + seconds

    def one_in_time(data: bytes) -> None:
        one(data)
        if time.process_time() > end:  # libFuzzer only knows the clock's time; what it found it has written
            os._exit(0)

    atheris.Setup([sys.argv[0], *limits, *options, str(corpus), str(sound)], one_in_time)
    atheris.Fuzz()


def _bulk(target: Any, name: str, seconds: float, kept: Path, counts: Counts, scratch: Path) -> None:
    counts.guided = False
    corpus = kept / "corpus" / name
    inputs = [*target.seeds(), *(path.read_bytes() for path in (corpus.iterdir() if corpus.is_dir() else ()))]
    one = _reader(target, name, kept, counts, scratch)
    rng = random.Random(counts.starts)
    end = time.process_time() + seconds
    while time.process_time() < end:
        for _ in range(64):
            one(changed(rng.choice(inputs), rng, target.tokens, inputs)[: target.most])


if __name__ == "__main__":
    main()
