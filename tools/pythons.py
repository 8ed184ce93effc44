"""The tests on every supported Python that is found here, with the newest and the oldest allowed dependencies, and its wheel.

    python -m tools.pythons                        # all of them, one after another
    python -m tools.pythons --python 3.12 --with oldest -- tests/formats -q

A Python that is not installed is named and passed over, never downloaded: on the PATH, and among pyenv's versions. One
environment is there at a time, and removed afterwards: where only a CUDA build of torch can be had, it takes 5 GB. After the
tests the wheel takes the place of the checkout, and must run the demo.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.minimum import EXTRA, read_project

ROOT = Path(__file__).resolve().parent.parent
DEPENDENCIES = ("newest", "oldest")


def supported() -> list[str]:
    """The Pythons that the classifiers of pyproject.toml claim."""
    names = "\n".join(read_project()["classifiers"])
    return re.findall(r"^Programming Language :: Python :: (3\.\d+)$", names, re.MULTILINE)


def find(version: str) -> str | None:
    """An interpreter of a version, such as ``3.12``; the newest of pyenv's where the PATH has none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    installed = sorted(pyenv.glob(f"{version}.*/bin/python"), key=lambda path: int(path.parts[-3].split(".")[2]))
    for candidate in (shutil.which(f"python{version}"), *map(str, reversed(installed))):
        if candidate is not None and _version_of(candidate) == version:
            return candidate
    return None


def _version_of(python: str) -> str | None:
    """Version of an interpreter; ``None`` if it cannot make an environment, as Debian's without python3-venv."""
    asked = "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def run(python: str, dependencies: str, torch: str, arguments: list[str]) -> tuple[int, str]:
    """Run the tests, then the wheel, in an environment of their own; the exit status, and the versions that were installed."""
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="python-", dir=ROOT / "build") as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        inside = str(Path(folder, "bin", "python"))
        limits = Path(folder, "limits.txt")
        limits.write_text(_limits(dependencies, torch), encoding="utf-8")
        pip = [inside, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
        subprocess.run(
            [*pip, "install", "--constraint", str(limits), "--editable", f".[{EXTRA}]"], cwd=ROOT, check=True
        )
        frozen = subprocess.run([*pip, "freeze"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        versions = " ".join(re.findall(r"^(?:torch|numpy|h5py|safetensors)==.*", frozen, re.MULTILINE))
        status = subprocess.run([inside, "-m", "pytest", *arguments], cwd=ROOT, check=False).returncode
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, str(ROOT)], check=True)
        [wheel] = map(str, Path(folder).glob("*.whl"))
        subprocess.run([*pip, "install", "--no-deps", "--force-reinstall", wheel], check=True)
        smoke = [inside, str(ROOT / "tools" / "smoke.py")]
        status = status or subprocess.run(smoke, cwd=folder, check=False).returncode
    return status, versions


def _limits(dependencies: str, torch: str) -> str:
    if dependencies == "newest":
        return f"torch=={torch}\n"
    command = [sys.executable, str(ROOT / "tools" / "minimum.py"), "--torch", torch]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Run what was asked for; 1 if a run failed, or no Python was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", action="append", help="a version, such as 3.12; may be given several times")
    parser.add_argument("--with", dest="dependencies", choices=DEPENDENCIES, action="append")
    parser.add_argument("--torch", required=True, help="release of torch; PyPI's builds of some bring CUDA")
    parser.add_argument("arguments", nargs="*", help="of pytest, after --")
    options = parser.parse_args()
    rows = []
    for version in options.python or supported():
        python = find(version)
        if python is None:
            rows.append(f"Python {version}: not found here")
            continue
        for dependencies in options.dependencies or DEPENDENCIES:
            started = time.monotonic()
            status, versions = run(python, dependencies, options.torch, options.arguments)
            outcome = "passed" if status == 0 else f"FAILED ({status})"
            minutes = (time.monotonic() - started) / 60
            rows.append(f"Python {version}, {dependencies}: {outcome} in {minutes:.0f} min ({versions})")
            print(rows[-1], flush=True)
    print("\n".join(["", *rows]))
    return 0 if any("passed" in row for row in rows) and not any("FAILED" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
