"""Builds the C of ``jasper_store/native`` by any compiler, as a library or with its harness, ``tests/native/harness``.

The harness is a program of threads that gather and read at random while calls of the system fail and children are forked;
``tools/sanitizers.py`` and ``tools/compilers.py`` build and run it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["FLAGS", "HARNESS", "NATIVE", "ROOT", "build_harness", "build_library", "compiler", "run_harness"]

ROOT: Final = Path(__file__).resolve().parent.parent
NATIVE: Final = ROOT / "jasper_store/native"
HARNESS: Final = ROOT / "tests/native/harness"
FLAGS: Final = ("-std=gnu11", "-pthread", "-Wall", "-Wextra", "-Werror")
_WRAPPED: Final = ("syscall", "pthread_create", "malloc", "calloc", "realloc", "free", "mmap", "pread")
"""What faults.c puts itself before."""


def compiler() -> str | None:
    """GCC or what stands for it; ``None`` if there is none."""
    return next((name for name in ("gcc", "cc", "clang") if shutil.which(name)), None)


def build_library(target: Path, command: Sequence[str], *flags: str) -> None:
    """Build the shared library.

    Raises:
        CalledProcessError: it did not compile without a warning.
    """
    sources = [str(path) for path in sorted(NATIVE.glob("*.c"))]
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*command, *FLAGS, "-fPIC", "-shared", *flags, "-o", str(target), *sources], check=True)


def build_harness(target: Path, command: Sequence[str], *flags: str) -> None:
    """Build the harness with the library in it.

    Raises:
        CalledProcessError: it did not compile without a warning.
    """
    sources = [str(path) for folder in (NATIVE, HARNESS) for path in sorted(folder.glob("*.c"))]
    wraps = [f"-Wl,--wrap={name}" for name in _WRAPPED]
    target.parent.mkdir(parents=True, exist_ok=True)
    # Calls that the compiler would replace by its own are wrapped too.
    plain = ("-fno-builtin-malloc", "-fno-builtin-free", "-fno-builtin-calloc", "-fno-builtin-realloc")
    subprocess.run([*command, *FLAGS, *plain, f"-I{NATIVE}", *flags, "-o", str(target), *sources, *wraps], check=True)


def run_harness(
    command: Sequence[str], seconds: float, *, options: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the harness on files in a temporary directory on a disk; what it wrote is in the result.

    Args:
        command: the program, with what runs it before it.
        seconds: how long its threads go on.
        options: of the harness.
        environment: variables to set.
    """
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        return subprocess.run(
            [*command, *options, str(seconds), directory],
            capture_output=True,
            text=True,
            check=False,
            timeout=600 + 4 * seconds,
            env={**os.environ, **(environment or {})},
        )
