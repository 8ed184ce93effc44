"""Every compiler that the library claims: it compiles without a warning, and its harness runs, by an emulator if need be.

A compiler that is not installed is named and skipped, with ``--require`` refused. On Debian all are::

    apt-get install gcc clang musl-tools gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.native_harness import ROOT, build_harness, build_library, run_harness

__all__ = ["COMPILERS", "Compiler", "check", "main"]


@dataclass(frozen=True)
class Compiler:
    """A compiler, and how what it builds is run here.

    Attributes:
        command: its name.
        package: the package of Debian that has it.
        flags: what it needs.
        runner: what runs its programs.
    """

    command: str
    package: str
    flags: tuple[str, ...] = ()
    runner: tuple[str, ...] = ()

    @property
    def missing(self) -> str:
        """The first program that is needed and not installed; "" if all are."""
        return next((name for name in (self.command, *self.runner[:1]) if shutil.which(name) is None), "")


def _kernel_headers() -> tuple[str, ...]:
    """Musl has no headers of the kernel; those of the system serve, after its own."""
    machine = "/usr/include/x86_64-linux-gnu"
    return ("-idirafter", "/usr/include", *(("-idirafter", machine) if Path(machine).is_dir() else ()))


COMPILERS: Final = (
    Compiler("gcc", "gcc"),
    Compiler("clang", "clang"),
    Compiler("musl-gcc", "musl-tools", _kernel_headers()),
    Compiler(
        command="aarch64-linux-gnu-gcc",
        package="gcc-aarch64-linux-gnu",
        flags=("-DCHILD_HAS_NO_THREADS=1",),
        runner=("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"),
    ),
)


def check(compiler: Compiler, folder: Path, seconds: float) -> str:
    """Build with a compiler, and run its harness.

    Returns:
        What the harness said.

    Raises:
        CalledProcessError: it did not compile without a warning.
        SystemExit: the harness failed.
    """
    for level in ("-O0", "-O3"):
        build_library(folder / f"{compiler.command}{level}.so", [compiler.command], *compiler.flags, level)
    program = folder / compiler.command
    build_harness(program, [compiler.command], *compiler.flags, "-O3")
    done = run_harness([*compiler.runner, str(program)], seconds)
    if done.returncode:
        sys.exit(f"{compiler.command}: the harness ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def main() -> None:
    """Check every compiler that is installed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3, help="how long each harness goes on")
    parser.add_argument("--require", action="store_true", help="fail if one is not installed")
    given = parser.parse_args()
    skipped = False
    for compiler in COMPILERS:
        if compiler.missing:
            skipped = True
            print(
                f"{compiler.command}: skipped, {compiler.missing} is not installed (apt-get install {compiler.package})"
            )
            continue
        print(f"{compiler.command}: no warning; {check(compiler, ROOT / 'build/compilers', given.seconds)}")
    if skipped and given.require:
        sys.exit("some compilers are not installed")


if __name__ == "__main__":
    main()
