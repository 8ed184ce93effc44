"""The compiled library under the sanitizers of GCC: its harness, and the tests in Python with the runtime loaded before.

::

    python -m tools.sanitizers address    # or: undefined, thread

First a defect of the sanitizer's kind is planted, which it has to find: a run that finds nothing then means something.
Everything is built below ``build/``; the library of the checkout stays as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tools.native_harness import ROOT, build_harness, build_library, compiler, run_harness

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["SANITIZERS", "Sanitizer", "main"]

_TESTS: Final = ("tests/native", "tests/paging", "tests/store", "tests/loading")
_BUILD: Final = ROOT / "build"


@dataclass(frozen=True)
class Sanitizer:
    """One sanitizer, and how Python runs under it.

    Attributes:
        name: as ``-fsanitize=`` knows it.
        runtime: library that is loaded before all others.
        plant: macro of the harness that plants a defect of its kind.
        report: what it writes when it finds that defect.
        variable: environment variable that its options are in.
        options: for the harness.
        python_options: for Python, on top of them.
        launcher: what starts a program under it.
        plugins: of pytest.
        left_out: tests that cannot pass under it, and why.
    """

    name: str
    runtime: str
    plant: str
    report: str
    variable: str
    options: str
    python_options: str = ""
    launcher: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags of the compiler; the loops are those of a release, so that they are what is tested."""
        return (f"-fsanitize={self.name}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O2")

    @property
    def folder(self) -> Path:
        """Where it is built."""
        return _BUILD / f"sanitize-{self.name}"


SANITIZERS: Final = {
    each.name: each
    for each in (
        Sanitizer(
            name="address",
            runtime="libasan.so",
            plant="PLANT_OVERFLOW",
            report="heap-buffer-overflow",
            variable="ASAN_OPTIONS",
            options="detect_leaks=1:detect_stack_use_after_return=1",
            # Python and PyTorch keep much until the end of the process; the leaks of the library are for the harness. SIGBUS
            # goes to the handlers that the library passes it on to, not to the sanitizer's.
            python_options="detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=32:handle_sigbus=0",
            left_out=(
                (
                    "tests/loading/test_worker_memory.py::test_private_memory_of_workers_stays_flat",
                    "what was freed stays in its quarantine for a while, as private memory",
                ),
            ),
        ),
        Sanitizer(
            name="undefined",
            runtime="libubsan.so",
            plant="PLANT_UB",
            report="signed integer overflow",
            variable="UBSAN_OPTIONS",
            options="print_stacktrace=1",
        ),
        Sanitizer(
            name="thread",
            runtime="libtsan.so",
            plant="PLANT_RACE",
            report="data race",
            variable="TSAN_OPTIONS",
            # Children of several threads start threads: without this the sanitizer ends them.
            options="die_after_fork=0:halt_on_error=1",
            # Only the library is compiled with it: what others do to memory is seen in part, and is not ours.
            python_options="ignore_noninstrumented_modules=1:report_signal_unsafe=0:report_bugs=1:handle_sigbus=0",
            # Its shadow memory has fixed addresses, which a randomised layout may occupy.
            launcher=("setarch", os.uname().machine, "--addr-no-randomize"),
            plugins=("tools.no_forks",),
            left_out=(
                ("tests/loading/test_soak.py", "its process forks workers; see tools/no_forks.py"),
                ("tests/loading/test_worker_memory.py", "its process forks workers; see tools/no_forks.py"),
                (
                    "tests/store/test_refusals.py::test_a_header_for_which_there_is_no_memory",
                    "its shadow memory is address space, too, of which the test leaves little",
                ),
            ),
        ),
    )
}


