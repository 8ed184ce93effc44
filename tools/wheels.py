"""Wheels for Linux on x86-64 and aarch64, with glibc and with musl, built on one machine.

    python tools/wheels.py            # all of them, into dist/
    python tools/wheels.py manylinux_2_17_x86_64

The compiled library is called through ctypes and knows nothing of Python, so there is one wheel for each platform, and
none for each Python. ``[tool.cibuildwheel]`` in ``pyproject.toml`` builds the same ones in the containers of manylinux. Here zig is
the linker, and the compiler of another machine: it brings the symbols of every release of glibc (``pip install ziglang``). Code for
x86-64 with glibc is compiled by gcc, which makes a version of the gather for each generation of processors.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {
    "manylinux_2_17_x86_64": "x86_64-linux-gnu.2.17",
    "manylinux_2_17_aarch64": "aarch64-linux-gnu.2.17",
    "musllinux_1_1_x86_64": "x86_64-linux-musl",
    "musllinux_1_1_aarch64": "aarch64-linux-musl",
}
"""Tag of each wheel, and what zig calls its platform."""


def compile_and_link(target: str, arguments: list[str]) -> None:
    """Stand in for a C compiler: ``cc -o OUT FLAGS... SOURCES...`` for a platform of zig's."""
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-s"]
    if not target.startswith("x86_64-linux-gnu") or platform.machine() != "x86_64":
        subprocess.run([*zig, *arguments], check=True)
        return
    sources = [each for each in arguments if each.endswith(".c")]
    rest = [each for each in arguments if not each.endswith(".c")]
    output = rest.index("-o")
    flags = [each for each in rest[:output] + rest[output + 2 :] if each != "-shared"]
    # Of gcc's own library: what finds out at run time which processor this is.
    asked = ["gcc", "-print-libgcc-file-name"]
    libgcc = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder, f"{number}.o")) for number in range(len(sources))]
        for source, built in zip(sources, objects, strict=True):
            subprocess.run(["gcc", *flags, "-c", "-o", built, source], check=True)
        link = [*zig, "-shared", "-pthread", *rest[output : output + 2], *objects, libgcc]
        subprocess.run(link, check=True)


def build(tag: str, folder: Path) -> Path:
    """Build the wheel of a platform; its path."""
    compiler = shlex.join([sys.executable, str(Path(__file__).resolve()), "cc", TARGETS[tag]])
    environment = {**os.environ, "CC": compiler, "JASPER_STORE_PLATFORM": tag}
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, env=environment)
    [wheel] = folder.glob(f"*-{tag}.whl")
    return wheel


def main(arguments: list[str]) -> None:
    """Build the wheels that were asked for, or act as a compiler."""
    if arguments[:1] == ["cc"]:
        compile_and_link(arguments[1], arguments[2:])
        return
    unknown = set(arguments) - set(TARGETS)
    if unknown:
        raise SystemExit(f"expected some of {', '.join(TARGETS)}, found {', '.join(sorted(unknown))}")
    for tag in arguments or TARGETS:
        wheel = build(tag, ROOT / "dist")
        print(f"{wheel.name}: {wheel.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
