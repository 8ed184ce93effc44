"""Builds the C of ``jasper_store/native`` with the package, where there is a C compiler.

The library needs neither Python's headers nor torch's, so one wheel serves every Python version of a platform. Without
a compiler the package is built all the same, for any platform, and gathers by torch alone. The environment decides what a
wheel is for: ``CC`` is the compiler, with its arguments, and ``JASPER_STORE_PLATFORM`` the wheel's tag, such as
``manylinux_2_28_aarch64``, if the compiler makes code for another machine or system than this one (``tools/wheels.py``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NAMES = (
    *("rows.c", "parts.c", "reads.c", "helpers.c", "map_faults.c", "shuffle.c", "stats.c"),
    *("topk.c", "processor.c", "ways.c"),
)
SOURCES = tuple(Path("jasper_store/native", name) for name in NAMES)
TARGET = Path("jasper_store/native/_rows.so")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra")


class RowsBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles into the source tree for an editable installation, which looks there, and else into the wheel alone."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before hatchling collects the files."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        target = root / TARGET
        if version != "editable":
            target = root / "build" / _platform() / TARGET.name  # maybe for another machine than this one
            target.parent.mkdir(parents=True, exist_ok=True)
        if not _compiled([root / source for source in SOURCES], target):
            self.app.display_warning(
                "the gather kernel was not built (is there a C compiler?): gathers will be torch's, which are slower"
            )
            return
        if version != "editable":
            build_data["force_include"][str(target)] = str(TARGET)
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"


def _compiled(sources: list[Path], target: Path) -> bool:
    """Whether the library was built; an old one is never left behind."""
    target.unlink(missing_ok=True)
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if sys.platform != "linux" or not compiler:
        return False
    unfinished = target.with_suffix(f".{os.getpid()}")
    try:
        subprocess.run([*compiler.split(), *FLAGS, "-o", str(unfinished), *map(str, sources)], check=True)
        unfinished.replace(target)
    except (OSError, subprocess.CalledProcessError) as exc:
        print(f"{', '.join(map(str, sources))} could not be compiled: {exc}", file=sys.stderr)
        return False
    finally:
        unfinished.unlink(missing_ok=True)
    return True


def _platform() -> str:
    given = os.environ.get("JASPER_STORE_PLATFORM")
    return given or sysconfig.get_platform().replace("-", "_").replace(".", "_")