def check_harness(sanitizer: Sanitizer, command: str, seconds: float) -> None:
    """Build the harness and run it, first with a planted defect.

    Raises:
        SystemExit: the planted defect was not found, or another one was.
    """
    planted, sound = sanitizer.folder / "planted", sanitizer.folder / "harness"
    build_harness(planted, [command], *sanitizer.flags, f"-D{sanitizer.plant}=1")
    build_harness(sound, [command], *sanitizer.flags)
    environment = {sanitizer.variable: sanitizer.options}
    done = run_harness([*sanitizer.launcher, str(planted)], seconds, environment=environment)
    if not done.returncode or sanitizer.report not in done.stderr:
        sys.exit(f"{sanitizer.name}: the planted defect was not found (status {done.returncode}):\n{done.stderr}")
    print(f"{sanitizer.name}: the planted defect is found ({sanitizer.report})")
    done = run_harness([*sanitizer.launcher, str(sound)], seconds, environment=environment)
    if done.returncode:
        sys.exit(f"{sanitizer.name}: the harness ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    print(f"{sanitizer.name}: {done.stdout.strip()}")


def copy_of_package(sanitizer: Sanitizer, command: str) -> Path:
    """A copy of the package and its tests whose compiled library has the sanitizer."""
    tree = sanitizer.folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    hidden = shutil.ignore_patterns("__pycache__", "sample", "_rows*.so")
    shutil.copytree(ROOT / "jasper_store", tree / "jasper_store", ignore=hidden)
    for name in ("jasper_store/sample", "docs"):
        (tree / name).symlink_to(ROOT / name)
    for name in ("tests", "tools"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    build_library(tree / "jasper_store/native/_rows.so", [command], *sanitizer.flags)
    return tree


def _path_of(command: str, library: str) -> str:
    return subprocess.run(
        [command, f"-print-file-name={library}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def check_python(sanitizer: Sanitizer, command: str, arguments: Sequence[str]) -> None:
    """Run tests in Python, all of whose processes load the runtime first.

    Raises:
        SystemExit: a test failed, or the sanitizer reported something in one of the processes.
    """
    tree, reports = copy_of_package(sanitizer, command), sanitizer.folder / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    # The runtime wants to know __cxa_throw when it starts, which Python loads with PyTorch only.
    preloaded = f"{_path_of(command, sanitizer.runtime)} {_path_of(command, 'libstdc++.so.6')}"
    options = ":".join(filter(None, (sanitizer.options, sanitizer.python_options, f"log_path={reports}/report")))
    environment = {
        **os.environ,
        sanitizer.variable: options,
        "LD_PRELOAD": preloaded,
        "PYTHONPATH": str(tree),
        "PYTHONMALLOC": "malloc",  # so that the runtime knows the bounds of Python's own memory, too
    }
    for test, reason in sanitizer.left_out:
        print(f"{sanitizer.name}: left out: {test}: {reason}")
    skipped = [f"--deselect={test}" for test, _ in sanitizer.left_out]
    # It builds and runs the harness, which was done before, with the sanitizer in it.
    skipped.append("--ignore=tests/native/test_harness.py")
    plugins = [f"-p{plugin}" for plugin in ("no:cacheprovider", *sanitizer.plugins)]
    program = [*sanitizer.launcher, sys.executable, "-m", "pytest", *plugins, "--timeout=0", *skipped]
    done = subprocess.run([*program, *(arguments or _TESTS)], cwd=tree, env=environment, check=False)
    found = sorted(reports.iterdir())
    for report in found:
        print(report.read_text(errors="replace"))
    if done.returncode or found:
        sys.exit(f"{sanitizer.name}: pytest ended with status {done.returncode}, {len(found)} reports")


def main() -> None:
    """Check one sanitizer."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="After -- stand tests, and arguments of pytest."
    )
    parser.add_argument("sanitizer", choices=SANITIZERS)
    parser.add_argument("--seconds", type=float, default=20, help="how long the harness goes on")
    parser.add_argument("--only", choices=("harness", "python"), help="one of the two")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, arguments = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    sanitizer, command = SANITIZERS[given.sanitizer], compiler()
    if command is None:
        sys.exit("there is no C compiler here: install gcc")
    if given.only != "python":
        check_harness(sanitizer, command, given.seconds)
    if given.only != "harness":
        check_python(sanitizer, command, arguments)


if __name__ == "__main__":
    main()
